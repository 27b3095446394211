"""Lists the files of a source, on this machine or on any fsspec store, and reads them in place."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import IO, Any

from manifests.errors import ConfigError, SourceError
from manifests.store.uris import is_uri, without_credentials

_MAGIC = re.compile(r"[*?\[]")
_NAMES_SHOWN = 3
_KEY_DIGITS = 16
_LONG_SUFFIX = 8
LEADS_OUT = "leading out of the source, passed over (`follow_links: true` takes what is there)"
# The noun and words of notes of rows without a key, whose names say what stands there.
NO_KEY = ("row", "without a key, passed over")
HEIC_SUFFIXES = (".heic", ".heif", ".hif")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".avif"),
    *(HEIC_SUFFIXES if find_spec("pillow_heif") else ()),
)


@dataclass(frozen=True, kw_only=True)
class File:
    """Holds one file below a root: its path with '/' separators, bytes, and time of change (ns; None if not local)."""

    path: str
    size_bytes: int
    mtime_ns: int | None


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Holds one sample of a source.

    `source` is its path below the root, `docs.jsonl#17` for a row of a file, `a.tar#sub/b.jpg` for a member of a tar, or
    a URL. `size_bytes` counts the image's file, or the document's text in UTF-8; None if only reading tells. `mtime_ns` is
    the file's time of change, None if it is not local. `offset` is where the bytes begin in a tar, `beside` the suffix,
    offset and size of the members beside it that hold its source columns.
    """

    key: str
    source: str
    size_bytes: int | None
    mtime_ns: int | None
    offset: int | None = None
    beside: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Notes:
    """Holds what the user should know of a source: names by kind, of which the first are shown.

    `passed_over` is what a source has of other kinds, with words for it, which an ingest records.
    """

    counts: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    passed_over: list[tuple[File, str]] = field(default_factory=list)

    def add(self, noun: str, what: str, name: str) -> None:
        """Adds one of a kind: `add("row", "of captions.csv without an image", "a.jpg")`."""
        self.counts.setdefault((noun, what), []).append(name)

    def pass_over(self, file: File, told: tuple[str, str] | None = None) -> None:
        """Adds a file that is neither a sample nor beside one; `told` are a noun and words, by default of its kind."""
        kind = suffix(file.path)
        what = f"of kind {kind}" if kind else "without a suffix"
        hint = " (pip install 'modmill[heif]' reads it)" if kind in HEIC_SUFFIXES else ""
        self.passed_over.append((file, what))
        self.add(*(told or ("file", f"{what}, passed over{hint}")), file.path)

    def leave_out(self, file: File, noun: str, error: Exception) -> None:
        """Adds a file among others that cannot be read, or has not what they have."""
        self.passed_over.append((file, str(error)))
        self.add(noun, "that cannot be used, passed over", str(error))

    def lines(self) -> list[str]:
        """Returns a line a kind: "2 rows of captions.csv without an image: a.jpg, b.jpg"."""
        lines = []
        for (noun, what), names in self.counts.items():
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            plural = "s" if len(names) > 1 else ""
            lines.append(f"{len(names)} {noun}{plural} {what}: {', '.join(names[:_NAMES_SHOWN])}{more}")
        return lines


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Holds the files of a source, by path. `files` are all that lie around it, `chosen` those that it names."""

    root: str
    files: Sequence[File]
    chosen: Sequence[File]

    def with_suffix(self, source: str, suffixes: Sequence[str], noun: str) -> list[File]:
        """Returns the chosen files of these suffixes, in any case. Raises ConfigError if there are none."""
        found = [file for file in self.chosen if suffix(file.path) in suffixes]
        if found:
            return found
        counts = Counter(suffix(file.path) or "no suffix" for file in self.chosen)
        others = ", ".join(f"{count} with {name}" for name, count in counts.most_common(5))
        raise ConfigError(
            f"source {without_credentials(source)} holds no {noun}: found {len(self.chosen)} files"
            f"{f' ({others})' if others else ''}, expected {', '.join(suffixes)}; hidden files are passed over"
        )

    def others(self, taken: Iterable[File]) -> list[File]:
        """Returns the chosen files that are not among those taken."""
        paths = {file.path for file in taken}
        return [file for file in self.chosen if file.path not in paths]


# The samples of a source in its order, and what reads the source columns of one by its source.
Scanned = tuple[list[Listed], Callable[[str], dict[str, Any]]]


def list_source(source: str, notes: Notes, *, follow_links: bool = False) -> Listing:
    """Lists the files of a folder (with all below it), a glob, or a single file.

    Hidden files and folders, and names that are not UTF-8, are left out. A link that leads out of the folder is passed over
    unless `follow_links`; a linked folder is followed unless it lies in the source already, so that loops end. Raises
    ConfigError if nothing has that name.
    """
    text, is_remote, kind = _resolved(source)
    list_below: Callable[..., list[File]] = _list_remote if is_remote else partial(_list_local, follows=follow_links)
    if kind == "folder":
        files = list_below(text.rstrip("/") or "/", None, False, notes)
        return Listing(root=text.rstrip("/") or "/", files=files, chosen=files)
    if kind == "file":
        root, _, name = text.rpartition("/")
        # What is named itself may be a link.
        files = (
            _files_beside(root or "/", name, notes)
            if is_remote
            else list_below(root or "/", 1, True, notes, named=name)
        )
        return Listing(root=root or "/", files=files, chosen=[file for file in files if file.path == name])
    if not _MAGIC.search(text):
        raise ConfigError(f"source {without_credentials(source)} is not there; expected a folder, a file or a glob")
    root, pattern = _split_glob(text)
    depth = None if "**" in pattern else pattern.count("/") + 1
    hidden = any(name.startswith(".") for name in pattern.split("/"))
    files = list_below(root, depth, hidden, notes)
    matches = _glob_matcher(pattern)
    chosen = [file for file in files if matches(file.path)]
    if not chosen:
        raise ConfigError(
            f"source {without_credentials(source)}: no file matches; {len(files)} files were looked at below "
            f"{without_credentials(root)} (`*` stays within one folder, `**/` goes through all below)"
        )
    return Listing(root=root, files=files, chosen=chosen)


def root_of(source: str) -> str:
    """Returns the folder that the samples of a source have their names in, as `list_source` does; nothing is listed."""
    text, _, kind = _resolved(source)
    if kind == "folder":
        return text.rstrip("/") or "/"
    return (text.rpartition("/")[0] or "/") if kind == "file" else _split_glob(text)[0]


def _resolved(source: str) -> tuple[str, bool, str | None]:
    """Returns a source as an absolute path or URI, whether it is a URI, and what it is: "folder", "file" or None."""
    is_remote = is_uri(source) and not source.startswith("file://")
    text = source if is_remote else os.path.abspath(os.path.expanduser(source.removeprefix("file://")))
    return text, is_remote, _remote_kind(text) if is_remote else _local_kind(text)


def suffix(path: str) -> str:
    """Returns the suffix of a path, in lower case, with its dot."""
    return os.path.splitext(path)[1].lower()


def suffixes_of(sources: Iterable[str]) -> frozenset[str]:
    """Returns the suffixes, with their dots and in lower case, that names, URLs and members of tars end with."""
    ends = {source.partition("?")[0].rpartition(".")[1:] for source in sources}
    # A host's name or a row of a file has a dot as well.
    return frozenset(f".{end.lower()}" for dot, end in ends if dot and end.isalnum() and len(end) < _LONG_SUFFIX)


def stem(path: str) -> str:
    """Returns the path without its suffix."""
    return os.path.splitext(path)[0]


def row_of(source: str, suffixes: Sequence[str]) -> tuple[str, int] | None:
    """Returns the file and the row of `docs.jsonl#17`, None if a source is no row of a file of these suffixes."""
    path, _, number = source.rpartition("#")
    if suffix(path) in suffixes and number.isascii() and number.isdigit():
        return path, int(number)
    return None


def key_of(source: str) -> str:
    """Returns the key of a sample that has none of its own: 16 hex digits of the sha256 of its source's name."""
    return hashlib.sha256(source.encode()).hexdigest()[:_KEY_DIGITS]


