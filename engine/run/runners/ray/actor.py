"""Makes the worker an actor of Ray, and holds what the driver knows of each; items, results and signs of life pass."""

import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray

from engine.plan.corpus import CorpusPlan
from engine.plan.items import Beat, FitItem, ItemResult, WorkItem
from engine.run.runners.pools import Pool
from engine.run.runners.turns import Turns
from engine.work.fit import fit
from engine.work.inputs import WorkerSettings
from engine.work.worker import Worker
from manifests.log.actions import TokenizerAdded

# What all items of a corpus have in common: it lies in Ray's store once, and items name it.
Shared = tuple[CorpusPlan, Mapping[str, TokenizerAdded]]
FitStep = tuple[str, int, int, Mapping[str, float]]


class RayWorker:
    """Runs a worker in an actor: one item is at work, a second one fetches its bytes ahead until the first is only written.

    Other threads answer beside them.
    """

    def __init__(self, workspace: str, settings: WorkerSettings) -> None:
        self._worker: Worker | None = None
        self._reason: Exception | None = None
        self._stopped = False
        self._beat: Beat | None = None
        self._fit: FitStep | None = None
        self._turns = Turns()
        try:
            import modmill

            modmill.check_packages()
            # The first array makes pyarrow import pandas, if that is installed: here, not within the first item.
            pa.array(np.zeros(1))
            self._worker = Worker(workspace, settings, own_process=True)
        except Exception as error:
            # Told by `ready`, so that a run ends with the reason and not with a dead actor.
            self._reason = error

    @ray.method(concurrency_group="side")
    def ready(self) -> tuple[str, str, int, Exception | None]:
        """Returns the node, its host, the process, and why no work can be done here, if so."""
        return ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid(), self._reason

    @ray.method(concurrency_group="work")
    def work(self, item: WorkItem, shared: Shared) -> tuple[ItemResult, frozenset[str]] | None:
        """Returns the result of an item and the models held after it; None if the run was stopped before it began."""
        ticket = self._turns.take()
        plan, tokenizers = shared
        whole = replace(item, plan=plan, tokenizers=tokenizers)

        def label() -> Callable[[], ItemResult] | None:
            return None if self._stopped else self._own().label(whole, self._set_beat)

        try:
            result = self._turns.label(ticket, lambda: self._own().prefetch(whole), label)
            return None if result is None else (result, self._own().models.held)
        finally:
            beat = self._beat
            if beat is not None and beat.item == whole.name:
                self._beat = None

    @ray.method(concurrency_group="work")
    def fit(self, item: FitItem) -> TokenizerAdded:
        def on_step(step: int, steps: int, losses: Mapping[str, float]) -> None:
            self._fit = (item.name, step, steps, losses)

        try:
            return fit(item, self._own(), on_step)
        finally:
            self._fit = None

    @ray.method(concurrency_group="side")
    def beat(self) -> tuple[Beat | None, FitStep | None]:
        """Returns the last sign of life of the item at work, and the step of the fit."""
        return self._beat, self._fit

    @ray.method(concurrency_group="side")
    def stop(self) -> None:
        """Ends what is at work in order; begins nothing that waits."""
        self._stopped = True

    def _own(self) -> Worker:
        if self._worker is None:
            raise RuntimeError(f"the worker did not start: {self._reason}")
        return self._worker

    def _set_beat(self, beat: Beat) -> None:
        self._beat = beat


ACTOR_CLASS: Any = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"work": 2, "side": 1})(RayWorker)  # pyright: ignore[reportCallIssue] the stub knows no runtime type of actors

# What came of a call: its kind, the actor, the item if there is one, the result or the error.
Answer = tuple[str, "Actor", Any, Any, BaseException | None]


@dataclass(eq=False)
class Actor:
    """Holds the driver's side of one actor. `node` is known once ready; of one in doubt Ray will know whether it is dead.

    `items` are those it was given: the first is at work, or only written by now; `seen_at` is the one that its last sign of
    life was about.
    """

    pool: Pool
    name: str
    handle: Any
    answer: Callable[[Answer], None]
    node: str = ""
    state: Literal["starting", "ready", "doubted", "gone"] = "starting"
    items: deque[Any] = field(default_factory=deque)
    held: frozenset[str] = frozenset()
    seen_at: str = ""
    asking: bool = False
    asked_at: float = 0.0

    def call(self, method: str, *arguments: Any, kind: str = "", item: Any = None) -> None:
        """Calls a method; the answer comes as one of `kind` (the method's name unless said), on a thread of Ray's."""

        def told(future: Any) -> None:
            error = future.exception()
            self.answer((kind or method, self, item, None if error else future.result(), error))

        getattr(self.handle, method).remote(*arguments).future().add_done_callback(told)

    def kill(self) -> None:
        self.state = "gone"
        ray.kill(self.handle)
