"""Files of a workspace, on a local disk or any fsspec store, written once and never changed.

Everything durable goes through `put`: it creates a whole file or nothing, and never replaces one. Locally that is a
temporary file, fsync, `link()` (which fails where the name is taken; a rename would replace) and fsync of the folder;
on an object store one conditional PUT.
"""

import contextlib
import errno
import os
import posixpath
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from manifests.errors import ShardError, WorkspaceError

_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Storage:
    """The root of a workspace; every path given to its methods is relative to it, with '/' between names."""

    uri: str
    fs: Any
    root: str

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine."""
        return self.fs is None

    def full(self, path: str) -> str:
        """The path as the store knows it."""
        return posixpath.join(self.root, path)

    def location(self, path: str) -> str:
        """What another reader (DuckDB, pyarrow) opens: a local path, or a URI."""
        return self.full(path) if self.fs is None else self.fs.unstrip_protocol(self.full(path))

    def put(self, path: str, data: bytes | IO[bytes]) -> bool:
        """Creates the file with all of `data`, durably; False where the name is taken (nothing is changed then)."""
        if self.fs is None:
            return _put_local(Path(self.full(path)), data)
        if self.exists(path):
            return False
        with contextlib.suppress(FileExistsError):
            self.fs.makedirs(posixpath.dirname(self.full(path)), exist_ok=True)
        try:
            self.fs.pipe_file(self.full(path), b"".join(_chunks(data)), mode="create")
        except OSError:
            # FileExistsError, or a store's own way to say so (a 412 without its condition is an EINVAL in s3fs).
            if self.exists(path):
                return False
            raise
        return True

    def replace(self, path: str, data: bytes) -> None:
        """Writes a file that may stand already: only for what is no record (checkpoints of a fit, reports)."""
        if self.fs is not None:
            self.fs.makedirs(posixpath.dirname(self.full(path)), exist_ok=True)
            self.fs.pipe_file(self.full(path), data)
            return
        target = Path(self.full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, target)

    def read(self, path: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        if self.fs is None:
            return Path(self.full(path)).read_bytes()
        return self.fs.cat_file(self.full(path))

    def open(self, path: str) -> IO[bytes]:
        """A seekable stream over a file. Raises FileNotFoundError."""
        return open(self.full(path), "rb") if self.fs is None else self.fs.open(self.full(path), "rb")

    def exists(self, path: str) -> bool:
        return os.path.exists(self.full(path)) if self.fs is None else bool(self.fs.exists(self.full(path)))

    def size(self, path: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        return os.path.getsize(self.full(path)) if self.fs is None else int(self.fs.size(self.full(path)))

    def names(self, folder: str) -> list[str]:
        """The sorted names in a folder, without temporary and hidden ones; empty where there is no such folder."""
        try:
            if self.fs is None:
                found = os.listdir(self.full(folder))
            else:
                found = [posixpath.basename(name.rstrip("/")) for name in self.fs.ls(self.full(folder), detail=False)]
        except FileNotFoundError:
            return []
        return sorted(name for name in found if not name.startswith("."))

    def remove_folder(self, folder: str) -> None:
        """Removes a folder of files that are no records (a finished fit's checkpoints)."""
        if self.fs is None:
            shutil.rmtree(self.full(folder), ignore_errors=True)
        elif self.fs.exists(self.full(folder)):
            self.fs.rm(self.full(folder), recursive=True)


def open_storage(uri: str | Path) -> Storage:
    """The storage at a local folder or an fsspec URI (`s3://bucket/work`, `memory://work`); nothing is created.

    Raises WorkspaceError for a scheme whose package is not installed.
    """
    text = str(uri)
    if "://" not in text or text.startswith("file://"):
        root = os.path.abspath(os.path.expanduser(text.removeprefix("file://")))
        return Storage(uri=root, fs=None, root=root)
    import fsspec

    try:
        # Listings change under us: other processes write here too.
        fs, root = fsspec.core.url_to_fs(text, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise WorkspaceError(
            f"workspace {text!r}: {error}; s3:// needs the extra modmill[s3], gs:// modmill[gcs]"
        ) from error
    return Storage(uri=text.rstrip("/"), fs=fs, root=root.rstrip("/"))


def cache_folder() -> Path:
    """What this user's processes may make again lives here: indexes of logs, copies of weights and tokens.

    $MODMILL_CACHE, else $XDG_CACHE_HOME/modmill, else ~/.cache/modmill.
    """
    if own := os.environ.get("MODMILL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modmill"


def put_same(storage: Storage, path: str, data: bytes | IO[bytes], sha256: str) -> None:
    """Puts a file whose name holds its content's hash; one that stands there already must be equal.

    Raises ShardError where another content has the name (a truncated or altered file: it is moved out of nobody's way
    by hand only).
    """
    from manifests.recipe import sha256_hex

    if storage.put(path, data):
        return
    found = sha256_hex(storage.read(path))
    if found != sha256:
        raise ShardError(
            f"{storage.location(path)} holds sha256 {found[:12]}, expected {sha256[:12]}: the file was altered or "
            "truncated; delete it and run again"
        )


def _put_local(target: Path, data: bytes | IO[bytes]) -> bool:
    if target.exists():
        return False
    _make_folder(target.parent)
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
