"""Writes bytes and seconds as a person reads them."""


def size(size_bytes: float) -> str:
    """Returns a number of bytes in the unit that fits, three digits of it: "1.23 GB", "95.4 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size_bytes < 999.5 or unit == "TB":
            break
        size_bytes /= 1000
    return f"{size_bytes:,.3g} {unit}" if size_bytes < 999.5 else f"{size_bytes:,.0f} {unit}"


def memory(size_bytes: float) -> str:
    """Returns a size of memory or of a disk, which is worth fewer digits: "2.1 GB", "601 MB"."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def clock(seconds: float) -> str:
    """Returns a time that runs: "3:12", "2:03:12", "5d 2:03:12"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02d}:{second:02d}"


def span(seconds: float) -> str:
    """Returns how long something takes: "0:03:12", from two days on "12 d 3 h"."""
    if seconds >= 48 * 3600:
        return f"{int(seconds // 86400):,} d {round(seconds % 86400 / 3600)} h"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def age(seconds: float) -> str:
    """Returns roughly how long ago something was: "3 days", "5 minutes"."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"
