"""What becomes of a row that fails: found by bisecting its batch, written to the failed file, counted against a budget.

Memory that runs out is no row's fault: the rows a call are halved first, and stay so.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.machine import loaded_torch
from manifests.errors import TooManyFailures
from manifests.shards import Status

_MESSAGE_CHARACTERS = 2000
JUDGED_FROM_ROWS = 100


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a row failed: the stage (source, decode, label, tokenize), the exception's class and message."""

    stage: str
    class_name: str
    message: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one label or token row: a value where status is OK, a failure where FAILED."""

    status: Status
    value: Any = None
    failure: Failure | None = None


ABSENT = Outcome(Status.ABSENT)
FORGOTTEN = Outcome(Status.FORGOTTEN)


def failed(stage: str, error: Exception) -> Outcome:
    """The outcome of a row that raised."""
    message = str(error)[:_MESSAGE_CHARACTERS]
    return Outcome(Status.FAILED, failure=Failure(stage, type(error).__name__, message))


@dataclass
class MicroBatch:
    """How many rows a call may have: as configured until memory runs out, then half of it, and half again."""

    size: int

    def halve(self) -> bool:
        """Halves it; False where a call has one row only."""
        if self.size <= 1:
            return False
        self.size //= 2
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a call failed for lack of memory, of this machine or of its device."""
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
    """Outcomes of a batch, row by row, even where rows in it raise.

    `call` is given rows of the batch (and leaves all others blank) and returns a value for each of them, None for
    absent. Where it raises, the batch is halved until the rows that cause it stand alone. Where it lacks memory, `micro`
    is halved, which `call` is to obey, and it is called again; in calls of one row, lack of memory is the row's failure.
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


class FailureBudget:
    """Counts label and token rows; raises once too many failed. Judged from a hundred rows on."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.rows = 0
        self.failed = 0

    def add(self, rows: int, failed_rows: int) -> None:
        """Counts the rows of finished shards. Raises TooManyFailures."""
        self.rows += rows
        self.failed += failed_rows
        if self.rows >= JUDGED_FROM_ROWS and self.failed > self.most * self.rows:
            raise TooManyFailures(
                f"{self.failed:,} of {self.rows:,} rows failed, more than max_failed_fraction = {self.most:g} allows; ask "
                '`modmill sql WORKSPACE "SELECT class, message, count(*) FROM failures GROUP BY ALL"` why, then mend the '
                "source or raise engine.max_failed_fraction, and run again: what is done stays done"
            )
