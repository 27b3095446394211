"""A worker: it does work items, one at a time, and keeps the models it loaded. The same in this process and in Ray's actors.

Nothing of pixels leaves it: it is given a `WorkItem`, writes shards, and returns their records, which the driver commits.
"""

import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from engine.plan.corpus import CorpusPlan, LabelerUse, identity, identity_of_tokenizer
from engine.plan.items import Attempt, Beat, ItemResult, Target, WorkItem
from engine.sources.kinds import open_source
from engine.sources.read import SourceReader
from engine.work import spill
from engine.work.decode import load_chunks
from engine.work.isolate import MicroBatch
from engine.work.item import ItemWork, batches_of, known_rows
from engine.work.label import Labeling, Loaded
from engine.work.machine import device_of, limit_threads, limit_torch, return_memory, rss_bytes
from engine.work.marks import DEADLINE_EXIT, AtHand, write
from engine.work.models import Models
from engine.work.rows import Labels, LoadedRow
from engine.work.shard import ShardOutput
from labelers import protocol as labelers
from manifests.errors import DeadlineExceeded, ShardError
from manifests.formats import shards
from manifests.log.actions import TokenizerAdded
from manifests.store.storage import open_storage
from tokenize_jobs import protocol as tokenizers
from tokenize_jobs.protocol import fetch_tokenizer

__all__ = ["Worker", "WorkerSettings", "fetch_tokenizer"]

_BEAT_S = 0.5
_GPU_DECODE_THREADS = 4
_PREFETCH_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """How a worker works; of it only `batch`, `threads` and `dtype` can show in its output, and those are in the run.

    `decode_threads` None: as many as `threads` on a CPU, with a GPU more. `run` is the run's name, for marks.
    """

    threads: int
    batch: int
    decode_threads: int | None
    queue_bytes: int
    device: str
    run: str = ""
    dtype: str = "auto"
    compile: bool = False
    models_bytes: int = 16 << 30
    batch_deadline_s: float = 600.0
    spill_after_s: float = 600.0


