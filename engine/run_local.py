"""Work items in this process: the same worker as on Ray, for tests, debuggers and laptops."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any

from engine.fit import fit
from engine.plan import FitItem
from engine.progress import Progress
from engine.work import WorkItem
from engine.worker import Worker, WorkerSettings
from manifests.actions import ShardAdded, TokenizerAdded


class LocalRunner:
    """Runs items on `workers` threads, each with a worker of its own."""

    def __init__(self, workspace: str, settings: WorkerSettings, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="worker")
        self._free: SimpleQueue[Worker] = SimpleQueue()
        for _ in range(workers):
            self._free.put(Worker(workspace, settings))

    def fit(self, items: Sequence[FitItem], progress: Progress) -> Iterator[tuple[FitItem, TokenizerAdded]]:
        """Fits tokenizers; each with its item as soon as it is ready."""

        def one(item: FitItem, worker: Worker) -> TokenizerAdded:
            return fit(item, worker, lambda step, steps, losses: progress.fit_step(item.name, step, steps, losses))

        yield from self._each(one, items)

    def work(self, items: Sequence[WorkItem], progress: Progress) -> Iterator[tuple[WorkItem, list[ShardAdded]]]:
        """Does work items; the records of each as soon as it is done."""

        def one(item: WorkItem, worker: Worker) -> list[ShardAdded]:
            return worker.work(item, lambda rows: progress.update("work", rows, item=item.name))

        yield from self._each(one, items)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _each(self, do: Any, items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        def held(item: Any) -> Any:
            worker = self._free.get()
            try:
                return do(item, worker)
            finally:
                self._free.put(worker)

        futures = {self._pool.submit(held, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()
