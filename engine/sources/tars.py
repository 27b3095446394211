"""Finds images in WebDataset tars by their headers; they are read in place, and nothing is extracted to a disk.

Members that share a name up to the first dot (`sub/0001.jpg`, `sub/0001.txt`, `sub/0001.json`) are one sample, wherever they
stand in their tar, and that name is its `__key__`. What a header says is trusted no further than its checksum.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

from engine.pipeline.sections import CorpusConfig
from engine.sources.columns import columns_beside
from engine.sources.listing import (
    IMAGE_SUFFIXES,
    File,
    Listed,
    Notes,
    Scanned,
    key_of,
    open_file,
    read_file,
    stem,
    suffix,
)
from manifests.errors import ConfigError, SourceError

SUFFIXES = (".tar",)
COMPRESSED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
UNPACK = ("tar", "compressed, passed over (unpack it: members are read in place)")
COLUMN_FIELDS = ("txt", "json")
# Read since a later version: the image of a sample that has others stays the one it was.
_LATER = ("avif", "jfif", "heic", "heif", "hif")
# A field of several words, but for its suffix.
_FIELD = re.compile(r"[a-z_]\w*(\.[a-z_]\w*)*")
_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
# What is passed over; none of them has bytes behind its header.
_KINDS = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"5": "folder", b"6": "pipe"}
_LONG_NAME_BYTES = 1 << 20
_LENGTH_DIGITS = 7
_SIZE_DIGITS = 40
# No tar is larger, and sums of sizes stay within 63 bits.
_MOST_BYTES = 1 << 48
_THREADS = 8


@dataclass(frozen=True)
class Member:
    """Holds a plain file in a tar: its name, where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


@dataclass
class Directory:
    """Holds what the headers of a tar say: its plain files, those passed over as a kind and a name, and what is wrong."""

    members: list[Member] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)
    broken: str | None = None
    cut: str | None = None
    is_compressed: bool = False


# Not tarfile: tars come from strangers. tarfile takes a damaged header for the end, reads an extended header of any size,
# takes minutes over one of 100 kB without "=", and before Python 3.11.14 loops for ever at a negative size; it is
# also half as fast.
def read_directory(stream: IO[bytes], size: int) -> Directory:
    """Lists the plain files of a tar of `size` bytes by its headers alone: it seeks past their bytes.

    If a header is damaged the list ends, and `broken` says where: what follows cannot be found. If the file ends too early
    `cut` says so; the member that it cuts short is listed.
    """
    found = Directory()
    at, name, length = 0, None, None
    while True:
        stream.seek(at)
        header = stream.read(_BLOCK)
        if at == 0 and header[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
            found.is_compressed = True
            return found
        if len(header) < _BLOCK:
            found.cut = f"at byte {size:,}: it ends without an end mark"
            return found
        if not any(header):
            return found
        try:
            kind, member_size, own_name = _fields(header)
        except ValueError as error:
            found.broken = f"at byte {at:,}: {error}"
            return found
        begin = at + _BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            if member_size > _LONG_NAME_BYTES:
                found.broken = f"at byte {at:,}: an extended header of {member_size:,} bytes"
                return found
            extension = stream.read(member_size)
            if kind == b"L":
                name = extension.rstrip(b"\0")
            elif kind == b"x":
                records = _pax(extension)
                name = records.get(b"path", name)
                said = records.get(b"size")
                length = length if said is None else _size(said)
                if length is not None and length > _MOST_BYTES:
                    found.broken = f"at byte {at:,}: an extended header says {_shown(said or b'')} bytes"
                    return found
        else:
            member_size = 0 if kind in _KINDS else member_size if length is None else length
            _add(found, kind, name or own_name, begin, member_size)
            if begin + member_size > size:
                found.cut = f"at byte {size:,}: it ends within {_shown(name or own_name)}"
                return found
            name = length = None
        at = begin + -(-member_size // _BLOCK) * _BLOCK


def _add(found: Directory, kind: bytes, raw: bytes, begin: int, size: int) -> None:
    if kind == b"5" or raw.endswith(b"/"):
        return
    if kind not in _REGULAR:
        found.passed_over.append((f"being no plain file but a {_KINDS.get(kind, repr(kind))}", _shown(raw)))
        return
    try:
        name = raw.decode().removeprefix("./")
    except UnicodeDecodeError:
        found.passed_over.append(("of a name that is no UTF-8", _shown(raw)))
        return
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or any(ord(letter) < 32 for letter in name):
        found.passed_over.append(("of an absolute name, or one with .. or control characters", _shown(raw)))
    elif name and not any(part.startswith(".") for part in parts):
        found.members.append(Member(name, begin, size))


def _fields(header: bytes) -> tuple[bytes, int, bytes]:
    """Returns kind, size and name of a header. Raises ValueError if its checksum or a number is wrong."""
    said = _number(header[148:156])
    if said != sum(header) - sum(header[148:156]) + 256 and said != _signed_sum(header):
        raise ValueError("the checksum of a header is wrong")
    size = _number(header[124:136])
    if not 0 <= size <= _MOST_BYTES:
        raise ValueError(f"a header says {size} bytes")
    if header[156:157] == b"S":
        raise ValueError("a sparse file, which is read by no plain reader")
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0]
    # The GNU format has other fields in the place of USTAR's prefix.
    is_ustar = header[257:263] == b"ustar\0"
    return header[156:157], size, prefix + b"/" + name if is_ustar and prefix else name


def _signed_sum(header: bytes) -> int:
    return sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:]) + 256