def check_keys(samples: Sequence[Listed], notes: Notes) -> None:
    """Raises ConfigError if so many rows have no key as have one: another field is meant."""
    without = notes.counts.get(NO_KEY, ())
    if without and len(without) >= len(samples):
        raise ConfigError(f"{without[0]}, expected text or an integer that is not empty")


def uri(root: str, path: str) -> str:
    """Returns what opens a file of a source: a path of this machine, or an fsspec URI. Of URLs the root is empty."""
    return path if not root else f"{root.rstrip('/')}/{path}"


def open_file(root: str, path: str) -> IO[bytes]:
    """Opens a file of a source as a seekable stream. Raises SourceError if it cannot be opened."""
    _check_below(path)
    try:
        if not is_uri(root):
            return open(uri(root, path), "rb")
        fs, base = _filesystem(root)
        return fs.open(f"{base}/{path}" if base else path, "rb")
    except Exception as error:
        # Every store has error classes of its own.
        raise _unreadable(path, error) from error


def read_file(root: str, path: str, begin: int = 0, size: int | None = None, *, most: int | None = None) -> bytes:
    """Reads `size` bytes of a file of a source from `begin` on (all if it is None), fewer if the file ends before.

    Raises SourceError if it cannot be read, or is a file of this machine of more than `most` bytes.
    """
    _check_below(path)
    try:
        if not is_uri(root):
            with open(uri(root, path), "rb", buffering=0) as file:
                check_size(path, os.fstat(file.fileno()).st_size, most)
                file.seek(begin)
                return file.read(-1 if size is None else size)
        if size == 0:
            return b""
        fs, base = _filesystem(root)
        where = f"{base}/{path}" if base else path
        return fs.cat_file(where) if size is None else fs.cat_file(where, start=begin, end=begin + size)
    except SourceError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def check_size(path: str, size_bytes: int | None, most: int | None) -> None:
    """Raises SourceError for a sample of more than `most` bytes; those that are None bound nothing."""
    if size_bytes is not None and most is not None and size_bytes > most:
        raise SourceError(
            f"{path} has {size_bytes:,} bytes, more than max_mb = {most / 1e6:g} of its corpus allows; raise that to read it"
        )


