"""Leads items of one kind through the actors: hands them out, hears answers, asks for signs of life, sees to the dead."""

import logging
import time
from typing import Any, Literal

from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError, RuntimeEnvSetupError

from engine.plan.items import FitItem, WorkItem
from engine.progress.progress import Progress
from engine.run.runners.queue import ItemQueue
from engine.run.runners.ray.actor import Actor, Answer
from engine.run.runners.ray.crew import Crew
from engine.run.runners.strikes import WHY, Cause, Strikes, begun, stops_the_run, then_words
from engine.work import marks
from manifests.errors import ModmillError
from manifests.store.storage import Storage

_log = logging.getLogger(__name__)
# A worker is asked for a sign of life so often, and all of them together at most so often.
_BEAT_S = 2.0
_BEATS_A_SECOND = 20


class RayLoop:
    """Holds items of one kind on their way, as `drive` asks for it; `method` is what an actor does with them."""

    def __init__(
        self,
        method: Literal["fit", "work"],
        queue: ItemQueue[WorkItem] | ItemQueue[FitItem],
        crew: Crew,
        progress: Progress,
        strikes: Strikes,
        storage: Storage,
        run: str,
    ) -> None:
        self.done: list[tuple[Any, Any]] = []
        self._method = method
        self._queue = queue
        self._crew = crew
        self._progress = progress
        self._strikes = strikes
        self._storage = storage
        self._run = run
        self._draining = False

    @property
    def busy(self) -> list[Actor]:
        """Returns the actors that have items."""
        return [actor for actor in self._crew.actors if actor.items]

    @property
    def at_work(self) -> int:
        return len(self.busy)

    @property
    def is_over(self) -> bool:
        return not self.busy and (self._draining or self._queue.exhausted)

    def hand_out(self) -> None:
        """Sees to it that there are as many actors as are wanted, and gives items to those that are ready for one."""
        loads = {name: self._queue.waiting(name) for name in self._crew.pools}
        for actor in self.busy:
            loads[actor.pool.name] += len(actor.items)
        self._crew.tend(loads, self._progress)
        ready: dict[str, list[Actor]] = {}
        for actor in self._crew.actors:
            if actor.state == "ready":
                ready.setdefault(actor.pool.name, []).append(actor)
        for pool, actors in ready.items():
            for actor in actors:
                if not actor.items:
                    self._give(actor, pool)
            # Towards the end an item is kept for whoever is free first.
            if self._method == "work" and self._queue.waiting(pool) > len(actors):
                for actor in actors:
                    if len(actor.items) == 1 and not actor.items[0].attempt.alone:
                        self._give(actor, pool)

    def hear(self, timeout_s: float) -> None:
        """Sees to the answers that came, and asks for signs of life."""
        self._ask()
        for answer in self._crew.hear(timeout_s):
            self._hear(answer)

    def drain(self) -> None:
        self._draining = True
        for actor in self.busy:
            actor.call("stop")

    # -- inside -------------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Asks workers that were not asked of late for a sign of life; their answers come when they come."""
        busy = self.busy
        moment = time.monotonic()
        every_s = max(_BEAT_S, len(busy) / _BEATS_A_SECOND)
        for actor in busy:
            if actor.state == "ready" and not actor.asking and moment - actor.asked_at >= every_s:
                actor.asking, actor.asked_at = True, moment
                actor.call("beat")

    def _hear(self, answer: Answer) -> None:
        """Does what an answer asks for."""
        kind, actor, item, result, error = answer
        if actor.state == "gone":
            return
        if kind == "ready":
            self._crew.is_ready(actor, result, error)
        elif kind == "beat":
            actor.asking = False
            if error is None:
                self._show(actor, *result)
        elif kind == "doubt":
            self._died(actor, error or ActorUnavailableError("it could not be reached for a while", None))
        elif kind == "stop":
            if isinstance(error, RayTaskError):
                raise error
        elif error is None:
            self._finished(actor, item, result)
        else:
            self._failed(actor, item, error)

    def _give(self, actor: Actor, pool: str) -> None:
        item = self._queue.next(pool, actor.held, alone=not actor.items)
        if item is None:
            return
        if isinstance(item, FitItem):
            actor.items.append(item)
            actor.call("fit", item, item=item)
            return
        if not actor.items:
            self._progress.started(item, actor.name)
        self._crew.give(actor, item)

    def _finished(self, actor: Actor, item: Any, result: Any) -> None:
        actor.items.remove(item)
        if self._strikes.done(item):
            marks.clear(self._storage, self._run, item.name)
        if self._method == "fit":
            self.done.append((item, result))
            return
        if result is None:
            # It waited in a worker when the run was interrupted.
            self._queue.put_back(item)
            return
        outcome, actor.held = result
        self.done.append((item, outcome))
        if actor.items:
            self._progress.started(actor.items[0], actor.name)

    def _failed(self, actor: Actor, item: Any, error: BaseException) -> None:
        """Sees to a call for an item that ended in an error: the worker raised, or is out of reach, or is dead."""
        if isinstance(error, RayTaskError):
            self._raised(actor, item, error)
        elif isinstance(error, ActorUnavailableError):
            self._doubt(actor)
        elif isinstance(error, RayActorError | OutOfMemoryError | RuntimeEnvSetupError):
            # Of a worker in doubt Ray's last word is awaited.
            if actor.state != "doubted":
                self._died(actor, error)
        else:
            raise ModmillError(f"{item.name}: Ray failed: {type(error).__name__}: {error}") from error

    def _raised(self, actor: Actor, item: Any, error: RayTaskError) -> None:
        """Sees to an item whose worker raised: it is done again, or fails for good."""
        actor.items.remove(item)
        # What the worker raised, with the driver's own class, so that the command line knows it.
        cause = error.cause if isinstance(error.cause, Exception) else error
        if self._method == "fit" or stops_the_run(cause):
            raise cause
        _log.warning("%s: %s raised %s: %s", item.name, actor.name, type(cause).__name__, cause)
        _log.debug("%s", error)
        self._again(item, self._strikes.raised(item, cause))
        if "CUDA error" in str(cause):
            # Whatever such a process does on its GPU from here on fails.
            self._give_back(actor)
            self._crew.remove(actor)
            self._crew.hurry()

    def _doubt(self, actor: Actor) -> None:
        """Doubts an actor that does not answer: its node is lost, or the network was for a moment. Ray will know in seconds."""
        if actor.state != "doubted":
            actor.state = "doubted"
            actor.call("ready", kind="doubt")

    def _died(self, actor: Actor, error: BaseException) -> None:
        """Sees to a dead actor: the item at work pays for it, the one that waited behind it or was only written does not."""
        cause = self._crew.cause(actor, error)
        _log.debug("worker %s: %s", actor.name, error)
        at_work, mark = self._to_blame(actor, cause)
        self._give_back(actor)
        self._crew.remove(actor)
        self._crew.hurry()
        if at_work is None:
            return
        why = WHY[cause]
        if mark is not None and mark.reason == "deadline":
            why = "a batch took longer than engine.batch_deadline_s"
        outcome = self._strikes.died(at_work, cause, why, mark)
        strikes = at_work.attempt.strikes if isinstance(outcome, Exception) else outcome.attempt.strikes
        self._progress.strike(at_work, actor.name, why, strikes, then_words(at_work, outcome))
        if self._method == "fit" and isinstance(outcome, Exception):
            raise ModmillError(f"fit of {outcome}") from error
        self._again(at_work, outcome)

    def _to_blame(self, actor: Actor, cause: Cause) -> tuple[Any, marks.Mark | None]:
        """Takes the item that was at work from an actor that died; returns it with the mark that it left, if they are there."""
        if not actor.items:
            return None, None
        # While the first of two items is written the second may be labeled, so that the first in line is not always the one
        # that was at work. A mark tells: an item past its deadline leaves one, and an item with strikes, which runs alone.
        # Else the last sign of life tells. If the node left the cluster no row is to blame, and no mark is read.
        found: dict[str, marks.Mark | None] = {}
        for item in actor.items if cause != "left" else ():
            found[item.name] = marks.read(self._storage, self._run, item.name)
            marks.clear(self._storage, self._run, item.name)
        marked = [item for item in actor.items if found.get(item.name) is not None]
        seen = [item for item in actor.items if item.name == actor.seen_at]
        at_work = (*marked, *seen, actor.items[0])[0]
        actor.items.remove(at_work)
        return at_work, found.get(at_work.name)

    def _give_back(self, actor: Actor) -> None:
        while actor.items:
            self._queue.put_back(begun(actor.items.pop()))

    def _again(self, item: Any, outcome: Any) -> None:
        if isinstance(outcome, Exception):
            self._strikes.done(item)
            self.done.append((item, outcome))
        else:
            self._queue.put_back(outcome)

    def _show(self, actor: Actor, beat: Any, fit: Any) -> None:
        if beat is not None:
            actor.seen_at = beat.item
            self._progress.beat(actor.name, beat)
        if fit is not None:
            self._progress.fit_step(*fit)