def _number(text: bytes) -> int:
    """Reads octal digits, or GNU's base 256."""
    if text[0] in (0x80, 0xFF):
        return int.from_bytes(text[1:], "big", signed=text[0] == 0xFF)
    digits = text.partition(b"\0")[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError:
        raise ValueError(f"a header has the number {text!r}") from None


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Returns the records of an extended header; what is not a record ends it."""
    records, at = {}, 0
    while (space := data.find(b" ", at, at + _LENGTH_DIGITS + 1)) > 0:
        digits = data[at:space]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) < length <= len(data) - at:
            break
        key, _, value = data[space + 1 : at + length - 1].partition(b"=")
        records[key] = value
        at += length
    return records


def _size(digits: bytes) -> int:
    """Reads the size in an extended header; what is no size is more than any member has."""
    return int(digits) if digits.isdigit() and len(digits) < _SIZE_DIGITS else _MOST_BYTES + 1


def _shown(name: bytes) -> str:
    return repr(name[:200])[2:-1]


# -- samples ----------------------------------------------------------------------------------------------------------


def scan_tars(root: str, files: Sequence[File], config: CorpusConfig, notes: Notes) -> Scanned:
    """Lists the samples of all tars, in the order of the tars and of their members.

    `image` is the field that holds the image (`jpg`, `rgb.png`), by default the first with an image's suffix; `key` "source"
    makes keys of tar and name, if the names alone are not unique. Raises ConfigError if no tar holds an image.
    """
    image = config.image
    if config.key not in (None, "source"):
        raise ConfigError(
            f"key is {config.key!r}, but a sample of a tar has no such field before it is read; leave it out for the member's "
            "name up to its first dot, or write `key: source` to make keys of tar and name"
        )

    def directory(file: File) -> Directory:
        try:
            with open_file(root, file.path) as stream:
                return read_directory(stream, file.size_bytes)
        except OSError as error:
            return Directory(broken=f"{type(error).__name__}: {error}")
        except SourceError as error:
            return Directory(broken=str(error))

    samples: list[Listed] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for file, found in zip(files, pool.map(directory, files), strict=True):
            if found.is_compressed:
                notes.pass_over(file, UNPACK)
                continue
            for kind, name in found.passed_over:
                notes.add("member", f"{kind}, passed over", f"{file.path}#{name}")
            if found.broken:
                notes.add("tar", "broken, what follows in it is lost", f"{file.path} {found.broken}")
            if found.cut:
                notes.add("tar", "cut short", f"{file.path} {found.cut}")
            samples += _samples(file, found, config, notes)
    if not samples:
        wanted = f"named .{image}" if image else f"of {', '.join(IMAGE_SUFFIXES)}"
        told = "; ".join(notes.lines())
        raise ConfigError(f"the {len(files)} tars hold no images {wanted}{f' ({told})' if told else ''}")
    return samples, TarColumns(root, samples, notes)


def _samples(file: File, found: Directory, config: CorpusConfig, notes: Notes) -> Iterator[Listed]:
    image = config.image
    split = _dotted(found.members) if image is None else _split
    groups: dict[str, list[Member]] = {}
    for member in found.members:
        groups.setdefault(split(member.name)[0], []).append(member)
    if found.broken and groups:
        # Its other members may be among those that are lost. When the tar is mended it is a new sample, and whole.
        last = split(found.members[-1].name)[0]
        del groups[last]
        notes.add("sample", "before the damage, left out until its tar is mended", f"{file.path}#{last}")
    others: list[tuple[str, Member]] = []
    for name, members in groups.items():
        fields: dict[str, Member] = {}
        for member in members:
            if fields.setdefault(split(member.name)[1], member) is not member:
                notes.add("member", "of a name that stands twice, the later left out", f"{file.path}#{member.name}")
        chosen = fields.get(image) if image else _image(fields)
        if chosen is None:
            named = sorted(kind for kind in fields if image is None and suffix(kind) in IMAGE_SUFFIXES)
            hint = f" (its images are of more than one word; `image: {named[0]}` takes those)" if named else ""
            notes.add("sample", f"without an image, passed over{hint}", f"{file.path}#{name}")
            others += fields.items()
            continue
        for kind in fields:
            if fields[kind] is not chosen and kind not in COLUMN_FIELDS:
                notes.add("member", f"of kind .{kind} beside an image, passed over", f"{file.path}#{fields[kind].name}")
                others.append((kind, fields[kind]))
        source = f"{file.path}#{chosen.name}"
        yield Listed(
            key=name if config.key is None else key_of(source),
            source=source,
            size_bytes=chosen.size,
            mtime_ns=file.mtime_ns,
            offset=chosen.offset,
            beside=tuple((kind, fields[kind].offset, fields[kind].size) for kind in COLUMN_FIELDS if kind in fields),
        )
    notes.passed_over.extend(_of_kinds(file.path, others))


def _of_kinds(path: str, members: Sequence[tuple[str, Member]]) -> Iterator[tuple[File, str]]:
    """Yields what a tar has of each kind that was passed over, as one file, and words for it."""
    sizes: dict[str, list[int]] = {}
    for kind, member in members:
        sizes.setdefault(kind, []).append(member.size)
    for kind, found in sizes.items():
        what = f"{len(found)} member{'s' * (len(found) != 1)} of kind .{kind}"
        yield File(path=f"{path}#*.{kind}", size_bytes=sum(found), mtime_ns=None), what


def _split(name: str) -> tuple[str, str]:
    """Splits a name into `__key__` and field, in lower case: `a.b/c.seg.PNG` is `a.b/c` and `seg.png`."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}{slash}{stem}", kind.lower()


def _image(fields: Mapping[str, Member]) -> Member | None:
    """Returns the first image of a sample, one of `_LATER` only if there is no other."""
    images = [kind for kind in fields if f".{kind}" in IMAGE_SUFFIXES]
    return fields[min(images, key=lambda kind: kind in _LATER)] if images else None


def _dotted(members: Sequence[Member]) -> Callable[[str], tuple[str, str]]:
    """Returns what splits the names of a tar as `_split` does, but those of photographs with a dot at their last one.

    In `0001.rgb.png` and `0002.rgb.png` the field is `rgb.png`. In `2020.01.02 sea.jpg` the photograph itself has dots: its
    field would be no word, or stands once in all of the tar and is the only image of its name.
    """
    fields = [_split(member.name) for member in members]
    plain = {name for name, kind in fields if f".{kind}" in IMAGE_SUFFIXES}
    images = [(name, kind) for name, kind in fields if name not in plain and suffix(kind) in IMAGE_SUFFIXES]
    of_kind, of_name = Counter(kind for _, kind in images), Counter(name for name, _ in images)
    dotted = {name for name, kind in images if not _FIELD.fullmatch(stem(kind)) or of_kind[kind] == of_name[name] == 1}

    def split(name: str) -> tuple[str, str]:
        key, kind = _split(name)
        if key in dotted and "." in kind:
            key, _, kind = name.rpartition(".")
        return key, kind.lower()

    return split


def tar_of(source: str) -> str:
    """Returns the path of the tar that holds a sample, from `a.tar#sub/b.jpg`."""
    # Lower case of some letters is longer.
    found = re.search(r"\.tar(?=#)", source, re.IGNORECASE)
    return source if found is None else source[: found.end()]


class TarColumns:
    """Reads the source columns of samples: `.txt` is the caption, the keys of `.json` are columns.

    What was read beside an image is handed in by `keep`, so that it is not read again.
    """

    def __init__(self, root: str, samples: Sequence[Listed], notes: Notes) -> None:
        self._root = root
        self._notes = notes
        self._beside = {listed.source: listed.beside for listed in samples if listed.beside}
        self._kept: dict[str, dict[str, bytes]] = {}

    def keep(self, source: str, members: dict[str, bytes]) -> None:
        """Keeps what stands beside an image until its columns are asked for."""
        self._kept[source] = members

    def __call__(self, source: str) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        kept = self._kept.pop(source, {})
        for kind, offset, size in self._beside.get(source, ()):
            read = _reader(kept.get(kind), self._root, source, offset, size)
            columns.update(columns_beside(read, f"{source.rpartition('.')[0]}.{kind}", size, self._notes))
        return columns


def _reader(kept: bytes | None, root: str, source: str, offset: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        path = tar_of(source)
        data = read_file(root, path, offset, size) if kept is None else kept
        if len(data) < size:
            raise SourceError(f"{source}: the member beside it is cut short")
        return data

    return read
