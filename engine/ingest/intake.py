"""Reads the new samples of a source once: hashes them, has the filter judge them, and packs them if that is asked for."""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from engine.ingest.filters import Filter
from engine.ingest.pack import Packing, image_suffix
from engine.pipeline.config import CorpusConfig
from engine.sources import scan as sources
from engine.sources.kinds import open_source
from engine.sources.listing import Listed
from engine.sources.read import SourceReader
from engine.sources.tars import TarColumns
from manifests.errors import FetchError, SourceError
from manifests.formats.shards import SourcePlace
from manifests.recipe import sha256_hex

_MESSAGE_CHARACTERS = 1000


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Holds a sample that was read. `number` is that of its bytes if they wait to be packed, `error` why there are none.

    `sha256` is that of no bytes if they cannot be read: the row fails when it is worked on.
    """

    listed: Listed
    sha256: bytes
    size_bytes: int
    number: int | None = None
    error: str | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Holds the samples of a new part, and those that were dropped on the way to it: rows of the view `dropped`.

    A source whose last samples are left out ends with a chunk without samples.
    """

    rows: list[Taken]
    dropped: list[dict[str, Any]] = field(default_factory=list)


class Intake:
    """Reads a corpus's new samples; to be closed."""

    def __init__(self, scan: sources.Scan, config: CorpusConfig, forgotten: Collection[str], judge: Filter) -> None:
        self._scan = scan
        self._config = config
        self._forgotten = forgotten
        self._judge = judge
        self.refused = 0
        self.packing = Packing() if config.pack or config.url is not None else None
        self._fetch: Callable[[str], bytes] | None = None
        if config.url is not None:
            from engine.sources.fetch_url import Fetcher

            self._fetch = Fetcher(config.fetch).fetch

    def close(self) -> None:
        """Lets go of what waits to be packed."""
        if self.packing is not None:
            self.packing.close()

    def chunks(self, fresh: Sequence[Listed]) -> Iterator[Chunk]:
        """Yields the samples of one new part after the other, without those that were forgotten or that are filtered out."""
        part_rows = self._config.part_rows
        stream = iter(fresh)
        waiting: list[Taken] = []
        dropped: list[dict[str, Any]] = []
        first = 0
        while block := list(islice(stream, part_rows)):
            for taken in self.read(block, first):
                if taken.sha256.hex() in self._forgotten:
                    self.refused += 1
                elif reason := self._judge.judge(taken.sha256, taken.size):
                    listed = taken.listed
                    what = {"key": listed.key, "source": listed.source, "size_bytes": taken.size_bytes}
                    dropped.append({**what, "sha256": taken.sha256.hex(), **vars(reason)})
                else:
                    waiting.append(taken)
                    continue
                if self.packing is not None and taken.number is not None:
                    self.packing.drop(taken.number)
            first += len(block)
            if len(waiting) >= part_rows:
                yield Chunk(rows=waiting[:part_rows], dropped=dropped)
                waiting, dropped = waiting[part_rows:], []
        if waiting or dropped:
            yield Chunk(rows=waiting, dropped=dropped)

    def read(self, block: Sequence[Listed], first: int) -> list[Taken]:
        """Reads some samples; their bytes wait to be packed under numbers from `first` on."""
        source = None if self._fetch is not None else reader(self._scan.root, self._config, block)
        threads = self._config.fetch.parallel if source is None else source.threads
        try:
            with ThreadPoolExecutor(threads) as pool:
                return list(
                    pool.map(lambda place: self._take(source, block[place], place, first + place), range(len(block)))
                )
        finally:
            if source is not None:
                source.close()

    def _take(self, source: SourceReader | None, listed: Listed, place: int, number: int) -> Taken:
        error = None
        data = None
        try:
            if source is None:
                assert self._fetch is not None
                data = _image(self._fetch(listed.source))
            else:
                if listed.beside and isinstance(self._scan.read_columns, TarColumns):
                    self._scan.read_columns.keep(listed.source, source.read_beside(place))
                data = source.read(place)
        except SourceError as problem:
            error = f"{type(problem).__name__}: {problem}"[:_MESSAGE_CHARACTERS]
        sha256 = bytes.fromhex(sha256_hex(data or b""))
        size = None if data is None else self._judge.size_of(data)
        size_bytes = listed.size_bytes
        if self.packing is not None and data is not None:
            self.packing.put(number, data)
        if self.packing is not None or size_bytes is None:
            size_bytes = len(data or b"")
        is_packed = self.packing is not None and data is not None
        return Taken(
            listed=listed,
            sha256=sha256,
            size_bytes=size_bytes,
            number=number if is_packed else None,
            # What is read in place fails when it is worked on, and may be mended until then.
            error=error if self.packing is not None else None,
            size=size,
        )


def reader(root: str, config: CorpusConfig, samples: Sequence[Listed]) -> SourceReader:
    """Opens the source of samples, to read what they are hashed by."""
    rows = [
        SourcePlace(source=listed.source, size_bytes=listed.size_bytes, source_offset=listed.offset)
        for listed in samples
    ]
    return open_source(root, config, rows, beside=[listed.beside for listed in samples])


def _image(data: bytes) -> bytes:
    """Returns the bytes that a server sent, whatever it said they were. Raises FetchError if they are not an image."""
    if image_suffix(data) is None:
        begin = repr(data[:40])[2:-1]
        raise FetchError(
            f"the server sent {len(data):,} bytes that are no JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF or HEIC: {begin}..."
        )
    return data
