"""Reads the source bytes of some samples where they lie: files, members of tars, cells of Parquet files, the workspace.

Members that lie close together in a tar of an object store are read at once; Parquet is read row group by row group.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine.pipeline.sections import CorpusConfig
from engine.sources import listing
from engine.sources.images import FORMATS, ImageFormat
from engine.sources.tars import tar_of
from manifests import errors
from manifests.errors import SourceError
from manifests.formats.shards import SourcePlace
from manifests.store import paths
from manifests.store.storage import Storage
from manifests.store.uris import is_uri

# One request to an object store takes as long as some megabytes do.
_BLOCK_BYTES = 8 << 20
_GAP_BYTES = 1 << 20
_BLOCKS_HELD = 3
_READERS = 8
# A row of a samples file records an error by the name of its class.
_ERRORS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.SourceError)
}


@dataclass(eq=False)
class _ByteRange:
    """Holds a range of one file that is read at once; `rows` counts those that wait for it."""

    path: str
    read: Callable[[str, int, int], bytes]
    begin: int
    end: int
    rows: int = 1
    data: bytes | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class SourceReader:
    """Reads the samples of some rows by their place among them; quick in their order."""

    # How many threads may read at once with profit.
    threads = 1

    def read(self, place: int) -> bytes | None:
        """Returns the bytes a sample is hashed by, None if its source has none. Raises SourceError if it cannot be read."""
        raise NotImplementedError

    def fields(self, place: int) -> dict[str, Any]:
        """Returns the columns that are read with a sample, such as a document's. Raises SourceError as `read`."""
        return {}

    def read_beside(self, place: int) -> dict[str, bytes]:
        """Returns the members beside a sample, by suffix, without those that are cut short."""
        return {}

    def prefetch(self, limit_bytes: int) -> None:
        """Reads the first samples into memory, up to `limit_bytes`; what cannot be read is left for `read` to raise."""

    def close(self) -> None:
        """Closes the files that are open."""


