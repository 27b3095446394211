"""Leads one work item through its whole life: its rows are decoded, labeled and tokenized, and its shards written.

Four things go on at once. Threads decode rows ahead (`decode`). The item's own thread labels and tokenizes them batch by
batch (`label`, `tokenize`). Others encode and write the batches before (`shard`). The caller's thread watches, so that it
notices a batch that hangs.
"""

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

from engine.plan.corpus import identity, identity_of_tokenizer
from engine.plan.items import Beat, ItemResult, Target, WorkItem
from engine.work import spill
from engine.work.decode import ByteBudget, load_chunks
from engine.work.inputs import Inputs
from engine.work.isolate import MicroBatch
from engine.work.label import Labeling, Loaded, load_labelers, on_host
from engine.work.machine import limit_torch, rss_bytes
from engine.work.marks import DEADLINE_EXIT, AtHand, write
from engine.work.models import Models
from engine.work.quality.measure import CrossModal
from engine.work.rows import Labels, LoadedRow, Outcome
from engine.work.shard import ShardOutput, ShardWriter
from engine.work.tokenize import Tokenizing
from manifests.errors import DeadlineExceeded

_BEAT_S = 0.5
# The rows of a target that are not made, by number: as the item settles them, and as earlier attempts left them.
_Known = Mapping[Target, tuple[dict[int, Outcome], dict[int, Outcome]]]


@dataclass(frozen=True)
class ItemBatch:
    """Holds rows that stand together in one batch, each with its place; the rows of a unit go through at once."""

    units: list[list[tuple[int, int]]]

    @property
    def rows(self) -> list[int]:
        """Returns the rows, in order."""
        return sorted(row for unit in self.units for row, _ in unit)


def batches_of(wanted: Sequence[int], done: set[int], suspects: set[int], size: int) -> list[ItemBatch]:
    """Returns batches of the wanted rows. A row has its place by its rank among them, whatever is done already.

    Suspects go through alone, before the others of their batch.
    """
    batches = []
    for first in range(0, len(wanted), size):
        placed = [(row, place) for place, row in enumerate(wanted[first : first + size]) if row not in done]
        alone = [[pair] for pair in placed if pair[0] in suspects]
        others = [pair for pair in placed if pair[0] not in suspects]
        units = [*alone, *([others] if others else [])]
        if units:
            batches.append(ItemBatch(units))
    return batches


