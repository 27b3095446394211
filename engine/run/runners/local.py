"""Does work items in this process, by the same worker as on Ray: for tests, debuggers and laptops."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from queue import Empty, SimpleQueue

from engine.pipeline.sections import EngineConfig
from engine.plan.items import FitItem, ItemResult, WorkItem
from engine.progress.progress import Progress
from engine.run.runners.driver import drive
from engine.run.runners.pools import pool_of_fit, pools, workers_of
from engine.run.runners.protocol import Pairs
from engine.run.runners.queue import ItemQueue, needed_models
from engine.run.runners.strikes import Strikes, stops_the_run
from engine.run.runners.turns import Turns
from engine.work.fit import fit
from engine.work.inputs import WorkerSettings
from engine.work.worker import Worker
from manifests.log.actions import TokenizerAdded

_log = logging.getLogger(__name__)


class _Seat:
    """Holds one worker's place: a worker of every pool that it met, and the items it was given, the first at work."""

    def __init__(self, name: str, workspace: str, settings: dict[str, WorkerSettings]) -> None:
        self.name = name
        self.items: deque[WorkItem] = deque()
        self.turns = Turns()
        # Two: an item is labeled while the one before is written.
        self.threads = ThreadPoolExecutor(2, thread_name_prefix=name)
        self._workers: dict[str, Worker] = {}
        self._workspace = workspace
        self._settings = settings

    def worker(self, pool: str) -> Worker:
        if pool not in self._workers:
            self._workers[pool] = Worker(self._workspace, self._settings[pool])
        return self._workers[pool]

    def prefetch(self, item: WorkItem) -> None:
        """Fetches an item's bytes ahead, if a worker is there to hold them."""
        if item.pool in self._workers:
            self._workers[item.pool].prefetch(item)

    def held(self, pool: str) -> frozenset[str]:
        return self._workers[pool].models.held if pool in self._workers else frozenset()


class LocalRunner:
    """Does items on `engine.workers` workers of this process; each serves every pool."""

    def __init__(self, workspace: str, settings: WorkerSettings, engine: EngineConfig) -> None:
        self._engine = engine
        of_pools = {name: pool.settings for name, pool in pools(engine, settings, has_gpus=False).items()}
        self._pools = list(of_pools)
        self._seats = [_Seat(f"worker-{number + 1}", workspace, of_pools) for number in range(workers_of(engine))]
        self._waits = True
        self._loop: _LocalLoop | None = None

    def fit(self, items: Sequence[FitItem], progress: Progress) -> Iterator[tuple[FitItem, TokenizerAdded]]:
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

    def work(self, items: Iterable[WorkItem], progress: Progress) -> Generator[Pairs, None, None]:
        self._loop = _LocalLoop(self._seats, self._pools, ItemQueue(items, needed_models), progress)
        try:
            yield from drive(self._loop, progress, self._engine.drain_s)
        except KeyboardInterrupt:
            self._waits = False
            raise

    def close(self) -> None:
        """Ends the threads; what is at work is done to its end, unless a person has waited for it long enough."""
        if self._loop is not None:
            self._loop.drain()
        for seat in self._seats:
            seat.threads.shutdown(wait=self._waits, cancel_futures=True)


class _LocalLoop:
    """Holds the items of a run on their way through the seats, as `drive` asks for it."""

    def __init__(self, seats: Sequence[_Seat], pools: Sequence[str], queue: ItemQueue, progress: Progress) -> None:
        self.done: Pairs = []
        self._seats = seats
        self._pools = pools
        self._queue = queue
        self._progress = progress
        self._strikes = Strikes({})
        self._answers: SimpleQueue[tuple[_Seat, WorkItem, Future[ItemResult | None]]] = SimpleQueue()
        self._stopped = False

    @property
    def at_work(self) -> int:
        return sum(bool(seat.items) for seat in self._seats)

    @property
    def is_over(self) -> bool:
        return not self.at_work

    def hand_out(self) -> None:
        """Gives each seat an item to do, and while there are many another one to fetch ahead."""
        for most in (1, 2):
            for seat in self._seats:
                if len(seat.items) >= most:
                    continue
                enough = (most - 1) * len(self._seats)
                pool = next((name for name in self._pools if self._queue.waiting(name) > enough), None)
                item = None if pool is None else self._queue.next(pool, seat.held(pool), alone=not seat.items)
                if item is None:
                    continue
                seat.items.append(item)
                future = seat.threads.submit(self._do, seat, item, seat.turns.take())
                future.add_done_callback(lambda future, seat=seat, item=item: self._answers.put((seat, item, future)))

    def hear(self, timeout_s: float) -> None:
        with suppress(Empty):
            answer = self._answers.get(timeout=timeout_s)
            while True:
                self._hear(*answer)
                answer = self._answers.get_nowait()

    def drain(self) -> None:
        self._stopped = True

    def _do(self, seat: _Seat, item: WorkItem, ticket: int) -> ItemResult | None:
        """Returns the item's result; None if the run was stopped before it began."""

        def label() -> Callable[[], ItemResult] | None:
            if self._stopped:
                return None
            self._progress.started(item, seat.name)
            return seat.worker(item.pool).label(item, lambda beat: self._progress.beat(seat.name, beat))

        return seat.turns.label(ticket, lambda: seat.prefetch(item), label)

    def _hear(self, seat: _Seat, item: WorkItem, future: "Future[ItemResult | None]") -> None:
        """Sees to an item that a thread is through with. Raises what would befall all others too."""
        seat.items.remove(item)
        error = future.exception()
        if error is None:
            self._strikes.done(item)
            if (result := future.result()) is not None:
                self.done.append((item, result))
            return
        if not isinstance(error, Exception) or stops_the_run(error):
            raise error
        _log.warning("%s raised %s: %s", item.name, type(error).__name__, error)
        _log.debug("%s", item.name, exc_info=error)
        again = self._strikes.raised(item, error)
        if isinstance(again, WorkItem):
            self._queue.put_back(again)
        else:
            self.done.append((item, again))
