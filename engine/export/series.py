"""Writes the members of rows into tars, plain files or Parquet files, in the order that rows arrive in."""

import io
import tarfile
import tempfile
from collections.abc import Mapping
from typing import IO, Protocol

import pyarrow as pa

from manifests.errors import ConfigError, ShardError
from manifests.formats.shards import add_member
from manifests.recipe import sha256_hex, sha256_of_stream
from manifests.store import parquet
from manifests.store.storage import Storage, put_same


class Series(Protocol):
    """Writes the members of one folder; rows arrive in order. `sums` has the sha256 of each finished file, by path."""

    sums: dict[str, str]

    @property
    def size_bytes(self) -> int:
        """Returns the bytes written so far, of the open file too."""
        ...

    def add(self, stem: str, members: Mapping[str, bytes]) -> None:
        """Writes a row's members, by extension."""
        ...

    def close(self) -> None:
        """Stores the open file, if there is one."""
        ...


class TarSeries:
    """Writes <folder>/shard-00000.tar, of at most `rows_per_shard` rows each."""

    def __init__(self, target: Storage, folder: str, rows_per_shard: int) -> None:
        self._target = target
        self._folder = folder
        self._most = rows_per_shard
        self._rows = 0
        self._file: IO[bytes] | None = None
        self._tar: tarfile.TarFile | None = None
        self._closed_bytes = 0
        self.sums: dict[str, str] = {}

    @property
    def size_bytes(self) -> int:
        return self._closed_bytes + (0 if self._tar is None else self._tar.offset)

    def add(self, stem: str, members: Mapping[str, bytes]) -> None:
        if self._tar is None:
            # Both stay open while rows arrive; `close` stores the file.
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        for extension, data in sorted(members.items()):
            add_member(self._tar, f"{stem}.{extension}", data)
        self._rows += 1
        if self._rows == self._most:
            self.close()

    def close(self) -> None:
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        with self._file as file:
            self._closed_bytes += file.seek(0, io.SEEK_END)
            file.seek(0)
            sha256 = sha256_of_stream(file)
            path = f"{self._folder}/shard-{len(self.sums):05d}.tar"
            put(self._target, path, file, sha256)
        self.sums[path] = sha256
        self._tar, self._file, self._rows = None, None, 0


class FileSeries:
    """Writes <folder>/all/<stem>.<extension>: a file for each member, all of one class."""

    def __init__(self, target: Storage, folder: str, rows_per_shard: int) -> None:
        self._target = target
        self._folder = f"{folder}/all"
        self.size_bytes = 0
        self.sums: dict[str, str] = {}

    def add(self, stem: str, members: Mapping[str, bytes]) -> None:
        for extension, data in members.items():
            path = f"{self._folder}/{stem}.{extension}"
            self.sums[path] = sha256_hex(data)
            put(self._target, path, data, self.sums[path])
            self.size_bytes += len(data)

    def close(self) -> None:
        pass


class TextSeries:
    """Writes <folder>-00000.parquet, of at most `rows_per_shard` rows each: `key` and `text`, which is the member txt."""

    def __init__(self, target: Storage, folder: str, rows_per_shard: int) -> None:
        self._target = target
        self._folder = folder
        self._most = rows_per_shard
        self._rows: list[tuple[str, str]] = []
        self.size_bytes = 0
        self.sums: dict[str, str] = {}

    def add(self, stem: str, members: Mapping[str, bytes]) -> None:
        self._rows.append((stem, members["txt"].decode()))
        if len(self._rows) == self._most:
            self.close()

    def close(self) -> None:
        if not self._rows:
            return
        keys, texts = zip(*self._rows, strict=True)
        data = parquet.written(pa.table({"key": keys, "text": texts}))
        path = f"{self._folder}-{len(self.sums):05d}.parquet"
        self.sums[path] = sha256_hex(data)
        put(self._target, path, data, self.sums[path])
        self.size_bytes += len(data)
        self._rows = []


def put(target: Storage, path: str, data: bytes | IO[bytes], sha256: str) -> None:
    """Puts a file of an export. Raises ConfigError if another stands there."""
    try:
        put_same(target, path, data, sha256)
    except ShardError as error:
        raise ConfigError(
            f"{target.location(path)} stands with other content: it was altered, or the workspace has changed "
            "since this export began; delete the folder, or export to another"
        ) from error
