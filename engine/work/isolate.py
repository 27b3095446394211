"""Finds the rows that fail by bisecting their batch, so that the others of it are made.

Memory that runs out is no row's fault: the rows a call are halved first, and stay so.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.work.machine import loaded_torch
from engine.work.rows import ABSENT, Outcome, failed
from manifests.formats.shards import Status


@dataclass
class MicroBatch:
    """Holds how many rows a call may have: as configured until memory runs out, then half of it, and half again."""

    size: int

    def halve(self) -> bool:
        """Halves it; returns False if a call has one row only."""
        if self.size <= 1:
            return False
        self.size //= 2
        return True


def windows(places: Sequence[int], batch: int, size: int) -> Iterator[tuple[int, list[int]]]:
    """Yields the calls of `size` rows in which places of a batch lie: the first place of each, and those that are in it."""
    for first in range(0, batch, size):
        if some := [place for place in places if first <= place < first + size]:
            yield first, some


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether a call failed because memory ran out, of this machine or of its device."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def free_memory() -> None:
    """Gives back what a failed call left behind."""
    gc.collect()
    torch = loaded_torch()
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def isolate(
    call: Callable[[Sequence[int]], Sequence[Any]], rows: Sequence[int], stage: str, micro: MicroBatch | None = None
) -> dict[int, Outcome]:
    """Returns the outcomes of a batch, row by row, even if rows in it raise.

    `call` is given rows of the batch (and leaves all others blank) and returns a value for each of them, None for
    absent. If it raises, the batch is halved until the rows that cause it stand alone. If memory runs out, `micro` is
    halved, which `call` is to obey, and it is called again; in calls of one row that is the row's failure.
    """
    if not rows:
        return {}
    problem: Exception
    while True:
        try:
            values = call(rows)
            if len(values) != len(rows):
                raise ValueError(f"{len(values)} results for {len(rows)} rows")
            return {
                row: ABSENT if value is None else Outcome(Status.OK, value)
                for row, value in zip(rows, values, strict=True)
            }
        except Exception as error:
            problem = error
        if not is_out_of_memory(problem):
            break
        # Outside of `except`: the traceback holds what the call had allocated.
        problem = problem.with_traceback(None)
        free_memory()
        if micro is None or not micro.halve():
            break
    if len(rows) == 1:
        return {rows[0]: failed(stage, problem)}
    half = len(rows) // 2
    return {**isolate(call, rows[:half], stage, micro), **isolate(call, rows[half:], stage, micro)}
