"""Reads, decodes and crops the rows of a part by threads, in order, within a bound of bytes."""

import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from engine.plan.corpus import CorpusPlan
from engine.sources import listing
from engine.work.inputs import Inputs
from engine.work.rows import ABSENT, FORGOTTEN, LoadedRow, Needs, failed
from manifests.errors import SourceError
from manifests.formats.shards import Sample
from manifests.pixels import crops, images
from manifests.recipe import sha256_hex
from manifests.store.uris import is_uri

# So many rows of an object store, which answers late, are read at once, however few are decoded at once.
_READERS = 4


class ByteBudget:
    """Lets rows in, in their order, while the bytes inside stay under a limit; one row alone may exceed it."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit = limit_bytes
        self._used = 0
        self._next = 0
        self._closed = False
        self._changed = threading.Condition()

    def enter(self, ticket: int, size_bytes: int) -> None:
        """Waits until all rows before `ticket` are in and there is room, or nobody waits for rows, and counts the bytes."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or (self._next == ticket and (self._used == 0 or self._used + size_bytes <= self.limit))
                )
            )
            self._used += size_bytes
            self._next += 1
            self._changed.notify_all()

    def leave(self, size_bytes: int) -> None:
        """Gives bytes of a row back."""
        with self._changed:
            self._used -= size_bytes
            self._changed.notify_all()

    def close(self) -> None:
        """Lets all in from here on, so that no thread waits for a reader that hangs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def fill(self) -> float:
        """Returns the share of the limit that is in use."""
        return self._used / self.limit


class _Decoding(NamedTuple):
    """Holds a row on its way. Its bytes are known before it is let in, so that a chunk never waits for itself."""

    sized: Future[int]
    done: Future[tuple[LoadedRow, int]]


def load_chunks(
    inputs: Inputs, units: Sequence[Sequence[int]], *, needs: Needs, most: int, budget: ByteBudget
) -> Generator[list[LoadedRow], None, None]:
    """Yields the samples at the places that `units` name, in order, in chunks of at most `most` rows of one unit.

    Whatever is wrong with a row is its `problem`, never an exception. What is decoded and not yet taken, plus the chunk at
    hand, plus what decoding itself takes, stays within `budget`; one photograph alone may exceed it. How rows fall into
    chunks depends on the sizes of photographs alone, never on time: a chunk ends before a row with which it would take
    more than half of the budget.
    """
    if not (needs.decode and inputs.plan.config.has_pixels):
        for unit in units:
            for first in range(0, len(unit), most):
                yield [_with_fields(inputs, place) for place in unit[first : first + most]]
        return
    yield from _RowDecoder(inputs, needs, budget).run(units, most)


class _RowDecoder:
    """Holds the threads that read and decode, and the rows on their way."""

    def __init__(self, inputs: Inputs, needs: Needs, budget: ByteBudget) -> None:
        self._plan = inputs.plan
        self._samples = inputs.samples
        self._source = inputs.source
        self._needs = needs
        self._budget = budget
        self._threads = inputs.settings.decoders
        # On a processor that all share, decoding by turns takes less than by several at once: caches stay warm.
        self._decoding = threading.BoundedSemaphore(self._threads)

    def run(self, units: Sequence[Sequence[int]], most: int) -> Generator[list[LoadedRow], None, None]:
        tickets = enumerate(place for unit in units for place in unit)
        # Enough rows ahead for a whole unit to be ready when the one before is done; bytes bound them.
        ahead = max(4 * self._threads, 2 * max(map(len, units), default=0))
        waiting: deque[_Decoding] = deque()
        held = 0
        chunk: list[LoadedRow] = []
        # Files of this machine come at once: more threads would only take the interpreter from the labelers.
        readers = max(_READERS, self._threads) if is_uri(self._plan.root) else self._threads
        with ThreadPoolExecutor(readers, thread_name_prefix="decode") as pool:
            try:
                for begins in (number == 0 for unit in units for number in range(len(unit))):
                    for ticket, place in islice(tickets, ahead - len(waiting)):
                        sized: Future[int] = Future()
                        waiting.append(_Decoding(sized, pool.submit(self._load, sized, place, ticket)))
                    job = waiting[0]
                    is_full = len(chunk) == most
                    if chunk and (begins or is_full or held + job.sized.result() > self._budget.limit // 2):
                        yield chunk
                        chunk = []
                        self._budget.leave(held)
                        held = 0
                    row, size_bytes = job.done.result()
                    waiting.popleft()
                    chunk.append(row)
                    held += size_bytes
                    del row
                if chunk:
                    yield chunk
            finally:
                # A consumer that stops early must not leave threads waiting for their turn.
                chunk = []
                self._budget.leave(held)
                for job in waiting:
                    job.done.cancel()
                for job in waiting:
                    if not job.done.cancelled():
                        self._budget.leave(job.done.result()[1])

    def _load(self, sized: Future[int], place: int, ticket: int) -> tuple[LoadedRow, int]:
        """Returns a row, and how many bytes of it are inside the budget."""
        sample = self._samples[place]
        row = _row(self._plan, sample)
        entered = 0
        stage = "source"
        try:
            if row.problem is not None:
                return self._let_in(sized, ticket, row)
            data = self._source.read(place)
            if data is None:
                return self._let_in(sized, ticket, replace(row, problem=ABSENT))
            if sample.sha256 is None or sha256_hex(data) != sample.sha256.hex():
                raise SourceError(
                    f"{sample.source} is no longer the file that was ingested (its sha256 differs); put the old file "
                    "back, or give the new one another name so that it becomes a sample of its own"
                )
            stage = "decode"
            short = self._plan.config.decode_short
            header = images.header_of(data, short=short)
            crop_bytes = sum(3 * size * size for size in self._needs.sizes) * len(self._needs.crops)
            entered = header.decode_bytes + crop_bytes
            sized.set_result(entered)
            self._budget.enter(ticket, entered)
            # Only once it is let in, so that what waits for room keeps nobody from decoding.
            with self._decoding:
                row = self._decoded(row, images.decode_photo(data, short=short))
            kept = crop_bytes + (header.pixel_bytes if row.image is not None else 0)
            self._budget.leave(entered - kept)
            return row, kept
        except Exception as error:
            row = replace(row, problem=failed(stage, error))
            if entered:
                self._budget.leave(entered)
                return row, 0
            return self._let_in(sized, ticket, row)

    def _let_in(self, sized: Future[int], ticket: int, row: LoadedRow) -> tuple[LoadedRow, int]:
        """Gives a row without pixels its turn."""
        sized.set_result(0)
        self._budget.enter(ticket, 0)
        return row, 0

    def _decoded(self, row: LoadedRow, photo: images.Photo) -> LoadedRow:
        """Returns the row with its crops, cut here so that the thread of the labelers need not."""
        cuts = {
            number: crops.plan_crop(self._plan.rule, row.key, number, photo.width, photo.height)
            for number in self._needs.crops
        }
        pixels = {
            (number, size): crops.crop_pixels(photo.pixels, crop, size)
            for number, crop in cuts.items()
            for size in self._needs.sizes
        }
        image = photo.pixels if self._needs.photo else None
        return replace(row, image=image, size=(photo.width, photo.height), cuts=cuts, pixels=pixels)


def _with_fields(inputs: Inputs, place: int) -> LoadedRow:
    row = _row(inputs.plan, inputs.samples[place])
    if not row.readable:
        return row
    try:
        return replace(row, columns={**row.columns, **inputs.source.fields(place)})
    except SourceError as error:
        return replace(row, problem=failed("source", error), readable=False)


def _row(plan: CorpusPlan, sample: Sample) -> LoadedRow:
    if sample.source is None or sample.is_forgotten:
        return LoadedRow(row=sample.row, key=sample.key, uri="", columns={}, problem=FORGOTTEN, readable=False)
    uri = listing.uri(plan.root, sample.source)
    return LoadedRow(row=sample.row, key=sample.key, uri=uri, columns=sample.columns)
