"""Keeps the actors of a run: starts as many as are wanted and fit, tells dead ones apart, and lets them go."""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from engine.plan.items import WorkItem
from engine.progress.progress import Progress
from engine.run.runners.pools import Pool, has_room, wanted_workers
from engine.run.runners.ray.actor import ACTOR_CLASS, Actor, Answer
from engine.run.runners.strikes import Cause
from manifests import units
from manifests.errors import ConfigError, ModmillError

_log = logging.getLogger(__name__)
_TEND_S = 5.0
# A head that is started again answers within it; after 60 s without one Ray would end this process without a word.
_ANSWER_S = 40.0
_MOST_FAILED_STARTS = 3
_WAIT_S = 15.0
_SAY_AGAIN_S = 60.0
_LOW_MEMORY = ("node running low on memory", "memory usage threshold")


class Crew:
    """Holds the actors of all pools, and the answers to their calls."""

    def __init__(self, workspace: str, known: Mapping[str, Pool]) -> None:
        self.pools = known
        self.actors: list[Actor] = []
        # Whether the cluster is gone: then nothing can be asked of it any more.
        self.lost = False
        self._here = ray.get_runtime_context().get_node_id()
        self._workspace = workspace
        self._answers: SimpleQueue[Answer] = SimpleQueue()
        self._shared: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self._count = 0
        self._failed_starts: dict[str, int] = {}
        self._tend_at = 0.0
        self._say_at = 0.0

    def check_room(self) -> None:
        """Raises ConfigError if a pool asks for what no node has, and no other node will join."""
        nodes = self.nodes()
        for pool in self.pools.values():
            if not has_room(pool, nodes):
                raise ConfigError(
                    f"{pool}: a worker needs {_amounts(pool.needs)}"
                    + (f" and a node with the labels {dict(pool.node_labels)}" if pool.node_labels else "")
                    + f", but this machine has {_amounts(nodes[0]['Resources'])}; ask for less in the section engine, or run "
                    "on a cluster with --ray ADDRESS"
                )

    def nodes(self) -> list[dict[str, Any]]:
        """Returns what Ray knows of its nodes. Raises ModmillError if the cluster is gone, before Ray ends this process."""
        asked: Future[list[dict[str, Any]]] = Future()
        threading.Thread(target=_ask_nodes, args=(asked,), name="nodes", daemon=True).start()
        try:
            found = asked.result(_ANSWER_S)
        except Exception as error:
            self.lost = True
            raise ModmillError(
                f"the Ray cluster does not answer any more ({_brief(error)}); what is done is committed: see to its head node, "
                "and the same command goes on"
            ) from error
        if not any(node["Alive"] and node["NodeID"] == self._here for node in found):
            self.lost = True
            raise ModmillError(
                "the Ray node that this run was started on is dead; what is done is committed: start Ray there again, and the "
                "same command goes on"
            )
        return found

    def tend(self, loads: Mapping[str, int], progress: Progress, *, now: bool = False) -> None:
        """Starts the actors that are wanted and lets go of those that have nothing to do, every few seconds or at once.

        `loads` is how many items each pool has to do.
        """
        moment = time.monotonic()
        if moment < self._tend_at and not now:
            return
        self._tend_at = moment + _TEND_S
        nodes = self.nodes()
        wanted = wanted_workers(self.pools, nodes, loads)
        for name, pool in self.pools.items():
            mine = [actor for actor in self.actors if actor.pool.name == name]
            spare = [actor for actor in mine if not actor.items and actor.state != "doubted"]
            for actor in sorted(spare, key=lambda actor: actor.state == "ready")[: max(0, len(mine) - wanted[name])]:
                self.remove(actor)
            for _ in range(wanted[name] - len(mine)):
                self._start(pool)
            ready = sum(actor.state == "ready" for actor in mine)
            if loads.get(name):
                progress.workers(name, ready, wanted[name])
            if wanted[name] and not ready:
                self._tell_waiting(pool, nodes, moment, progress)

    def hear(self, timeout_s: float) -> list[Answer]:
        """Returns answers that came, after waiting for the first at most so long."""
        found: list[Answer] = []
        with contextlib.suppress(Empty):
            found.append(self._answers.get(timeout=timeout_s))
            while True:
                found.append(self._answers.get_nowait())
        return found

    def give(self, actor: Actor, item: WorkItem) -> None:
        """Gives an actor an item, after what it has; what items have in common is put into Ray's store once."""
        key = (id(item.plan), *(known.digest for known in item.tokenizers.values()))
        if key not in self._shared:
            # The plan is kept as well, so that no other one gets its id.
            self._shared[key] = (ray.put((item.plan, item.tokenizers)), item.plan)
        shared, _ = self._shared[key]
        actor.items.append(item)
        actor.call("work", _without_shared(item), shared, item=item)

    def is_ready(self, actor: Actor, result: Any, error: BaseException | None) -> None:
        """Hears that an actor is ready, or does not start. Raises ConfigError if no actor of its pool ever would."""
        if error is None:
            actor.node, host, process, reason = result
            actor.name = f"{actor.name}@{host}"
            if reason is not None:
                raise ConfigError(f"{actor.pool}: no worker starts on node {host}: {type(reason).__name__}: {reason}")
            _log.info("worker %s is ready, process %d", actor.name, process)
            actor.state = "ready"
            self._failed_starts[actor.pool.name] = 0
            return
        self.remove(actor)
        self._tend_at = 0.0
        if isinstance(error, RuntimeEnvSetupError | RayTaskError):
            raise ConfigError(f"{actor.pool}: its workers do not start: {_brief(error)}") from error
        if self.cause(actor, error) == "left":
            return
        count = self._failed_starts[actor.pool.name] = self._failed_starts.get(actor.pool.name, 0) + 1
        if count >= _MOST_FAILED_STARTS:
            raise ModmillError(
                f"{actor.pool}: {count} workers in a row died while they started: {_brief(error)}; `modmill doctor` tells "
                "what is missing on this machine, `modmill doctor --ray ADDRESS` on a cluster's nodes"
            ) from error

    def cause(self, actor: Actor, error: BaseException) -> Cause:
        """Tells why an actor died."""
        text = str(error)
        if isinstance(error, OutOfMemoryError) or any(phrase in text for phrase in _LOW_MEMORY):
            return "memory"
        if isinstance(error, NodeDiedError | ActorUnavailableError) or "node has died" in text:
            return "left"
        if isinstance(error, RayActorError) and error.preempted:
            return "left"
        alive = {node["NodeID"] for node in self.nodes() if node["Alive"]}
        return "left" if actor.node and actor.node not in alive else "died"

    def remove(self, actor: Actor) -> None:
        """Ends an actor, if it has not ended yet, and forgets it."""
        if actor.state != "gone":
            self.actors.remove(actor)
            with contextlib.suppress(Exception):
                actor.kill()

    def hurry(self) -> None:
        """Sees to it that the next `tend` is not put off."""
        self._tend_at = 0.0

    def _start(self, pool: Pool) -> None:
        self._count += 1
        handle = ACTOR_CLASS.options(**pool.options).remote(self._workspace, pool.settings)
        actor = Actor(pool, f"{pool.name or 'worker'}-{self._count}", handle, self._answers.put)
        self.actors.append(actor)
        actor.call("ready")

    def _tell_waiting(self, pool: Pool, nodes: list[dict[str, Any]], moment: float, progress: Progress) -> None:
        if not self._say_at:
            self._say_at = moment + _WAIT_S
        if moment < self._say_at:
            return
        self._say_at = moment + _SAY_AGAIN_S
        there: dict[str, float] = {}
        for node in nodes:
            for name, amount in node["Resources"].items() if node["Alive"] else ():
                there[name] = there.get(name, 0) + amount
        labels = f" on a node with the labels {dict(pool.node_labels)}" if pool.node_labels else ""
        progress.say(
            f"{pool} waits for its first worker: each needs {_amounts(pool.needs)}{labels}; the cluster has "
            f"{_amounts(there)} in all, maybe in use by others"
        )


def _ask_nodes(asked: "Future[list[dict[str, Any]]]") -> None:
    try:
        asked.set_result(ray.nodes())
    except Exception as error:
        asked.set_exception(error)


def _without_shared(item: WorkItem) -> WorkItem:
    return replace(item, plan=None, tokenizers={})  # pyright: ignore[reportArgumentType] put back by the actor


def _amounts(resources: Mapping[str, float]) -> str:
    found = [f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU")]
    return ", ".join([*found, f"{units.memory(resources.get('memory', 0))} of memory"])


def _brief(error: BaseException) -> str:
    """Returns the last line that says something: Ray tells there what happened on the other side."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