class LabeledRows:
    """Decodes and labels samples batch by batch: those of an item, or those that a tokenizer is fitted on."""

    def __init__(self, inputs: Inputs, at_hand: AtHand) -> None:
        self._inputs = inputs
        self._at_hand = at_hand
        self._budget = ByteBudget(inputs.settings.queue_bytes)
        self._stopped = False

    @property
    def queue_fill(self) -> float:
        """Returns the share of the queue's bytes that is in use."""
        return self._budget.fill

    def stop(self) -> None:
        """Lets no further unit begin, and no thread wait for room: whoever waited for the rows has gone."""
        self._stopped = True
        self._budget.close()

    def batches(
        self, labeling: Labeling, batches: Sequence[ItemBatch], *, ahead: bool
    ) -> Generator[tuple[ItemBatch, Iterator[list[Labels]]], None, None]:
        """Yields each batch with the labels of its units.

        Without `ahead` no row is decoded before its unit begins, so that marks are true while rows are decoded.
        """
        with ExitStack() as stack:
            chunks = None
            if ahead:
                units = [unit for batch in batches for unit in batch.units]
                chunks = stack.enter_context(closing(self._chunks(labeling, units)))
            for batch in batches:
                yield batch, self._units(labeling, batch, chunks)

    def _units(
        self, labeling: Labeling, batch: ItemBatch, ahead: Generator[list[LoadedRow], None, None] | None
    ) -> Iterator[list[Labels]]:
        for unit in batch.units:
            if self._stopped:
                raise InterruptedError("the item was stopped")
            self._at_hand.begin([self._inputs.samples[row].row for row, _ in unit])
            with ExitStack() as stack:
                chunks = ahead
                if chunks is None:
                    self._budget = ByteBudget(self._inputs.settings.queue_bytes)
                    chunks = stack.enter_context(closing(self._chunks(labeling, [unit])))
                labels = labeling.unit([place for _, place in unit], self._timed(chunks))
            yield labels
        self._at_hand.end()

    def _chunks(
        self, labeling: Labeling, units: Sequence[Sequence[tuple[int, int]]]
    ) -> Generator[list[LoadedRow], None, None]:
        rows = [[row for row, _ in unit] for unit in units]
        return load_chunks(self._inputs, rows, needs=labeling.needs, most=labeling.chunk, budget=self._budget)

    def _timed(self, chunks: Iterator[list[LoadedRow]]) -> Iterator[list[LoadedRow]]:
        while True:
            with self._at_hand.stopwatch.on("wait"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk
            # What was labeled makes room for what is decoded next.
            del chunk


@dataclass(frozen=True, kw_only=True)
class _Stages:
    """Holds what an item's rows go through: the labelers, and by target its tokenizer, if it has one, and its shard.

    `micros` are the rows a call of each model, by the model's identity.
    """

    batches: Sequence[ItemBatch]
    labeling: Labeling
    targets: Sequence[tuple[Tokenizing | None, ShardOutput]]
    micros: Mapping[str, MicroBatch]
    computes: bool


class ItemWork:
    """Does one item: `label` and then `finish`, each on the caller's thread, which watches the item's own."""

    def __init__(self, item: WorkItem, inputs: Inputs, models: Models, *, own_process: bool) -> None:
        """Begins the item's time. `own_process` says that the process may be ended if a batch hangs."""
        self.item = item
        self._inputs = inputs
        self._models = models
        self._own_process = own_process
        self._at_hand = AtHand(inputs.storage, inputs.settings.run, item.name, writes=item.attempt.marks)
        self._stopwatch = self._at_hand.stopwatch
        self._rows = LabeledRows(inputs, self._at_hand)
        self._labeled, self._done = threading.Event(), threading.Event()
        self._outcome: ItemResult | BaseException | None = None
        self._rows_done = 0
        self._rss_bytes = 0
        # When the worker began another item, while this one was written.
        self._followed_at: float | None = None

    def label(self, on_beat: Callable[[Beat], None]) -> None:
        """Labels and tokenizes the item; returns when all that is left is to encode and write its shards.

        Raises DeadlineExceeded if a batch takes too long. Any other error is raised by `finish`.
        """
        # A daemon, so that a call that hangs keeps no process alive.
        threading.Thread(target=self._work, name="item", daemon=True).start()
        try:
            self._watch(self._labeled, on_beat)
        except BaseException:
            self._rows.stop()
            raise

    def follow(self) -> None:
        """Tells the item that the worker begins another one: from here on the time is that one's."""
        self._followed_at = time.monotonic()

    def finish(self, on_beat: Callable[[Beat], None]) -> ItemResult:
        """Waits for the shards to be written; returns their records, in the order of the targets, and what they took."""
        try:
            self._watch(self._done, on_beat)
        finally:
            self._rows.stop()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        self._at_hand.finish()
        return replace(self._outcome, rss_bytes=max(self._rss_bytes, self._outcome.rss_bytes))

    # -- on the caller's thread ---------------------------------------------------------------------------------------

    def _watch(self, until: threading.Event, on_beat: Callable[[Beat], None]) -> None:
        """Waits for an event, with signs of life, and sees to it that no batch takes longer than it may."""
        settings, stopwatch = self._inputs.settings, self._stopwatch
        deadline_s = settings.batch_deadline_s
        before, busy_before = time.monotonic(), stopwatch.busy_s
        while not until.wait(min(_BEAT_S, deadline_s)):
            overdue = self._at_hand.overdue(deadline_s)
            if overdue is not None and not until.is_set():
                write(self._inputs.storage, settings.run, self.item.name, overdue)
                if self._own_process:
                    # A call that hangs cannot be interrupted; the mark tells the driver which rows were at hand.
                    os._exit(DEADLINE_EXIT)
                raise DeadlineExceeded(
                    f"{self.item.name}: rows {overdue.rows[0]} to {overdue.rows[-1]} took over {deadline_s:g} s, the last of "
                    f"it at {overdue.doing}; look at what hangs there, or raise engine.batch_deadline_s"
                )
            now, busy = time.monotonic(), stopwatch.busy_s
            in_use = rss_bytes()
            self._rss_bytes = max(self._rss_bytes, in_use)
            if self._followed_at is not None:
                continue
            on_beat(
                Beat(
                    item=self.item.name,
                    rows=self._rows_done,
                    stage=stopwatch.stage,
                    stage_s=now - stopwatch.since,
                    busy=min(1.0, max(0.0, busy - busy_before) / max(now - before, 1e-9)),
                    queue_fill=self._rows.queue_fill,
                    rss_bytes=in_use,
                )
            )
            before, busy_before = now, busy

    # -- on the item's thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._outcome = self._made(self._stages())
        except BaseException as error:
            self._outcome = error
        finally:
            self._inputs.source.close()
            self._labeled.set()
            self._done.set()

    def _stages(self) -> _Stages:
        """Loads what the item needs. Rows that are known already are neither decoded nor labeled."""
        item, inputs = self.item, self._inputs
        known: _Known = {
            target: spill.known_rows(item, target, inputs.samples, inputs.storage) for target in item.targets
        }
        rows = range(len(inputs.samples))
        wanted = [row for row in rows if any(row not in fixed for fixed, _ in known.values())]
        done = {row for row in wanted if all(row in fixed or row in given for fixed, given in known.values())}
        missing = [
            target
            for target, (fixed, given) in known.items()
            if any(row not in fixed and row not in given for row in rows)
        ]
        most = min(inputs.settings.batch, item.attempt.batch or inputs.settings.batch)
        loaded = load_labelers(item.plan, missing, self._models, most)
        micros = {identity(one.use): one.micro for one in loaded}
        targets: list[tuple[Tokenizing | None, ShardOutput]] = []
        for target, (fixed, given) in known.items():
            tokenizing = None
            if target.form == "token":
                tokenizing, model = self._tokenizing(target, most)
                micros[model] = tokenizing.micro
            vocabulary = None if tokenizing is None else tokenizing.tokenizer.spec.vocabulary
            targets.append((tokenizing, ShardOutput(item, target, inputs, {**given, **fixed}, vocabulary)))
        # Torch is loaded by now if anything needs it.
        limit_torch(inputs.settings.threads)
        return _Stages(
            batches=batches_of(wanted, done, set(item.attempt.suspects), inputs.settings.batch),
            labeling=Labeling(loaded, missing, inputs.settings, self._at_hand),
            targets=targets,
            micros=micros,
            computes=_computes(loaded, [tokenizing for tokenizing, _ in targets]),
        )

    def _tokenizing(self, target: Target, most: int) -> tuple[Tokenizing, str]:
        """Returns the tokenizer of a target at work, and its identity."""
        facts = self.item.plan.modalities[target.modality]
        known = self.item.tokenizers[facts.tokenizer]
        model = identity_of_tokenizer(known, target.modality)
        tokenizing = Tokenizing(
            tokenizer=self._models.tokenizer(self._inputs.storage, known, target.modality),
            modality=facts.modality,
            batch=self._inputs.settings.batch,
            micro=self._models.micro(model, most),
        )
        return tokenizing, model

    def _made(self, stages: _Stages) -> ItemResult:
        """Leads the rows through all stages."""
        settings, agreement = self._inputs.settings, CrossModal()
        shards = [shard for _, shard in stages.targets]
        with ExitStack() as stack:
            writer = stack.enter_context(closing(ShardWriter(shards, max(1, settings.decoders // 2), self._stopwatch)))
            labeled = stack.enter_context(
                closing(self._rows.batches(stages.labeling, stages.batches, ahead=not self.item.attempt.marks))
            )
            spilled, has_spilled = time.monotonic(), self.item.attempt.resumes
            for batch, units in labeled:
                outcomes: list[dict[int, Outcome]] = [{} for _ in shards]
                for labels in units:
                    agreement.add(labels)
                    for (tokenizing, shard), found in zip(stages.targets, outcomes, strict=True):
                        found |= self._outcomes(tokenizing, shard, labels)
                is_last = batch is stages.batches[-1]
                until = len(self._inputs.samples) if is_last else batch.rows[-1] + 1
                writer.add(outcomes, until)
                self._rows_done = until
                if not is_last and time.monotonic() - spilled > settings.spill_after_s:
                    has_spilled = True
                    writer.spill()
                    spilled = time.monotonic()
            made = self._how_made(stages)
            # The worker may begin another item now: what follows needs no model.
            self._labeled.set()
            if not stages.batches:
                writer.add([{} for _ in shards], len(self._inputs.samples))
            records = writer.finish(metrics=agreement.finish(), **made)
        # A spill of an earlier attempt may be left even if this one wrote none.
        for target in self.item.targets if has_spilled else ():
            spill.remove(self._inputs.storage, spill.path_of(self.item, target))
        total = (self._followed_at or time.monotonic()) - self._stopwatch.began
        return ItemResult(
            records=records,
            rows=len(self._inputs.samples),
            seconds={**self._stopwatch.seconds, "total": total},
            seconds_by_labeler=self._stopwatch.by_labeler,
            busy=self._stopwatch.busy_s / max(total, 1e-9),
            rss_bytes=rss_bytes(),
        )

    def _outcomes(
        self, tokenizing: Tokenizing | None, shard: ShardOutput, labels: Sequence[Labels]
    ) -> dict[int, Outcome]:
        """Returns what becomes of some rows in one shard: their labels on the host, or their tokens."""
        mine = [made for made in labels if not shard.is_known(made.row)]
        found = {made.row: made.of(shard.target) for made in mine}
        if tokenizing is None:
            return on_host(found)
        with self._at_hand.call("tokenize", [made.row for made in labels]):
            shard.measure(found)
            return tokenizing.tokens(mine, found)

    def _how_made(self, stages: _Stages) -> Mapping[str, Any]:
        """Returns what a shard's record says of its making, and remembers which models ran out of memory."""
        settings = self._inputs.settings
        for model, micro in stages.micros.items():
            if micro.size < settings.batch:
                self._models.remember(model, micro.size)
        smallest = min((micro.size for micro in stages.micros.values()), default=settings.batch)
        return {"device": settings.device if stages.computes else "cpu", "micro_batch": min(smallest, settings.batch)}


def _computes(loaded: Sequence[Loaded], tokenizing: Sequence[Tokenizing | None]) -> bool:
    """Tells whether anything of an item computes on the worker's device."""
    return any(one.on_device for one in loaded) or any(one is not None and one.computes for one in tokenizing)