class Worker:
    """Does work items and fits, one at a time, but that an item may be labeled while the one before it is written.

    `own_process` says that it may end its process where a batch hangs.
    """

    def __init__(self, workspace: str, settings: WorkerSettings, *, own_process: bool = False) -> None:
        self.storage = open_storage(workspace)
        self.settings = replace(settings, device=device_of(settings.device))
        on_gpu = self.settings.device != "cpu"
        self._decode_threads = settings.decode_threads or (_GPU_DECODE_THREADS if on_gpu else settings.threads)
        self.models = Models(self.settings.device, settings.models_bytes, settings.dtype, settings.compile)
        self._own_process = own_process
        # By model: the rows a call, once memory ran out with more.
        self._micro: dict[str, int] = {}
        self._prefetched: tuple[str, list[dict[str, Any]], SourceReader] | None = None
        # The item that was begun last.
        self._last: ItemWork | None = None
        self._lock = threading.Lock()
        return_memory()
        limit_threads(settings.threads)

    def work(self, item: WorkItem, on_beat: Callable[[Beat], None] = lambda beat: None) -> ItemResult:
        """Makes the item's shards; their records, in the order of its targets, and what it took. See `label`."""
        return self.label(item, on_beat)()

    def label(self, item: WorkItem, on_beat: Callable[[Beat], None] = lambda beat: None) -> Callable[[], ItemResult]:
        """Labels and tokenizes an item. What it gives back waits for its shards to be written, and then tells of them.

        As soon as it gives that back another item may be labeled, so that no device waits for files to be written or
        uploaded; two items may be under way at once. `on_beat` is told of signs of life, on the caller's thread, about
        twice a second: of the item that was begun last. Both raise what went wrong: DeadlineExceeded where a batch takes
        longer than it may, unless the process is the worker's own, which then ends.
        """
        at_hand = AtHand(self.storage, self.settings.run, item.name, writes=item.attempt.marks)
        samples, source = self._taken(item)
        work = ItemWork(
            item,
            samples,
            source,
            self.storage,
            at_hand,
            spill_after_s=self.settings.spill_after_s,
            decode_threads=self._decode_threads,
            queue_bytes=self.settings.queue_bytes,
        )
        before, self._last = self._last, work
        if before is not None:
            before.followed_at = work.clock.began
        found: list[ItemResult | BaseException] = []
        labeled, done = threading.Event(), threading.Event()

        def make() -> None:
            try:
                found.append(self._make(work, labeled))
            except BaseException as error:
                found.append(error)
            finally:
                source.close()
                labeled.set()
                done.set()

        def finish() -> ItemResult:
            try:
                self._watch(work, done, on_beat)
            finally:
                work.stop()
            result = found[0]
            if isinstance(result, BaseException):
                raise result
            at_hand.finish()
            return replace(result, rss_bytes=max(work.rss_bytes, result.rss_bytes))

        # Of a daemon, so that a call that hangs keeps no process alive.
        threading.Thread(target=make, name="item", daemon=True).start()
        try:
            self._watch(work, labeled, on_beat)
        except BaseException:
            work.stop()
            raise
        return finish

    def prefetch(self, item: WorkItem) -> None:
        """Reads the first source bytes of the item that comes next; safe to call while another is at work."""
        if item.attempt.marks:
            return
        samples, source = self._opened(item)
        source.prefetch(_PREFETCH_BYTES)
        with self._lock:
            before, self._prefetched = self._prefetched, (item.name, samples, source)
        if before is not None:
            before[2].close()

    def labels(
        self,
        plan: CorpusPlan,
        samples: Sequence[Mapping[str, Any]],
        targets: Sequence[Target],
        *,
        name: str,
        first: int,
        attempt: Attempt,
    ) -> Iterator[list[Labels]]:
        """Labels of these samples, in batches and in their order, from only those labelers that the targets need.

        `attempt` is what earlier ones at the fit called `name` taught, by the samples' numbers, which begin at `first`:
        samples that killed a worker are left out.
        """
        at_hand = AtHand(self.storage, self.settings.run, name, writes=attempt.marks)
        at_work: list[int] = []

        @contextmanager
        def on_call(labeler: str, asked: Sequence[int]) -> Iterator[None]:
            at_hand.doing(labeler, at_work)
            yield

        labeling, _ = self._labeling(plan, targets, attempt.batch, on_call)
        rows = range(len(samples))
        killers = {row for row in rows if first + row in attempt.killers}
        suspects = {row for row in rows if first + row in attempt.suspects}
        batches = batches_of(rows, killers, suspects, self.settings.batch)

        def load(units: Sequence[Sequence[tuple[int, int]]]) -> Generator[list[LoadedRow], None, None]:
            return load_chunks(
                plan,
                samples,
                [[row for row, _ in unit] for unit in units],
                source,
                needs=labeling.needs,
                threads=self._decode_threads,
                queue_bytes=self.settings.queue_bytes,
                most=labeling.chunk,
            )

        with ExitStack() as stack:
            source = stack.enter_context(closing(open_source(plan.root, plan.config, samples, self.storage)))
            # With marks nothing is decoded ahead, so that they are true while rows are decoded.
            ahead = None if attempt.marks else stack.enter_context(closing(load([b.units[0] for b in batches])))
            for batch in batches:
                made: list[Labels] = []
                for unit in batch.units:
                    at_work[:] = [first + row for row, _ in unit]
                    at_hand.begin(at_work)
                    with nullcontext(ahead) if ahead is not None else closing(load([unit])) as chunks:
                        made += labeling.unit([place for _, place in unit], chunks)
                at_hand.end()
                yield sorted(made, key=lambda labels: labels.place)

    def tokenizer(self, known: TokenizerAdded, modality: str) -> tokenizers.Tokenizer:
        """A tokenizer of the workspace, loaded once and checked against its digest."""
        return self.models.tokenizer(self.storage, known, modality)

    # -- one item -----------------------------------------------------------------------------------------------------

    def _taken(self, item: WorkItem) -> tuple[list[dict[str, Any]], SourceReader]:
        """The rows of an item's part and where their bytes come from, as prefetched if they are."""
        with self._lock:
            before, self._prefetched = self._prefetched, None
        if before is not None and before[0] == item.name:
            return before[1], before[2]
        if before is not None:
            before[2].close()
        return self._opened(item)

    def _opened(self, item: WorkItem) -> tuple[list[dict[str, Any]], SourceReader]:
        samples = shards.read_samples(self.storage.read(item.part.path))
        if len(samples) != item.part.rows:
            raise ShardError(f"{item.part.path} holds {len(samples)} rows, the log says {item.part.rows}")
        return samples, open_source(item.plan.root, item.plan.config, samples, self.storage)

    def _make(self, work: ItemWork, labeled: threading.Event) -> ItemResult:
        item, clock, batch = work.item, work.clock, self.settings.batch
        keys = [sample["key"] for sample in work.samples]
        known = {target: known_rows(item, target, work.samples, self.storage) for target in item.targets}
        rows = range(len(keys))
        wanted = [row for row in rows if any(row not in fixed for fixed, _ in known.values())]
        done = {row for row in wanted if all(row in fixed or row in given for fixed, given in known.values())}
        batches = batches_of(wanted, done, set(item.attempt.suspects), batch)
        lacking = [
            target
            for target, (fixed, given) in known.items()
            if any(row not in fixed and row not in given for row in rows)
        ]

        @contextmanager
        def on_call(name: str, asked: Sequence[int]) -> Iterator[None]:
            work.at_hand.doing(name, asked)
            with clock.on("label", name):
                yield

        labeling, used = self._labeling(item.plan, lacking, item.attempt.batch, on_call)
        outputs = []
        for target, (fixed, given) in known.items():
            tokenizer, micro = None, MicroBatch(batch)
            if target.form == "token":
                tokenized = item.tokenizers[item.plan.modalities[target.modality].tokenizer]
                tokenizer = self.tokenizer(tokenized, target.modality)
                micro = self._micro_of(identity_of_tokenizer(tokenized, target.modality), item.attempt.batch)
                used[identity_of_tokenizer(tokenized, target.modality)] = micro
            outputs.append(
                ShardOutput(item, target, keys, {**given, **fixed}, tokenizer, self.storage, batch=batch, micro=micro)
            )
        # Loading is over, and torch with it where anything needs it.
        limit_torch(self.settings.threads)
        computes = any(_has_device(use) for use in item.plan.labelers if identity(use) in used) or any(
            output.has_tokenizer and item.plan.modalities[output.target.modality].modality.axes for output in outputs
        )

        def facts() -> Mapping[str, Any]:
            for name, micro in used.items():
                if micro.size < batch:
                    self._micro[name] = micro.size
            smallest = min((micro.size for micro in used.values()), default=batch)
            return {"device": self.settings.device if computes else "cpu", "micro_batch": min(smallest, batch)}

        records = work.do(labeling, outputs, batches, facts, labeled)
        # A spill may stand though this attempt wrote none.
        for target in item.targets:
            spill.remove(self.storage, spill.path_of(item, target))
        # The time from which another item had the worker is that one's.
        total = (work.followed_at or time.monotonic()) - clock.began
        return ItemResult(
            records=records,
            rows=len(keys),
            seconds={**clock.seconds, "total": total},
            seconds_by_labeler=clock.by_labeler,
            busy=clock.busy_s / max(total, 1e-9),
            rss_bytes=rss_bytes(),
        )

    def _watch(self, work: ItemWork, until: threading.Event, on_beat: Callable[[Beat], None]) -> None:
        """Waits for what is to become of an item, with signs of life."""
        deadline_s = self.settings.batch_deadline_s
        clock = work.clock
        before, busy_before = time.monotonic(), clock.busy_s
        while not until.wait(min(_BEAT_S, deadline_s)):
            overdue = work.at_hand.overdue(deadline_s)
            if overdue is not None and not until.is_set():
                write(self.storage, self.settings.run, work.item.name, overdue)
                if self._own_process:
                    os._exit(DEADLINE_EXIT)
                raise DeadlineExceeded(
                    f"{work.item.name}: rows {overdue.rows[0]} to {overdue.rows[-1]} took over {deadline_s:g} s, the last of "
                    f"it at {overdue.doing}; look at what hangs there, or raise engine.batch_deadline_s"
                )
            now, busy = time.monotonic(), clock.busy_s
            in_use = rss_bytes()
            work.rss_bytes = max(work.rss_bytes, in_use)
            if work.followed_at is not None:
                continue
            on_beat(
                Beat(
                    item=work.item.name,
                    rows=work.rows_done,
                    stage=clock.stage,
                    stage_s=now - clock.since,
                    busy=min(1.0, max(0.0, busy - busy_before) / max(now - before, 1e-9)),
                    queue_fill=work.queue_fill,
                    rss_bytes=in_use,
                )
            )
            before, busy_before = now, busy

    def _labeling(
        self,
        plan: CorpusPlan,
        targets: Sequence[Target],
        batch: int | None,
        on_call: Callable[[str, Sequence[int]], AbstractContextManager[Any]],
    ) -> tuple[Labeling, dict[str, MicroBatch]]:
        """The labelers that these targets need, and how many rows each may have in a call, by model."""
        uses = _needed_labelers(plan, {target.modality for target in targets})
        crops = sorted({target.crop for target in targets if target.crop is not None})
        used = {identity(use): self._micro_of(identity(use), batch) for use in uses}
        loaded = [
            Loaded(
                use=use,
                labeler=self.models.labeler(use),
                micro=used[identity(use)],
                computing=self.models.computing if _has_device(use) else nullcontext,
            )
            for use in uses
        ]
        return Labeling(plan, loaded, crops, self.settings.batch, on_call), used

    def _micro_of(self, model: str, batch: int | None) -> MicroBatch:
        return MicroBatch(min(self.settings.batch, self._micro.get(model, self.settings.batch), batch or sys.maxsize))


def _needed_labelers(plan: CorpusPlan, names: set[str]) -> list[LabelerUse]:
    """The labelers that make these modalities, and those that they need, in the plan's order."""
    needed = set(names)
    chosen = []
    for use in reversed(plan.labelers):
        if any(output.name in needed for output in use.outputs):
            chosen.append(use)
            needed |= set(labelers.find(use.name).spec.inputs)
    return chosen[::-1]


def _has_device(use: LabelerUse) -> bool:
    """Whether a labeler computes on a device, by torch."""
    return "device" in inspect.signature(labelers.find(use.name)).parameters