def _check_below(path: str) -> None:
    """Raises SourceError for a path that leads out of the source: a samples file of a stranger may name any."""
    if path.startswith("/") or ".." in path.split("/"):
        raise SourceError(f"{path!r} leads out of the source, expected a path below it; no listing names such a file")


def _unreadable(path: str, error: Exception) -> SourceError:
    if isinstance(error, FileNotFoundError):
        return SourceError(f"{path} is gone from the source; put it back, or leave it as a failed row")
    return SourceError(f"{path} cannot be read: {type(error).__name__}: {without_credentials(str(error))}")


def _local_kind(path: str) -> str | None:
    if os.path.isdir(path):
        return "folder"
    return "file" if os.path.isfile(path) else None


def _remote_kind(text: str) -> str | None:
    fs, path = _filesystem(text)
    # Another process may have written since this one last looked.
    fs.invalidate_cache()
    try:
        return "folder" if fs.info(path)["type"] == "directory" else "file"
    except FileNotFoundError:
        return None
    except Exception as error:
        if _MAGIC.search(text):
            return None
        raise _unlistable(text, error) from error


def _filesystem(text: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"source {without_credentials(text)}: {error}; s3:// needs the extra modmill[s3], gs:// modmill[gcs]"
        ) from error
    return fs, path.rstrip("/")


