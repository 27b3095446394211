"""Stores the files of a workspace, on a local disk or any fsspec store; they are written once and never changed.

Everything durable goes through `put`: it creates a whole file or nothing, and never replaces one. Locally that is a
temporary file, fsync, `link()` (which fails if the name is taken; a rename would replace) and fsync of the folder;
on an object store one conditional PUT (`object_store.py`).
"""

import contextlib
import datetime
import errno
import functools
import os
import posixpath
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from manifests.errors import ShardError, WorkspaceError
from manifests.recipe import sha256_hex, sha256_of_stream
from manifests.store import object_store, paths

_COPY_BYTES = 1 << 20
_MAKE_ROOM = "None of it was kept; make room on that disk and give the same command again, which goes on from there"
# What a person can do about a disk that does not take a file.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _MAKE_ROOM),
    errno.EROFS: "Mount that disk for writing, or copy the workspace (`modmill export --help`) to a place that can be written",
}


@dataclass(frozen=True)
class StoredFile:
    """Describes a file that `walk` found; `modified` is in UTC, by the clock of the store."""

    path: str
    size_bytes: int
    modified: datetime.datetime


@dataclass(frozen=True)
class Storage:
    """Reads and writes below the root of a workspace: methods take paths relative to it, with '/' between names.

    `told` are the bytes of files that never change, as the log tells them, by `full` path.
    """

    uri: str
    fs: Any
    root: str
    told: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_local(self) -> bool:
        """Tells whether the root is a folder of this machine."""
        return self.fs is None

    def full(self, path: str) -> str:
        """Returns the path as the store knows it."""
        return posixpath.join(self.root, path)

    def location(self, path: str) -> str:
        """Returns what another reader (DuckDB, pyarrow) opens: a local path, or a URI."""
        return self.full(path) if self.fs is None else self.fs.unstrip_protocol(self.full(path))

    def known(self, files: Sequence[str], sizes: Sequence[int | None]) -> list[str]:
        """Returns the locations of files that never change, and remembers what the log tells of their sizes."""
        if self.fs is not None:
            known = zip(files, sizes, strict=True)
            self.told.update((self.full(path), size) for path, size in known if size is not None)
        return [self.location(path) for path in files]

    def put(self, path: str, data: bytes | IO[bytes]) -> bool:
        """Creates the file with all of `data`, durably. Returns False, and changes nothing, if the name is taken."""
        if self.fs is None:
            with writing(self.full(path)):
                return _put_local(Path(self.full(path)), data)
        whole = b"".join(_chunks(data))
        with self._in_words(path, "written"):
            return object_store.put(self.fs, self.full(path), whole)

    def replace(self, path: str, data: bytes) -> None:
        """Writes a file that may exist already: only for what is no record (checkpoints of a fit, reports)."""
        if self.fs is not None:
            with self._in_words(path, "written"):
                object_store.replace(self.fs, self.full(path), data)
            return
        with writing(self.full(path)):
            replace_file(Path(self.full(path)), data)

    def read(self, path: str) -> bytes:
        """Returns all bytes of a file. Raises FileNotFoundError."""
        if self.fs is None:
            return Path(self.full(path)).read_bytes()
        with self._in_words(path, "read"):
            return self.fs.cat_file(self.full(path))

    def read_range(self, path: str, begin: int, size: int) -> bytes:
        """Returns `size` bytes of a file from `begin` on, fewer if it ends before. Raises FileNotFoundError."""
        if self.fs is None:
            with open(self.full(path), "rb", buffering=0) as file:
                file.seek(begin)
                return file.read(size) or b""
        with self._in_words(path, "read"):
            return self.fs.cat_file(self.full(path), start=begin, end=begin + size) if size else b""

    def open(self, path: str) -> IO[bytes]:
        """Opens a seekable stream over a file. Raises FileNotFoundError."""
        if self.fs is None:
            return open(self.full(path), "rb")
        with self._in_words(path, "read"):
            return self.fs.open(self.full(path), "rb")

    def exists(self, path: str) -> bool:
        if self.fs is None:
            return os.path.exists(self.full(path))
        with self._in_words(path, "looked for"):
            return bool(self.fs.exists(self.full(path)))

    def size(self, path: str) -> int:
        """Returns how many bytes a file has. Raises FileNotFoundError."""
        if self.fs is None:
            return os.path.getsize(self.full(path))
        with self._in_words(path, "looked for"):
            return int(self.fs.size(self.full(path)))

    def unchanging(self) -> Any:
        """Returns the file system for readers that ask often (DuckDB): what is written once is learned once."""
        from manifests.store.unchanging import UnchangingFiles

        return UnchangingFiles(self.fs, (self.full(paths.DATA), self.full(paths.SNAPSHOTS)), self.told)

    def names(self, folder: str, *, beginning: str = "") -> list[str]:
        """Returns the sorted names in a folder: those that begin so, or all but temporary and hidden ones.

        There are none if there is no such folder.
        """
        try:
            if self.fs is None:
                found = os.listdir(self.full(folder))
            else:
                with self._in_words(folder, "listed"):
                    full = self.full(folder)
                    listed = self.fs.find(full, prefix=beginning) if beginning else self.fs.ls(full, detail=False)
                found = [posixpath.basename(name.rstrip("/")) for name in listed]
        except FileNotFoundError:
            return []
        return sorted(name for name in found if (name.startswith(beginning) if beginning else not name.startswith(".")))

    def walk(self, folder: str) -> Iterator[StoredFile]:
        """Yields every file below a folder, temporary and hidden ones too; nothing if there is no such folder."""
        full = self.full(folder).rstrip("/")
        with self._in_words(folder, "listed"):
            for path, size_bytes, modified in (
                _walk_local(full, set()) if self.fs is None else object_store.walk(self.fs, full)
            ):
                yield StoredFile(path.removeprefix(self.root).lstrip("/"), size_bytes, modified)

    def remove(self, path: str) -> None:
        """Removes a file, durably; does nothing if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            if self.fs is not None:
                with self._in_words(path, "removed"):
                    self.fs.rm_file(self.full(path))
                return
            with writing(self.full(path), "removed"):
                os.unlink(self.full(path))
                _sync_folder(Path(self.full(path)).parent)

    def remove_folder(self, folder: str) -> None:
        """Removes a folder of files that are no records (a finished fit's checkpoints)."""
        if self.fs is None:
            shutil.rmtree(self.full(folder), ignore_errors=True)
            return
        with self._in_words(folder, "removed"), contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.full(folder), recursive=True)

    def _in_words(self, path: str, doing: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.fs is None else object_store.in_words(self.location(path), doing)


def open_storage(uri: str | Path) -> Storage:
    """Opens the storage at a local folder or an fsspec URI (`s3://bucket/work`, `memory://work`); creates nothing.

    Raises WorkspaceError for a scheme whose package is not installed.
    """
    text = str(uri)
    if "://" not in text or text.startswith("file://"):
        root = os.path.abspath(os.path.expanduser(text.removeprefix("file://")))
        return Storage(uri=root, fs=None, root=root)
    try:
        fs, root = object_store.connect(text)
    except (ImportError, ValueError) as error:
        raise WorkspaceError(
            f"workspace {text!r}: {error}; s3:// needs the extra modmill[s3], gs:// modmill[gcs]"
        ) from error
    return Storage(uri=text.rstrip("/"), fs=fs, root=root.rstrip("/"))


@contextlib.contextmanager
def writing(path: str | Path, doing: str = "written") -> Iterator[None]:
    """Turns the errors of a local disk that is full or read-only into a WorkspaceError that says what to do.

    Other errors of the system are told the path, which `fsync` does not name.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            error.filename = error.filename or str(path)
            raise
        raise WorkspaceError(f"{path} cannot be {doing}: {os.strerror(error.errno or 0)}. {remedy}") from error


def cache_folder() -> Path:
    """Returns the folder of what can be made again: indexes of logs, copies of weights and tokens.

    It is $MODMILL_CACHE, else $XDG_CACHE_HOME/modmill, else ~/.cache/modmill. Of a user without a home it is a folder
    that this process makes for itself, and removes at its end.
    """
    if own := os.environ.get("MODMILL_CACHE"):
        return Path(own)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "modmill"
    try:
        return Path.home() / ".cache" / "modmill"
    except RuntimeError:  # No HOME, and no entry in /etc/passwd.
        return Path(_own_cache().name)


@functools.cache
def _own_cache() -> tempfile.TemporaryDirectory[str]:
    # Of a name that nobody can foresee: what others put into a cache would be believed.
    return tempfile.TemporaryDirectory(prefix="modmill-cache-")


def put_same(
    storage: Storage, path: str, data: bytes | IO[bytes], sha256: str, *, remedy: str = "delete it and run again"
) -> bool:
    """Puts a file of known content. Returns False if it stands already.

    Raises ShardError if what stands is not equal (it was truncated or altered); a person must delete it by hand.
    """
    if storage.put(path, data):
        return True
    with storage.open(path) as standing:
        found = sha256_of_stream(standing)
    if found != sha256:
        raise ShardError(
            f"{storage.location(path)} holds sha256 {found[:12]}, expected {sha256[:12]}: the file was altered or "
            f"truncated; {remedy}"
        )
    return False


def read_same(
    storage: Storage, path: str, sha256: str, *, remedy: str = "see `modmill verify`, and restore it from a copy"
) -> bytes:
    """Returns the bytes of a committed file. Raises ShardError if it is missing, cannot be read, or is not of that sha256."""
    try:
        data = storage.read(path)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ShardError(f"{storage.location(path)} {reason}; {remedy}") from error
    if (found := sha256_hex(data)) != sha256:
        raise ShardError(
            f"{storage.location(path)} has sha256 {found[:12]}, expected {sha256[:12]}: it was altered or truncated; {remedy}"
        )
    return data


def replace_file(target: Path, data: bytes) -> None:
    """Writes a small local file, which may stand already: others see the old bytes or the new ones, never a part."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, target)


def _put_local(target: Path, data: bytes | IO[bytes]) -> bool:
    if target.exists():
        # Whoever made it may have been killed before the folder was synced.
        _sync_folder(target.parent)
        return False
    _make_folder(target.parent)
    # The bytes are on the disk before the name exists, so a crash leaves a whole file or a temporary one.
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for chunk in _chunks(data):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise WorkspaceError(
                    f"{target.parent}: this file system has no hard links, which a workspace needs to create files "
                    "at once or not at all; put the workspace on another disk or on an object store"
                ) from error
            raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)
    return True


def _walk_local(folder: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, int, datetime.datetime]]:
    """Yields path, bytes and time of every file below a folder.

    Follows links to folders (a big `data` is often put on another disk), but enters each folder once.
    """
    try:
        status = os.stat(folder)
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in found:
        if entry.is_dir():
            yield from _walk_local(entry.path, seen)
            continue
        with contextlib.suppress(FileNotFoundError):  # Gone since it was listed.
            status = entry.stat()
            yield entry.path, status.st_size, datetime.datetime.fromtimestamp(status.st_mtime, datetime.UTC)


def _make_folder(folder: Path) -> None:
    """Makes a folder and those above it, durably: a file is only as safe as the names that lead to it."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunks(data: bytes | IO[bytes]) -> Iterator[bytes]:
    if isinstance(data, bytes):
        yield data
        return
    data.seek(0)
    while chunk := data.read(_COPY_BYTES):
        yield chunk
