"""Decides how an item goes on whose worker died: again with marks, then row by row, then without the rows that kill.

A policy: the driver tells what happened, and gets the item as it is to be done again, or the error it failed with.
"""

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from engine.plan.items import Attempt, Failure, FitItem, WorkItem
from engine.run.runners.protocol import Item
from engine.work.marks import Mark
from manifests.errors import DeadlineExceeded, ModmillError, UserError

# left: its node left the cluster, which tells nothing of the item; memory: too much memory was in use on its node.
Cause = Literal["died", "memory", "left"]

WHY: Mapping[Cause, str] = {
    "died": "its process ended",
    "memory": "Ray ended it, its node was low on memory",
    "left": "its node left the cluster",
}
_MOST_LEFT = 20
_MOST_STUCK = 4
_MOST_KILLERS = 16
# Deaths at ever other rows are no row's doing.
_MOST_DEATHS = 64
# A row that dies alone may die by chance (someone kills the process); twice is no chance.
_SURE_AT = 2
_CLASSES = {"died": "WorkerDied", "memory": "OutOfMemory", "deadline": "DeadlineExceeded"}
_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass
class _Deaths:
    """Counts what became of one item so far.

    left      times that its node left the cluster
    stuck     deaths in a row that taught nothing: without a mark, or at the same rows as the one before
    raised    errors that its worker raised
    at_hand   the rows of the last mark
    alone     deaths by row that was at hand alone
    """

    left: int = 0
    count: int = 0
    stuck: int = 0
    raised: int = 0
    at_hand: tuple[int, ...] | None = None
    alone: dict[int, int] = field(default_factory=dict)


class Strikes:
    """Counts what happens to items and says how each goes on. `batches` is the rows a call of each pool."""

    def __init__(self, batches: Mapping[str, int]) -> None:
        self._batches = batches
        self._known: dict[str, _Deaths] = {}

    def done(self, item: Item) -> bool:
        """Forgets an item that is done; returns whether there was anything to forget, such as a mark of it."""
        return self._known.pop(item.name, None) is not None

    def raised(self, item: Item, error: Exception) -> Item | Exception:
        """Returns the item to be done again, or the error: what was raised once may have been the worker, or the store."""
        deaths = self._known.setdefault(item.name, _Deaths())
        deaths.raised += 1
        return begun(item) if deaths.raised == 1 else error

    def died(self, item: Item, cause: Cause, why: str, mark: Mark | None) -> Item | Exception:
        """Returns the item as it is to be done again after its worker died, or the error it fails with for good."""
        deaths = self._known.setdefault(item.name, _Deaths())
        if cause == "left":
            deaths.left += 1
            if deaths.left > _MOST_LEFT:
                return _lost(item, deaths.left, "each time with its node", why)
            return begun(item)
        deaths.count += 1
        attempt = item.attempt
        batch = attempt.batch or self._batches.get(item.pool, 1)
        # Memory depends on how many rows a call has, not on which: no row is suspected yet.
        if cause == "memory" and batch > 1:
            return _again(item, attempt, batch=batch // 2)
        # The first death of an item leaves no mark, as none was asked for. From then on a death is progress only if its mark
        # names other rows than the one before; too many without progress are the item's, or the machine's, own fault.
        at_hand = None if mark is None else mark.rows
        deaths.stuck = deaths.stuck + 1 if at_hand is None or at_hand == deaths.at_hand else 0
        deaths.at_hand = at_hand
        if mark is not None and len(mark.rows) == 1:
            row = mark.rows[0]
            deaths.alone[row] = deaths.alone.get(row, 0) + 1
            # A row that was no suspect before may have been at hand alone by chance, as the last of its part.
            known = row in attempt.suspects
            if known and (deaths.alone[row] >= _SURE_AT or mark.reason == "deadline"):
                deaths.stuck = 0
                return self._without(item, row, mark, cause, why)
        if deaths.stuck >= _MOST_STUCK or deaths.count >= _MOST_DEATHS:
            return _lost(item, deaths.count, "and not at one row that could be left out", why)
        suspects = {*attempt.suspects, *(mark.rows if mark is not None else ())}
        return _again(item, attempt, strikes=attempt.strikes + 1, suspects=tuple(sorted(suspects)))

    def _without(self, item: Item, row: int, mark: Mark, cause: Cause, why: str) -> Item | Exception:
        attempt = item.attempt
        if len(attempt.killers) >= _MOST_KILLERS:
            return _lost(item, self._known[item.name].count, f"at more than {_MOST_KILLERS} of its rows", why)
        decode = mark.doing == "decode"
        place = "being decoded" if decode else f"at {mark.doing}"
        failure = Failure(
            stage="decode" if decode else "label",
            class_name=_CLASSES["deadline" if mark.reason == "deadline" else cause],
            message=f"the worker died with this row alone {place}"
            if mark.reason is None
            else f"this row alone took longer {place} than engine.batch_deadline_s",
        )
        suspects = tuple(other for other in attempt.suspects if other != row)
        return _again(item, attempt, strikes=1, suspects=suspects, killers={**attempt.killers, row: failure})


def then_words(before: Item, outcome: Item | Exception) -> str:
    """Tells people how an item goes on after its worker died, as `Strikes.died` decided."""
    if isinstance(outcome, Exception):
        return "it fails as a whole"
    old, new = before.attempt, outcome.attempt
    if len(new.killers) > len(old.killers):
        return f"done again without row {next(row for row in new.killers if row not in old.killers)}, at which it died alone"
    if new.batch is not None and new.batch != old.batch:
        return f"done again, {new.batch} rows a call at most"
    if new.suspects:
        return f"done again, {len(new.suspects)} row{'s' * (len(new.suspects) > 1)} of it one by one"
    return "done again" if new.strikes == old.strikes else "done again, noting each batch it begins"


def stops_the_run(error: BaseException) -> bool:
    """Tells whether a person must see to an error first: a mistake, a missing package, a full disk, a hang."""
    full = isinstance(error, OSError) and error.errno in _SPACE
    return full or isinstance(error, UserError | ImportError | DeadlineExceeded)


def begun(item: Item) -> Item:
    """Returns an item to be done again that a worker may have begun: what that left aside is looked for."""
    return item if item.attempt.resumes else _again(item, item.attempt)


def _again(item: Item, attempt: Attempt, **changed: object) -> Item:
    return replace(item, attempt=replace(attempt, resumes=True, **changed))  # pyright: ignore[reportArgumentType]


def _lost(item: WorkItem | FitItem, times: int, how: str, why: str) -> ModmillError:
    return ModmillError(
        f"{item.name}: its worker died {times} times, {how} ({why}); it stays to be done: lower engine.batch, "
        "engine.queue_mb or engine.workers, or look for a source that kills the process, and run again"
    )