def _unlistable(text: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"source {without_credentials(text)} cannot be listed: {type(error).__name__}: {without_credentials(str(error))}"
    )


def _split_glob(text: str) -> tuple[str, str]:
    """Returns the folder before the first name with a wildcard, and the pattern below it."""
    begin = text.index("://") + 3 if "://" in text else 0
    match = _MAGIC.search(text, begin)
    cut = text.rindex("/", 0, match.start()) if match else len(text)
    return text[:cut] or "/", text[cut + 1 :]


def _glob_matcher(pattern: str) -> Callable[[str], Any]:
    from fsspec.utils import glob_translate

    return re.compile(glob_translate(pattern)).match


def _files_beside(root: str, name: str, notes: Notes) -> list[File]:
    """Lists a file of a store and those beside it; web servers may serve a file and list no folder."""
    try:
        files = _list_remote(root, 1, True, notes)
    except ConfigError:
        files = []
    if any(file.path == name for file in files):
        return files
    fs, path = _filesystem(uri(root, name))
    return [*files, File(path=name, size_bytes=int(fs.size(path) or 0), mtime_ns=None)]


def _list_remote(root: str, depth: int | None, hidden: bool, notes: Notes) -> list[File]:
    fs, base = _filesystem(root)
    try:
        found = fs.find(base, maxdepth=depth, detail=True)
    except Exception as error:
        raise _unlistable(root, error) from error
    files = []
    for name, info in found.items():
        path = name.removeprefix(base).lstrip("/")
        is_hidden = not hidden and any(part.startswith(".") for part in path.split("/"))
        if path and not path.endswith("/") and info.get("type") == "file" and not is_hidden:
            files.append(File(path=path, size_bytes=int(info.get("size") or 0), mtime_ns=None))
    return sorted(files, key=lambda file: file.path)


def _list_local(
    root: str, depth: int | None, hidden: bool, notes: Notes, *, follows: bool = False, named: str | None = None
) -> list[File]:
    """Walks real folders first, then linked ones in the order of their paths: each folder once, whatever links to it.

    Links out of `root` are passed over unless it `follows` them, but for the file `named`.
    """
    real = os.path.realpath(root)
    files: list[File] = []
    folders, links = [""], list[str]()
    seen: set[tuple[int, int]] = set()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    if hidden or not entry.name.startswith("."):
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        if not follows and path != named and entry.is_symlink() and not _is_below(entry.path, real):
                            notes.add("link", LEADS_OUT, path)
                            continue
                        within = depth is None or path.count("/") + 1 < depth
                        _sort_entry(entry, path, files, *((folders, links) if within else ([], [])), notes)
        except OSError as error:
            notes.add("folder", "that cannot be read, passed over", f"{folder or root} ({error.strerror})")
    return sorted(files, key=lambda file: file.path)


def _is_below(path: str, root: str) -> bool:
    """Tells whether a link leads to what is below a folder, or nowhere."""
    real = os.path.realpath(path)
    return os.path.commonpath((root, real)) == root or not os.path.exists(real)


def _sort_entry(
    entry: os.DirEntry[str], path: str, files: list[File], folders: list[str], links: list[str], notes: Notes
) -> None:
    if not _is_utf8(path):
        notes.add("name", "not in UTF-8, passed over", repr(os.fsencode(path))[2:-1])
        return
    try:
        if entry.is_dir(follow_symlinks=False):
            folders.append(path)
        elif entry.is_dir():
            links.append(path)
        elif entry.is_file():
            status = entry.stat()
            files.append(File(path=path, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns))
        elif entry.is_symlink():
            notes.add("link", "leading nowhere, passed over", path)
    except OSError as error:
        notes.add("file", "that cannot be read, passed over", f"{path} ({error.strerror})")


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
