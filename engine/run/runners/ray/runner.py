"""Does work items on Ray: actors of one class, each a worker; only items and results cross between them, never pixels.

Ray is imported in this folder and nowhere else. The driver hands out two items a worker, the second one
for its bytes to be fetched ahead, and hands out again what a dead worker had, so that every attempt is counted.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import ray

from engine.pipeline.sections import EngineConfig
from engine.plan.items import FitItem, WorkItem
from engine.progress.progress import Progress
from engine.run.runners.driver import drive
from engine.run.runners.pools import pool_of_fit, pools
from engine.run.runners.protocol import Pairs
from engine.run.runners.queue import ItemQueue, needed_models
from engine.run.runners.ray.address import address_of, check_listens, out_of_reach
from engine.run.runners.ray.crew import Crew
from engine.run.runners.ray.loop import RayLoop
from engine.run.runners.strikes import Strikes
from engine.work.inputs import WorkerSettings
from engine.work.machine import cores
from manifests.errors import ModmillError
from manifests.log.actions import TokenizerAdded
from manifests.store.storage import open_storage

_log = logging.getLogger(__name__)
_MOST_STARTS = 3
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class RayRunner:
    """Does items on actors of a Ray cluster: one of this machine's own unless an address is given.

    The address is `engine.ray_address`, else the variable RAY_ADDRESS, which Ray sets inside its jobs.
    """

    def __init__(self, workspace: str, settings: WorkerSettings, engine: EngineConfig) -> None:
        self._storage = open_storage(workspace)
        self._run = settings.run
        self._engine = engine
        self._empty = tempfile.TemporaryDirectory(prefix="modmill-ray-")
        self._started = not ray.is_initialized()
        address = address_of(engine)
        if self._started:
            start_ray(address, engine, self._empty.name)
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        # To a Ray that runs in this process already nothing can be added for the whole job.
        late = {} if self._started else engine.runtime_env
        self._crew = Crew(workspace, pools(engine, settings, has_gpus=has_gpus, runtime_env=late))
        if self._started and not address:
            self._crew.check_room()

    def fit(self, items: Sequence[FitItem], progress: Progress) -> Iterator[tuple[FitItem, TokenizerAdded]]:
        """Does fits, one a worker."""
        pooled = [replace(item, pool=pool_of_fit(item, self._engine)) for item in items]
        for done in self._drive("fit", ItemQueue(pooled, lambda item: frozenset()), progress, drain_s=None):
            yield from done

    def work(self, items: Iterable[WorkItem], progress: Progress) -> Generator[Pairs, None, None]:
        return self._drive("work", ItemQueue(items, needed_models), progress, drain_s=self._engine.drain_s)

    def close(self) -> None:
        """Ends the actors, and Ray if it was started here."""
        # A cluster that is gone keeps whoever says goodbye waiting, or ends the process.
        if not self._crew.lost:
            for actor in list(self._crew.actors):
                self._crew.remove(actor)
            if self._started:
                ray.shutdown()
        self._empty.cleanup()

    def _drive(
        self,
        method: Literal["fit", "work"],
        queue: ItemQueue[WorkItem] | ItemQueue[FitItem],
        progress: Progress,
        *,
        drain_s: float | None,
    ) -> Generator[list[Any], None, None]:
        batches = {name: pool.settings.batch for name, pool in self._crew.pools.items()}
        loop = RayLoop(method, queue, self._crew, progress, Strikes(batches), self._storage, self._run)
        self._crew.hurry()
        yield from drive(loop, progress, drain_s)


def start_ray(address: str | None, engine: EngineConfig, empty: str) -> None:
    """Connects to Ray, or starts it. Raises UserError if a cluster is out of reach, ModmillError if no Ray starts."""
    if address:
        check_listens(address)
    if not sys.stdout.isatty():
        # Ray prints what became of processes, in color even into files.
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # Ray would take SIGTERM for itself and abort; ours ends a run as Ctrl-C does.
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if is_main else None
    own = {} if address else {"num_cpus": _processors(engine), "include_dashboard": False}
    for attempt in range(1, _MOST_STARTS + 1):
        try:
            ray.init(
                address=address or "local",
                runtime_env=_runtime_env(engine, empty),
                log_to_driver=False,
                logging_level=logging.ERROR,
                **own,
            )
            break
        except Exception as error:
            # Ray gives its processes 30 seconds, which a busy machine may need more of, and raises a bare Exception.
            ray.shutdown()
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            if address:
                raise out_of_reach(address, first) from error
            if attempt == _MOST_STARTS:
                raise ModmillError(
                    f"Ray did not start on this machine ({attempt} tries): {first}; run with --runner local, or see that the "
                    "machine has processors and memory to spare"
                ) from error
            _log.warning("Ray did not start (%s), trying again", first)
    if is_main:
        signal.signal(signal.SIGTERM, handler)


def _runtime_env(engine: EngineConfig, empty: str) -> dict[str, Any]:
    """Returns what workers get of this machine: by itself an empty working directory.

    Ray puts the driver's folder first on the workers' path, and a train.py in it would hide ours. In a job of Ray the job's own
    working directory is that of the workers.
    """
    job = json.loads(os.environ.get(_JOB_VARIABLE) or "{}")
    has_own = "working_dir" in (job.get("runtime_env") or {})
    return {**({} if has_own else {"working_dir": empty}), **engine.runtime_env}


def _processors(engine: EngineConfig) -> int:
    """Returns the CPUs that a Ray of this machine's own counts: at least those there are, and enough for all workers."""
    asked = [(engine.workers, engine.threads)]
    asked += [(pool.workers, pool.threads or engine.threads) for pool in engine.pools.values()]
    # A pool whose number of workers is open has one at least.
    return max(cores(), sum((workers or 1) * threads for workers, threads in asked))
