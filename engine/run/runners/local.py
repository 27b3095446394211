"""Work items in this process: the same worker as on Ray, for tests, debuggers and laptops."""

import logging
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from engine.pipeline.sections import EngineConfig
from engine.plan.items import FitItem, ItemResult, WorkItem
from engine.progress.progress import Progress
from engine.run.runners.pools import pool_of_fit, pools
from engine.run.runners.queue import Draining, ItemQueue, needed_models
from engine.run.runners.strikes import Strikes, stops_the_run
from engine.run.runners.turns import Turns
from engine.work.fit import fit
from engine.work.inputs import WorkerSettings
from engine.work.worker import Worker
from manifests.log.actions import TokenizerAdded

_log = logging.getLogger(__name__)
_TICK_S = 0.1
_GATHER_S = 0.25


class _Seat:
    """One thread's place: its workers, one of every pool that it met, and the items it was given, the first at work."""

    def __init__(self, name: str, workspace: str, settings: dict[str, WorkerSettings]) -> None:
        self.name = name
        self.items: deque[WorkItem] = deque()
        self.workers: dict[str, Worker] = {}
        self.turns = Turns()
        self._workspace = workspace
        self._settings = settings

    def worker(self, pool: str) -> Worker:
        if pool not in self.workers:
            self.workers[pool] = Worker(self._workspace, self._settings[pool])
        return self.workers[pool]

    def held(self, pool: str) -> frozenset[str]:
        return self.workers[pool].models.held if pool in self.workers else frozenset()


class LocalRunner:
    """Runs items on `engine.workers` threads of this process; one of them serves every pool."""

    def __init__(self, workspace: str, settings: WorkerSettings, engine: EngineConfig) -> None:
        self._engine = engine
        of_pools = {name: pool.settings for name, pool in pools(engine, settings, has_gpus=False).items()}
        self._pools = list(of_pools)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = engine.workers or max(1, cores // engine.threads)
        self._seats = [_Seat(f"worker-{number + 1}", workspace, of_pools) for number in range(count)]
        # Two threads a seat: an item is labeled while the one before is written.
        self._threads = [ThreadPoolExecutor(2, thread_name_prefix=seat.name) for seat in self._seats]
        self._ahead = ThreadPoolExecutor(count, thread_name_prefix="prefetch")
        self._stopped = False
        self._waits = True
        self._open: Generator[Any, None, None] | None = None

    def fit(self, items: Sequence[FitItem], progress: Progress) -> Iterator[tuple[FitItem, TokenizerAdded]]:
        """Fits tokenizers; each with its item as soon as it is ready."""
        free: SimpleQueue[_Seat] = SimpleQueue()
        for seat in self._seats:
            free.put(seat)

        def one(item: FitItem) -> TokenizerAdded:
            seat = free.get()
            try:
                worker = seat.worker(pool_of_fit(item, self._engine))
                return fit(item, worker, lambda step, steps, losses: progress.fit_step(item.name, step, steps, losses))
            finally:
                free.put(seat)

        with ThreadPoolExecutor(len(self._seats)) as threads:
            futures = {threads.submit(one, item): item for item in items}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                for future in futures:
                    future.cancel()

    def work(
        self, items: Iterable[WorkItem], progress: Progress
    ) -> Iterator[list[tuple[WorkItem, ItemResult | Exception]]]:
        """Does work items; lists of those that are done, each with its result or the error it failed with for good.

        The first Ctrl-C stops handing out, waits up to `engine.drain_s` for what is at work, and ends in KeyboardInterrupt.
        """

        def drained() -> Generator[list[Any], None, None]:
            try:
                with Draining() as draining:
                    yield from self._each(ItemQueue(items, needed_models), progress, draining)
            except KeyboardInterrupt:
                self._waits = False
                raise

        self._open = drained()
        return self._open

    def close(self) -> None:
        """Ends the threads; what is at work is done to its end, unless a person has waited for it long enough."""
        self._stopped = True
        if self._open is not None:
            self._open.close()
        for threads in (*self._threads, self._ahead):
            threads.shutdown(wait=self._waits, cancel_futures=True)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _each(self, queue: ItemQueue, progress: Progress, draining: Draining) -> Iterator[list[Any]]:
        answers: SimpleQueue[tuple[_Seat, WorkItem, Future[ItemResult | None]]] = SimpleQueue()
        strikes = Strikes({})
        done: list[tuple[WorkItem, ItemResult | Exception]] = []
        until: float | None = None
        yielded = 0.0
        while True:
            if draining.asked and until is None:
                self._stopped = True
                until = time.monotonic() + self._engine.drain_s
                progress.say(
                    f"interrupted: waiting up to {self._engine.drain_s:g} s for the items at work; again to stop at once"
                )
            if until is None:
                self._hand_out(queue, progress, answers)
            at_work = any(seat.items for seat in self._seats)
            if not at_work or (until is not None and time.monotonic() > until):
                break
            with suppress(Empty):
                seat, item, future = answers.get(timeout=_TICK_S)
                while True:
                    seat.items.remove(item)
                    done += _outcome(item, future, queue, strikes)
                    seat, item, future = answers.get_nowait()
            if done and time.monotonic() - yielded >= _GATHER_S:
                given, done = done, []
                yield given
                yielded = time.monotonic()
        if done:
            yield done
        if draining.asked:
            raise KeyboardInterrupt

    def _hand_out(self, queue: ItemQueue, progress: Progress, answers: Any) -> None:
        """Gives each thread an item to do, and while there are many another one to fetch ahead."""
        for most in (1, 2):
            for seat, threads in zip(self._seats, self._threads, strict=True):
                if len(seat.items) >= most:
                    continue
                enough = (most - 1) * len(self._seats)
                pool = next((name for name in self._pools if queue.waiting(name) > enough), None)
                item = None if pool is None else queue.next(pool, seat.held(pool), alone=not seat.items)
                if item is None:
                    continue
                if seat.items and item.pool in seat.workers:
                    self._ahead.submit(seat.workers[item.pool].prefetch, item)
                seat.items.append(item)
                future = threads.submit(self._do, seat, seat.turns.take()[0], item, progress)
                future.add_done_callback(lambda future, seat=seat, item=item: answers.put((seat, item, future)))

    def _do(self, seat: _Seat, ticket: int, item: WorkItem, progress: Progress) -> ItemResult | None:
        """The item's result; None where the run was stopped before it began."""
        with seat.turns.place(ticket):
            seat.turns.wait(ticket)
            if self._stopped:
                return None
            progress.started(item, seat.name)
            written = seat.worker(item.pool).label(item, lambda beat: progress.beat(seat.name, beat))
        return written()


def _outcome(
    item: WorkItem, future: "Future[ItemResult | None]", queue: ItemQueue, strikes: Strikes
) -> list[tuple[WorkItem, ItemResult | Exception]]:
    """What is to be given on of an item that a thread is through with. Raises what would befall all others too."""
    error = future.exception()
    if error is None:
        strikes.done(item)
        result = future.result()
        return [(item, result)] if result is not None else []
    if not isinstance(error, Exception) or stops_the_run(error):
        raise error
    _log.warning("%s raised %s: %s", item.name, type(error).__name__, error)
    _log.debug("%s", item.name, exc_info=error)
    again = strikes.raised(item, error)
    if isinstance(again, WorkItem):
        queue.put_back(again)
        return []
    return [(item, again)]
