"""Work items on Ray: one class of actors, each a worker; only items and records cross the object store, never pixels.

Ray is imported here and nowhere above `engine`. The driver hands out items one by one and resubmits those whose worker
died, so that every attempt is counted.
"""

import logging
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from engine.fit import fit
from engine.plan import FitItem
from engine.progress import Progress
from engine.work import WorkItem
from engine.worker import Worker, WorkerSettings
from manifests.actions import ShardAdded, TokenizerAdded
from manifests.errors import ModmillError

_log = logging.getLogger(__name__)
_POLL_S = 1.0
# A worker that dies twice on an item may be unlucky; the third time it is the item.
_MOST_DEATHS = 3
_MOST_STARTS = 3


def _start_ray(address: str | None, empty: str, options: Mapping[str, Any]) -> None:
    """Starts Ray, or connects to it. Raises ModmillError where that fails."""
    # Ray would take SIGTERM for itself and abort; ours ends a run as Ctrl-C does.
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if is_main else None
    for attempt in range(1, _MOST_STARTS + 1):
        try:
            ray.init(
                address=address or "local",
                # Ray puts the driver's folder first on the workers' path, where a train.py would hide ours: an empty
                # working directory keeps them to the installed packages.
                runtime_env={"working_dir": empty},
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
            break
        except Exception as error:
            # Ray gives its processes 30 seconds, which a busy machine may need more of, and raises a bare Exception.
            ray.shutdown()
            if address or attempt == _MOST_STARTS:
                where = f"at {address}" if address else f"on this machine ({attempt} tries)"
                raise ModmillError(
                    f"Ray did not start {where}: {str(error).splitlines()[0]}; run with --runner local, or see that the "
                    "machine has processors and memory to spare"
                ) from error
            _log.warning("Ray did not start (%s), trying again", str(error).splitlines()[0])
    if is_main:
        signal.signal(signal.SIGTERM, handler)


class _RayWorker:
    """A worker in an actor; a second thread answers `progress` while the first works."""

    def __init__(self, workspace: str, settings: WorkerSettings) -> None:
        self._worker = Worker(workspace, settings)
        self._rows = 0
        self._fit: tuple[int, int, Mapping[str, float]] | None = None

    def work(self, item: WorkItem) -> list[ShardAdded]:
        try:
            return self._worker.work(item, self._set_rows)
        finally:
            self._rows = 0

    def fit(self, item: FitItem) -> TokenizerAdded:
        try:
            return fit(item, self._worker, self._set_fit)
        finally:
            self._fit = None

    def progress(self) -> tuple[int, tuple[int, int, Mapping[str, float]] | None]:
        """Rows done of the work item at hand, and the step of the fit at hand."""
        return self._rows, self._fit

    def _set_rows(self, rows: int) -> None:
        self._rows = rows

    def _set_fit(self, step: int, steps: int, losses: Mapping[str, float]) -> None:
        self._fit = (step, steps, losses)


class RayRunner:
    """Runs items on an actor pool of a Ray cluster: one of this machine's own unless an address is given."""

    def __init__(self, workspace: str, settings: WorkerSettings, workers: int, address: str | None = None) -> None:
        self._arguments = (workspace, settings)
        self._actors: list[Any] = []
        self._started = not ray.is_initialized()
        self._empty = tempfile.TemporaryDirectory(prefix="modmill-ray-")
        if self._started:
            own = {"num_cpus": workers * settings.threads, "include_dashboard": False}
            _start_ray(address, self._empty.name, {} if address else own)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        on_gpu = settings.device.startswith("cuda") or (settings.device == "auto" and gpus > 0)
        self._workers = min(workers, gpus) if on_gpu and gpus else workers
        self._actor_class = ray.remote(
            num_cpus=settings.threads,
            num_gpus=int(on_gpu),
            max_concurrency=2,
            max_restarts=0,
            max_task_retries=0,
        )(_RayWorker)  # pyright: ignore[reportCallIssue] the stub knows no runtime type of actors

    def fit(self, items: Sequence[FitItem], progress: Progress) -> Iterator[tuple[FitItem, TokenizerAdded]]:
        """Fits tokenizers, one a worker; each with its item as soon as it is ready."""
        yield from self._each("fit", items, progress)

    def work(self, items: Sequence[WorkItem], progress: Progress) -> Iterator[tuple[WorkItem, list[ShardAdded]]]:
        """Does work items; the records of each as soon as it is done."""
        yield from self._each("work", items, progress)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._started:
            ray.shutdown()
        self._empty.cleanup()

    def _start_actor(self) -> Any:
        actor = self._actor_class.remote(*self._arguments)
        self._actors.append(actor)
        return actor

    def _each(self, method: str, items: Sequence[Any], progress: Progress) -> Iterator[tuple[Any, Any]]:
        waiting = deque((item, 0) for item in items)
        while len(self._actors) < min(self._workers, len(items)):
            self._start_actor()
        idle = list(self._actors)
        running: dict[Any, tuple[Any, Any, int]] = {}
        while waiting or running:
            while waiting and idle:
                item, deaths = waiting.popleft()
                actor = idle.pop()
                running[getattr(actor, method).remote(item)] = (item, actor, deaths)
            done, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_S)
            self._report(method, [(item, actor) for item, actor, _ in running.values()], progress)
            for reference in done:
                item, actor, deaths = running.pop(reference)
                try:
                    result = ray.get(reference)
                except RayActorError as error:
                    idle.append(self._replace(actor))
                    waiting.append((item, self._count_death(item, deaths, error)))
                    continue
                except RayTaskError as error:
                    # What the worker raised, with the driver's own class, so that the command line knows it.
                    raise (error.cause if isinstance(error.cause, ModmillError) else error) from None
                idle.append(actor)
                yield item, result

    def _replace(self, dead: Any) -> Any:
        self._actors.remove(dead)
        return self._start_actor()

    def _count_death(self, item: Any, deaths: int, error: RayActorError) -> int:
        if deaths + 1 >= _MOST_DEATHS:
            raise ModmillError(
                f"{item.name}: its worker died {deaths + 1} times ({str(error).splitlines()[0]}); a source that kills the "
                "process, or too little memory: lower engine.batch, engine.queue_mb or engine.workers and run again"
            ) from error
        _log.warning("%s: its worker died (%d of %d), it is done again", item.name, deaths + 1, _MOST_DEATHS)
        return deaths + 1

    def _report(self, method: str, busy: Sequence[tuple[Any, Any]], progress: Progress) -> None:
        """Asks the busy workers how far they are; a worker that does not answer at once is asked next time."""
        asked = {actor.progress.remote(): item for item, actor in busy}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0.2) if asked else ([], [])
        for reference in answered:
            try:
                rows, step = ray.get(reference)
            except RayActorError:
                continue
            if method == "work" and rows:
                progress.update("work", rows, item=asked[reference].name)
            if method == "fit" and step is not None:
                progress.fit_step(asked[reference].name, *step)
