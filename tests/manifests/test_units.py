"""Tests how bytes and seconds are written, at the edges between units."""

from manifests import units


def test_sizes_take_the_unit_that_fits() -> None:
    sizes = (0, 999, 999.6, 95.4e6, 999.6e6, 1.23e9, 3e15)
    assert [units.size(size) for size in sizes] == ["0 B", "999 B", "1 kB", "95.4 MB", "1 GB", "1.23 GB", "3,000 TB"]
    assert [units.memory(size) for size in (601.2e6, 2 << 30, 16e9)] == ["601 MB", "2.1 GB", "16.0 GB"]


def test_times() -> None:
    assert [units.clock(seconds) for seconds in (8, 192, 7392, 439392)] == ["0:08", "3:12", "2:03:12", "5d 2:03:12"]
    assert [units.span(seconds) for seconds in (192, 47 * 3600, 12 * 86400 + 3 * 3600)] == [
        "0:03:12",
        "47:00:00",
        "12 d 3 h",
    ]
    assert [units.age(seconds) for seconds in (-3, 5, 119, 600, 7200, 259200)] == [
        "0 seconds",
        "5 seconds",
        "119 seconds",
        "10 minutes",
        "2 hours",
        "3 days",
    ]
