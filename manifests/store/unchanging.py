"""Gives DuckDB the files of a workspace on an object store, and remembers what was learned of them: they never change.

DuckDB asks for the size and the time of a Parquet file some thirty times, and opens it for each scan. Each answer of the
store takes tens of milliseconds.
"""

import datetime
import io
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import has_magic
from fsspec.spec import AbstractBufferedFile

# A file of up to so many bytes is read by one request, and kept; of a larger one only what is asked for is read.
_SMALL = 1 << 20
_KEPT = 64 << 20
_TIME = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)


class UnchangingFiles(AbstractFileSystem):
    """Reads through another file system. What lies below `folders` of it never changes; all else is passed on.

    `told` are sizes in bytes by the path in the store, as the log tells them. They decide how a file is read, and are
    not believed: its true size is that of its bytes, or the store's word.
    """

    cachable = False

    def __init__(self, fs: Any, folders: tuple[str, ...], told: Mapping[str, int]) -> None:
        super().__init__()
        self.protocol = fs.protocol
        self._fs = fs
        self._folders = tuple(f"{folder.rstrip('/')}/" for folder in folders)
        self._told = told
        self._sizes: dict[str, int] = {}
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()
        # Of a file that two threads of DuckDB want, one waits until the other has it.
        self._doors = [threading.Lock() for _ in range(64)]

    def _unchanging(self, path: str) -> str | None:
        """Returns the path in the store of a file that never changes, None for any other path."""
        plain = self._fs._strip_protocol(path)
        return plain if plain.startswith(self._folders) and not has_magic(plain) else None

    def _size(self, path: str) -> int:
        if path not in self._sizes:
            is_small = self._told.get(path, _SMALL + 1) <= _SMALL
            self._sizes[path] = len(self._content(path)) if is_small else int(self._fs.size(path))
        return self._sizes[path]

    def _content(self, path: str) -> bytes:
        with self._doors[hash(path) % len(self._doors)]:
            with self._lock:
                if path in self._kept:
                    self._kept.move_to_end(path)
                    return self._kept[path]
            data = self._fs.cat_file(path)
            with self._lock:
                self._kept[path] = data
                self._kept_bytes += len(data)
                while self._kept_bytes > _KEPT:
                    self._kept_bytes -= len(self._kept.popitem(last=False)[1])
        return data

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        plain = self._unchanging(path) if mode == "rb" else None
        if plain is None:
            return self._fs.open(path, mode, **options)
        size = self._size(plain)
        if size <= _SMALL:
            return io.BytesIO(self._content(plain))
        return _Ranges(self._fs, plain, size=size)

    def glob(self, path: str, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        plain = self._unchanging(path)
        if plain is None or options:
            return self._fs.glob(path, **options)
        return [plain] if self.exists(plain) else []

    def exists(self, path: str, **options: Any) -> bool:
        plain = self._unchanging(path)
        if plain is None:
            return bool(self._fs.exists(path, **options))
        # DuckDB asks this of one file after the other, and opens them beside each other.
        if plain in self._told:
            return True
        try:
            self._size(plain)
        except FileNotFoundError:
            return False
        return True

    def info(self, path: str, **options: Any) -> Mapping[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        plain = self._unchanging(path)
        if plain is None:
            return self._fs.info(path, **options)
        return {"name": plain, "size": self._size(plain), "type": "file"}

    def modified(self, path: str) -> datetime.datetime:
        return self._fs.modified(path) if self._unchanging(path) is None else _TIME

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return self._fs.ls(path, detail=detail, **options)


class _Ranges(AbstractBufferedFile):
    """Reads a file of known size by ranges. The file of s3fs asks for its size and tag again each time it is opened."""

    DEFAULT_BLOCK_SIZE = 4 << 20  # Read ahead.

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start=start, end=end)
