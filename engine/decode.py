"""The rows of a part, read and decoded by threads, in order, within a bound of bytes."""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine import sources
from engine.corpus_plan import CorpusPlan
from engine.failures import FORGOTTEN, Outcome, failed
from manifests import images
from manifests.errors import SourceError
from manifests.recipe import sha256_hex
from manifests.shards import SAMPLE_COLUMNS


@dataclass(frozen=True, kw_only=True)
class LoadedRow:
    """One sample, ready to be labeled.

    `image` is None for documents, and where `problem` says why there is none; the columns of a photograph that cannot be
    decoded are good all the same, those of a document that cannot be read and of a row that is forgotten (`readable` is
    False) are not there.
    """

    row: int
    key: str
    uri: str
    columns: Mapping[str, Any]
    image: np.ndarray | None
    problem: Outcome | None
    readable: bool = True


class ByteBudget:
    """Lets rows in, in their order, while the bytes inside stay under a limit; one row alone may exceed it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._used = 0
        self._next = 0
        self._changed = threading.Condition()

    def enter(self, ticket: int, size_bytes: int) -> None:
        """Waits until all rows before `ticket` are in and there is room, then counts the bytes."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._next == ticket and (self._used == 0 or self._used + size_bytes <= self._limit)
            )
            self._used += size_bytes
            self._next += 1
            self._changed.notify_all()

    def leave(self, size_bytes: int) -> None:
        """Gives a row's bytes back."""
        with self._changed:
            self._used -= size_bytes
            self._changed.notify_all()


def load_rows(
    plan: CorpusPlan, samples: Sequence[Mapping[str, Any]], *, needs_image: bool, threads: int, queue_bytes: int
) -> Iterator[LoadedRow]:
    """The samples of a part (rows of its samples file), in order, each with its image and source columns.

    Whatever is wrong with a row is its `problem`, never an exception. The bytes of decoded images that wait, plus the one
    being worked on, stay under `queue_bytes`.
    """
    if plan.config.kind == "text":
        yield from _documents(plan, samples)
        return
    if not needs_image:
        for sample in samples:
            yield _row(plan, sample, image=None, problem=None)
        return
    budget = ByteBudget(queue_bytes)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: deque[Future[tuple[np.ndarray | None, Outcome | None, int]]] = deque()
        taken = 0
        try:
            for sample in samples:
                while taken < len(samples) and len(waiting) < 4 * threads:
                    waiting.append(pool.submit(_decode, plan, samples[taken], taken, budget))
                    taken += 1
                image, problem, size_bytes = waiting.popleft().result()
                try:
                    yield _row(plan, sample, image=image, problem=problem)
                finally:
                    budget.leave(size_bytes)
        finally:
            # A consumer that stops early must not leave threads waiting for their turn.
            for future in waiting:
                future.cancel()
            for future in waiting:
                if not future.cancelled():
                    budget.leave(future.result()[2])


def _decode(
    plan: CorpusPlan, sample: Mapping[str, Any], ticket: int, budget: ByteBudget
) -> tuple[np.ndarray | None, Outcome | None, int]:
    if _is_forgotten(sample):
        budget.enter(ticket, 0)
        return None, FORGOTTEN, 0
    size_bytes = 0
    entered = False
    stage = "source"
    try:
        data = sources.read_bytes(plan.root, sample["source"])
        if sha256_hex(data) != sample["sha256"].hex():
            raise SourceError(
                f"{sample['source']} is no longer the file that was ingested (its sha256 differs); put the old file back, "
                "or give the new one another name so that it becomes a sample of its own"
            )
        stage = "decode"
        width, height = images.size_of(data)
        size_bytes = 3 * width * height
        entered = True
        budget.enter(ticket, size_bytes)
        return images.decode(data), None, size_bytes
    except Exception as error:
        if not entered:
            budget.enter(ticket, 0)
        return None, failed(stage, error), size_bytes


def _documents(plan: CorpusPlan, samples: Sequence[Mapping[str, Any]]) -> Iterator[LoadedRow]:
    there = [sample["source"] for sample in samples if not _is_forgotten(sample)]
    found = iter(sources.read_documents(plan.root, there, plan.config))
    for sample in samples:
        if _is_forgotten(sample):
            yield _row(plan, sample, image=None, problem=None)
            continue
        document = next(found)
        if isinstance(document, Exception):
            yield replace(_row(plan, sample, image=None, problem=failed("source", document)), readable=False)
        else:
            row = _row(plan, sample, image=None, problem=None)
            yield replace(row, columns={**row.columns, **document})


def _is_forgotten(sample: Mapping[str, Any]) -> bool:
    """Whether a row of a samples file was forgotten: every other has the sha256 of its source."""
    return sample["sha256"] is None


def _row(
    plan: CorpusPlan, sample: Mapping[str, Any], *, image: np.ndarray | None, problem: Outcome | None
) -> LoadedRow:
    if _is_forgotten(sample):
        row, key = sample["row"], sample["key"]
        return LoadedRow(row=row, key=key, uri="", columns={}, image=None, problem=FORGOTTEN, readable=False)
    columns = {name: value for name, value in sample.items() if name not in SAMPLE_COLUMNS}
    uri = sources.uri(plan.root, sample["source"])
    return LoadedRow(row=sample["row"], key=sample["key"], uri=uri, columns=columns, image=image, problem=problem)
