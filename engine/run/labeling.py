"""Runs the labeling of a run: says what will be done and why, hands items to a runner, and has their records committed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain

from engine.pipeline.config import EngineConfig
from engine.plan import missing, reasons
from engine.plan.corpus import CorpusPlan, LabelerUse
from engine.plan.costs import Cost, Measured
from engine.plan.groups import Group, groups
from engine.plan.items import Target, WorkItem
from engine.plan.missing import Wanted
from engine.plan.reasons import NewSamples
from engine.progress.record import Execution
from engine.run.commit import Committer
from engine.run.runners.pools import workers_of
from engine.run.runners.protocol import Runner
from engine.run.runners.queue import in_turn
from engine.show.tables import plain_lines
from manifests.catalog.catalog import Catalog
from manifests.log.actions import TokenizerAdded
from manifests.queries import planning


@dataclass(frozen=True, kw_only=True)
class Job:
    """Says what a group of a corpus has to do: in how many parts something is missing, their rows, the missing shards.

    rows_by_labeler   the rows of the parts in which a labeler has work, of each that has any
    samples_by_form   of how many samples each form of a modality ("modality/form") is to be written: one crop of three is
                      a third of its sample

    With a selection only rows that it picks count, and the figures are upper bounds: which shards miss one of them is
    seen when the shards are read.
    """

    plan: CorpusPlan
    group: Group
    parts: int
    rows: int
    shards: int
    rows_by_labeler: tuple[tuple[LabelerUse, int], ...]
    samples_by_form: Mapping[str, float]

    def costs(self, measured: Sequence[Measured]) -> list[Cost]:
        """Returns what the job takes: each of its labelers, and last what they share. A form without a probe is left out."""
        found = []
        for (_, count), one in zip(self.rows_by_labeler, measured, strict=True):
            size = sum(one.bytes_by_form.get(form, 0.0) * written for form, written in self.samples_by_form.items())
            found.append(Cost(hours=count * one.label_s / 3600, size_bytes=size, on_gpu=one.on_gpu))
        # The rest was measured with all labelers of a group at work. With fewer of them it is at most as much.
        rest_s = max(one.rest_s for one in measured)
        rest = Cost(hours=self.rows * rest_s / 3600, size_bytes=0, on_gpu=any(one.on_gpu for one in measured))
        return [*found, rest]


def jobs(
    catalog: Catalog,
    plans: Mapping[str, CorpusPlan],
    engine: EngineConfig,
    wanted: Wanted,
    new: Mapping[str, NewSamples] | None = None,
) -> list[Job]:
    """Returns the jobs of all corpora, in order. `new` samples by corpus, which are not ingested yet, count too."""
    found = []
    for planned in plans.values():
        count = partial(_count, catalog, planned.corpus, wanted, (new or {}).get(planned.corpus, NewSamples()))
        for group in groups(planned, engine):
            targets = missing.group_targets(planned, group, wanted.forms)
            counts = count(targets)
            if not counts["parts"]:
                continue
            rows = []
            for use in group.labelers:
                made = {output.name for output in use.outputs}
                rows.append((use, count([target for target in targets if target.modality in made])["rows"]))
            by_form: dict[str, list[Target]] = {}
            for target in targets:
                by_form.setdefault(f"{target.modality}/{target.form}", []).append(target)
            samples = {}
            for form, own in by_form.items():
                missed = count(own)
                samples[form] = missed["rows"] * missed["shards"] / max(1, missed["parts"] * len(own))
            found.append(
                Job(
                    plan=planned,
                    group=group,
                    rows_by_labeler=tuple((use, number) for use, number in rows if number),
                    samples_by_form={form: number for form, number in samples.items() if number},
                    **counts,
                )
            )
    return found


def _count(catalog: Catalog, corpus: str, wanted: Wanted, new: NewSamples, targets: Sequence[Target]) -> dict[str, int]:
    """Counts what is missing of some targets: `parts`, their `rows`, and `shards`."""
    if not targets:
        return {"parts": 0, "rows": 0, "shards": 0}
    among = None if wanted.picked is None else wanted.picked.parts(corpus)
    counts = planning.to_do(catalog, corpus, missing.places_of(targets), retry=wanted.retry, among=among)
    if wanted.picked is not None:
        counts["rows"] = math.ceil(counts["rows"] * wanted.picked.share(corpus))
    coming = {"parts": new.parts, "rows": new.rows, "shards": new.parts * len(targets)}
    return {name: number + coming[name] for name, number in counts.items()}


def items(
    catalog: Catalog, found: Sequence[Job], tokenizers: Mapping[str, TokenizerAdded], wanted: Wanted
) -> Iterator[WorkItem]:
    """Yields the items of jobs: those of a pool group by group, the pools by turns."""
    by_pool: dict[str, list[Iterator[WorkItem]]] = {}
    for job in found:
        by_pool.setdefault(job.group.pool, []).append(
            missing.work_items(catalog, job.plan, job.group, tokenizers, wanted)
        )
    return in_turn(chain.from_iterable(streams) for streams in by_pool.values())


def label(
    execution: Execution,
    plans: Mapping[str, CorpusPlan],
    tokenizers: Mapping[str, TokenizerAdded],
    engine: EngineConfig,
    wanted: Wanted,
    runner: Callable[[int], Runner],
) -> None:
    """Labels and tokenizes everything that is missing. `runner(n)` starts a runner for at most n items, if there are any.

    Raises TooManyFailures if more rows or items fail than the pipeline file allows; what is done is committed.
    """
    catalog, progress = execution.catalog, execution.progress
    found = jobs(catalog, plans, engine, wanted)
    stream = items(catalog, found, tokenizers, wanted)
    first = next(stream, None)
    if first is None:
        return
    lines = [line for planned in plans.values() for line in reasons.lines(catalog, planned, wanted)]
    lines = [line for line in lines if line.to_do]
    items_to_do = sum(job.parts for job in found)
    most = "at most " if wanted.picked is not None else ""
    shards, rows = sum(job.shards for job in found), sum(job.rows for job in found)
    head = f"to do: {most}{shards:,} shards in {items_to_do:,} work items ({rows:,} samples to read)"
    for text in (*plain_lines(reasons.table(lines), reasons.NUMBERS), head):
        progress.say(text)
    parts: dict[str, int] = {}
    for corpus in plans:
        of_corpus = [line for line in lines if line.corpus == corpus]
        for name in dict.fromkeys(line.modality for line in of_corpus):
            parts[name] = parts.get(name, 0) + max(line.to_do for line in of_corpus if line.modality == name)
    working = runner(items_to_do)
    committer = Committer(execution, engine)
    progress.plan(parts, workers_of(engine), engine.gpu_hour_price)
    try:
        with closing(working.work(chain([first], stream), progress)) as done:
            for pairs in done:
                committer.add(pairs)
    finally:
        committer.summarize()
