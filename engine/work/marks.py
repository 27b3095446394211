"""Writes marks: what a worker has at hand, before it touches it, so that a driver knows which rows killed a worker.

They lie in `runs/<run>/marks/`, one of an item, and are no records: replaced at every batch, removed with the item done.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from manifests.store import paths
from manifests.store.storage import Storage

# How a worker with a process of its own ends if a batch is over its deadline.
DEADLINE_EXIT = 75


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Holds the rows that were at hand, and what was done to them: `decode`, `tokenize`, or the name of a labeler."""

    rows: tuple[int, ...]
    doing: str
    reason: Literal["deadline"] | None = None


def write(storage: Storage, run: str, item: str, mark: Mark) -> None:
    """Writes an item's mark over the one before."""
    document = {"rows": list(mark.rows), "doing": mark.doing, "reason": mark.reason}
    storage.replace(paths.mark(run, item), json.dumps(document).encode())


def read(storage: Storage, run: str, item: str) -> Mark | None:
    """Returns the mark of an item; None if there is no mark that can be read."""
    try:
        document = json.loads(storage.read(paths.mark(run, item)))
        return Mark(
            rows=tuple(int(row) for row in document["rows"]), doing=document["doing"], reason=document["reason"]
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def clear(storage: Storage, run: str, item: str) -> None:
    """Removes an item's mark, if there is one."""
    storage.remove(paths.mark(run, item))


class Stopwatch:
    """Measures how long each stage takes, and each labeler; tells which stage is on, and since when."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds: dict[str, float] = dict.fromkeys(("wait", "label", "tokenize", "write"), 0.0)
        self.by_labeler: dict[str, float] = {}
        self.stage = "start"
        self.since = self.began

    @contextmanager
    def on(self, stage: str, labeler: str | None = None) -> Iterator[None]:
        """Counts the time within for this stage."""
        before = self.stage
        began = time.monotonic()
        self.stage, self.since = stage, began
        try:
            yield
        finally:
            now = time.monotonic()
            self.seconds[stage] += now - began
            if labeler is not None:
                self.by_labeler[labeler] = self.by_labeler.get(labeler, 0.0) + now - began
            self.stage, self.since = before, now

    @property
    def busy_s(self) -> float:
        """Returns the seconds of labelers and tokenizers, with the call that is on."""
        stage, since = self.stage, self.since
        now_on = time.monotonic() - since if stage in ("label", "tokenize") else 0.0
        return self.seconds["label"] + self.seconds["tokenize"] + now_on


class AtHand:
    """Holds the rows at hand in a worker, for its marks and its deadline, and times what is done with them."""

    def __init__(self, storage: Storage, run: str, item: str, *, writes: bool) -> None:
        self._storage = storage
        self._run = run
        self._item = item
        self._writes = writes
        self._mark: Mark | None = None
        self._began: float | None = None
        self.stopwatch = Stopwatch()

    def begin(self, rows: Sequence[int]) -> None:
        """Begins a batch (or a single row): it is to be decoded first."""
        self._began = time.monotonic()
        self.doing("decode", rows)

    def doing(self, what: str, rows: Sequence[int]) -> None:
        """Notes the next step, with these rows of the batch."""
        mark = Mark(rows=tuple(rows), doing=what)
        if self._writes and mark != self._mark:
            write(self._storage, self._run, self._item, mark)
        self._mark = mark

    @contextmanager
    def call(self, stage: str, rows: Sequence[int], labeler: str | None = None) -> Iterator[None]:
        """Marks and times a call of a labeler or a tokenizer with these rows."""
        self.doing(labeler or stage, rows)
        with self.stopwatch.on(stage, labeler):
            yield

    def end(self) -> None:
        """Says that no rows are at hand: none is to blame for what happens until the next batch."""
        self._began = None
        nothing = Mark(rows=(), doing="between batches")
        if self._writes and self._mark not in (None, nothing):
            write(self._storage, self._run, self._item, nothing)
            self._mark = nothing

    def finish(self) -> None:
        """Says that the item is done."""
        self.end()
        if self._writes:
            clear(self._storage, self._run, self._item)

    def overdue(self, deadline_s: float) -> Mark | None:
        """Returns what is at hand if its batch began more than `deadline_s` ago, else None."""
        began, mark = self._began, self._mark
        if began is None or mark is None or time.monotonic() - began <= deadline_s:
            return None
        return Mark(rows=mark.rows, doing=mark.doing, reason="deadline")
