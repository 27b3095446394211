"""Does work items in one process, this one or an actor of Ray's, and keeps the models it loaded.

No pixels leave it: it is given a `WorkItem`, writes shards, and returns their records, which the driver commits.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from engine.plan.corpus import CorpusPlan
from engine.plan.items import Attempt, Beat, ItemResult, Target, WorkItem
from engine.sources.kinds import open_source
from engine.work.inputs import Inputs, WorkerSettings
from engine.work.item import ItemWork, LabeledRows, batches_of
from engine.work.label import Labeling, load_labelers
from engine.work.machine import device_of, limit_threads, return_memory
from engine.work.marks import AtHand
from engine.work.models import ALONE, Models
from engine.work.rows import Labels
from manifests.errors import ShardError
from manifests.formats.shards import Sample, read_samples
from manifests.store.storage import open_storage

_PREFETCH_BYTES = 64 << 20


class Worker:
    """Does work items and fits one at a time; one item may be labeled while the one before it is written.

    `own_process` says that it may end its process if a batch hangs.
    """

    def __init__(self, workspace: str, settings: WorkerSettings, *, own_process: bool = False) -> None:
        self.storage = open_storage(workspace)
        with ALONE:  # Where there is a GPU, this imports torch.
            self.settings = replace(settings, device=device_of(settings.device))
        self.models = Models(self.settings.device, settings.models_bytes, settings.dtype, settings.compile)
        self._own_process = own_process
        self._prefetched: tuple[str, Inputs] | None = None
        # The item that was begun last.
        self._last: ItemWork | None = None
        self._lock = threading.Lock()
        return_memory()
        limit_threads(settings.threads)

    def work(self, item: WorkItem, on_beat: Callable[[Beat], None] = lambda beat: None) -> ItemResult:
        """Makes the item's shards; returns their records, in the order of its targets, and what it took. See `label`."""
        return self.label(item, on_beat)()

    def label(self, item: WorkItem, on_beat: Callable[[Beat], None] = lambda beat: None) -> Callable[[], ItemResult]:
        """Labels and tokenizes an item; returns what waits for its shards to be written, and then tells of them.

        As soon as it returns another item may be labeled, so that no device waits for files to be written or uploaded;
        two items may be under way at once. `on_beat` is told of signs of life, on the caller's thread, about twice a
        second: of the item that was begun last. Both raise what went wrong: DeadlineExceeded if a batch takes longer than
        it may, unless the process is the worker's own, which then ends.
        """
        work = ItemWork(item, self._taken(item), self.models, own_process=self._own_process)
        before, self._last = self._last, work
        if before is not None:
            before.follow()
        work.label(on_beat)
        return partial(work.finish, on_beat)

    def prefetch(self, item: WorkItem) -> None:
        """Reads the first source bytes of the item that comes next; safe to call while another is at work."""
        if item.attempt.marks:
            return
        inputs = self._opened(item)
        inputs.source.prefetch(_PREFETCH_BYTES)
        with self._lock:
            before, self._prefetched = self._prefetched, (item.name, inputs)
        if before is not None:
            before[1].source.close()

    def labels(
        self,
        plan: CorpusPlan,
        samples: Sequence[Sample],
        targets: Sequence[Target],
        *,
        name: str,
        first: int,
        attempt: Attempt,
    ) -> Iterator[list[Labels]]:
        """Yields labels of these samples, in batches and in their order, from only those labelers that the targets need.

        `attempt` is what earlier ones at the fit called `name` taught, by the samples' numbers, which begin at `first`:
        samples that killed a worker are left out.
        """
        # Rows have their numbers in the fit here, so that marks name them by these.
        numbered = [replace(sample, row=first + place) for place, sample in enumerate(samples)]
        at_hand = AtHand(self.storage, self.settings.run, name, writes=attempt.marks)
        loaded = load_labelers(
            plan, targets, self.models, min(self.settings.batch, attempt.batch or self.settings.batch)
        )
        labeling = Labeling(loaded, targets, self.settings, at_hand)
        rows = range(len(samples))
        killers = {row for row in rows if first + row in attempt.killers}
        suspects = {row for row in rows if first + row in attempt.suspects}
        batches = batches_of(rows, killers, suspects, self.settings.batch)
        inputs = self._inputs(plan, numbered)
        with closing(inputs.source):
            labeled = LabeledRows(inputs, at_hand).batches(labeling, batches, ahead=not attempt.marks)
            with closing(labeled):
                for _, units in labeled:
                    yield sorted((labels for unit in units for labels in unit), key=lambda labels: labels.place)

    def _taken(self, item: WorkItem) -> Inputs:
        """Returns the rows of an item's part and the source of their bytes, prefetched if they were."""
        with self._lock:
            before, self._prefetched = self._prefetched, None
        if before is not None and before[0] == item.name:
            return before[1]
        if before is not None:
            before[1].source.close()
        return self._opened(item)

    def _opened(self, item: WorkItem) -> Inputs:
        samples = read_samples(self.storage.read(item.part.path))
        if len(samples) != item.part.rows:
            raise ShardError(f"{item.part.path} holds {len(samples)} rows, the log says {item.part.rows}")
        return self._inputs(item.plan, samples)

    def _inputs(self, plan: CorpusPlan, samples: Sequence[Sample]) -> Inputs:
        source = open_source(plan.root, plan.config, samples, self.storage)
        return Inputs(plan=plan, samples=samples, source=source, storage=self.storage, settings=self.settings)