class SourceBytes(SourceReader):
    """Reads the source bytes of images, by their place among `rows`; quick in their order, from any thread."""

    threads = _READERS

    def __init__(
        self,
        root: str,
        config: CorpusConfig,
        rows: Sequence[SourcePlace],
        storage: Storage | None = None,
        *,
        beside: Sequence[Sequence[tuple[str, int, int]]] = (),
    ) -> None:
        """Takes rows of a samples file: `source`, `size_bytes`, and the columns that say where the bytes lie.

        `storage` is the workspace, for rows that were packed into it. `beside` are the suffix, offset and size of members
        beside each row, which are read with it.
        """
        self._root = root
        self._rows = rows
        self._storage = storage
        self._beside = beside
        self._blocks: dict[int, _ByteRange] = {}
        self._last: _ByteRange | None = None
        self._loaded: deque[_ByteRange] = deque()
        self._lock = threading.Lock()
        self._ready: dict[int, bytes | None] = {}
        wanted: dict[ImageFormat, dict[str, set[int]]] = {}
        self._most = config.most_bytes
        for place, row in enumerate(rows):
            if row.source is None or row.source_error or self._is_too_large(row):
                continue
            if row.source_offset is not None:
                self._add_range(place, row, row.source, row.source_offset)
            elif found := _row_of(row.source):
                wanted.setdefault(found[0], {}).setdefault(found[1], set()).add(found[2])
        self._tables = {
            kind: kind.open_rows(root, config, numbers) for kind, numbers in wanted.items() if kind.open_rows
        }

    def read(self, place: int) -> bytes | None:
        """Returns the bytes of a sample, None if its source has none. Raises SourceError if they cannot be read."""
        if place in self._ready:
            with suppress(KeyError):
                return self._ready.pop(place)
        row = self._rows[place]
        if row.source_error:
            name, _, message = row.source_error.partition(": ")
            raise _ERRORS.get(name, SourceError)(message)
        if self._is_too_large(row):
            listing.check_size(row.source or "", row.size_bytes, self._most)
        block = self._blocks.get(place)
        if block is not None:
            begin, size = row.source_offset or 0, row.size_bytes or 0
            data = self._block(block)[begin - block.begin : begin - block.begin + size]
            if len(data) < size:
                raise SourceError(f"{row.source} is cut short: {len(data):,} of {size:,} bytes; mend the tar")
            return data
        if row.source is None:
            raise SourceError("the sample was forgotten")
        if found := _row_of(row.source):
            return self._tables[found[0]].read(found[1], found[2])
        return listing.read_file(self._root, row.source, most=self._most)

    def read_beside(self, place: int) -> dict[str, bytes]:
        """Returns the members beside a sample, by suffix, without those that are cut short or stand far from it.

        Quick if it is called before the sample itself is read.
        """
        block = self._blocks.get(place)
        beside = () if block is None else _near(self._beside[place], self._rows[place])
        if block is None or not beside:
            return {}
        data = self._block(block, done=False)
        found = {suffix: data[at - block.begin : at - block.begin + size] for suffix, at, size in beside}
        return {suffix: found[suffix] for suffix, _, size in beside if len(found[suffix]) == size}

    def prefetch(self, limit_bytes: int) -> None:
        """Reads the first samples into memory, up to `limit_bytes`; what cannot be read is left for `read` to raise."""
        held = 0
        for place in range(len(self._rows)):
            if held >= limit_bytes:
                return
            with suppress(SourceError):
                if self._rows[place].source is not None:
                    data = self.read(place)
                    held += len(data or b"")
                    self._ready[place] = data

    def close(self) -> None:
        """Closes the files that are open."""
        for table in self._tables.values():
            table.close()

    def _is_too_large(self, row: SourcePlace) -> bool:
        return row.source_pack is None and (row.size_bytes or 0) > self._most

    def _add_range(self, place: int, row: SourcePlace, source: str, offset: int) -> None:
        if row.source_pack:
            path, read = row.source_pack, self._read_pack
            paths.check(path, paths.PACK, where=f"the samples file that names {source!r}, `source_pack`")
            is_remote = self._storage is not None and not self._storage.is_local
        else:
            path, read, is_remote = tar_of(source), partial(listing.read_file, self._root), is_uri(self._root)
        spans = [(offset, row.size_bytes or 0)]
        spans += [(offset, size) for _, offset, size in (_near(self._beside[place], row) if self._beside else ())]
        begin = min(offset for offset, _ in spans)
        end = max(offset + size for offset, size in spans)
        last = self._last
        if (
            is_remote
            and last is not None
            and last.path == path
            and last.begin <= begin <= last.end + _GAP_BYTES
            and end - last.begin <= _BLOCK_BYTES
        ):
            last.end = max(last.end, end)
            last.rows += 1
            self._blocks[place] = last
        else:
            self._last = self._blocks[place] = _ByteRange(path=path, read=read, begin=begin, end=end)

    def _block(self, block: _ByteRange, *, done: bool = True) -> bytes:
        """Returns a range's bytes. They are dropped when all its rows are done, or when others were read after it."""
        with block.lock:
            data = block.data
            if data is None:
                data = block.read(block.path, block.begin, block.end - block.begin)
            block.rows -= done
            block.data = data if block.rows > 0 else None
        with self._lock:
            if block.data is not None and block not in self._loaded:
                self._loaded.append(block)
            while len(self._loaded) > _BLOCKS_HELD:
                self._loaded.popleft().data = None
        return data

    def _read_pack(self, path: str, begin: int, size: int) -> bytes:
        if self._storage is None:
            raise ValueError("rows that were packed need the workspace")
        try:
            return self._storage.read_range(path, begin, size)
        except FileNotFoundError as error:
            raise SourceError(f"{path} is gone from the workspace; restore it from a copy") from error


def _near(beside: Sequence[tuple[str, int, int]], row: SourcePlace) -> list[tuple[str, int, int]]:
    """Returns the members beside a sample that are worth reading with it: what lies between is read too."""
    begin = row.source_offset or 0
    end = begin + (row.size_bytes or 0)
    return [
        member for member in beside if begin - _GAP_BYTES <= member[1] and member[1] + member[2] <= end + _GAP_BYTES
    ]


def _row_of(source: str) -> tuple[ImageFormat, str, int] | None:
    """Returns the format, the file and the row of an image that is a row of a file, None if it is no such image."""
    for kind in FORMATS:
        if kind.open_rows is not None and (found := listing.row_of(source, kind.suffixes)):
            return kind, *found
    return None
