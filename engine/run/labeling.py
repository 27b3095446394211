"""Runs the labeling of a run: says what will be done and why, hands items to a runner, and has their records committed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from engine.pipeline.config import EngineConfig
from engine.plan import missing, reasons
from engine.plan.corpus import CorpusPlan, LabelerUse
from engine.plan.costs import Cost, Measured, costs, known, model_bytes, total
from engine.plan.groups import Group, groups
from engine.plan.items import Target, WorkItem
from engine.plan.missing import Wanted
from engine.plan.reasons import NewSamples
from engine.progress.record import Execution
from engine.run.alarms import Alarms
from engine.run.commit import Committer
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

    def costs(self, measured: Sequence[Measured], *, only_measured: bool = False) -> list[Cost]:
        """Returns what the job takes: each of its labelers, and last what they share.

        `only_measured` leaves out bytes of forms that no probe wrote; else the bytes of such a labeler are NaN.
        """
        labelers = []
        for (use, count), one in zip(self.rows_by_labeler, measured, strict=True):
            made = {output.name for output in use.outputs}
            samples = {form: n for form, n in self.samples_by_form.items() if form.partition("/")[0] in made}
            if only_measured:
                samples = {form: n for form, n in samples.items() if form in one.bytes_by_form}
            labelers.append((one, count, samples))
        return costs(self.rows, labelers)


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
        for group in groups(
            planned, engine, lambda use, pool, planned=planned: model_bytes(planned, use, engine, pool)
        ):
            coming = (new or {}).get(planned.corpus)
            targets = missing.group_targets(planned, group, wanted.forms)
            counts = _count(catalog, planned, targets, wanted, coming)
            if not counts["parts"]:
                continue
            rows = []
            for use in group.labelers:
                made = {output.name for output in use.outputs}
                own = [target for target in targets if target.modality in made]
                rows.append((use, _count(catalog, planned, own, wanted, coming)["rows"]))
            by_form: dict[str, list[Target]] = {}
            for target in targets:
                by_form.setdefault(f"{target.modality}/{target.form}", []).append(target)
            samples = {}
            for form, own in by_form.items():
                missed = _count(catalog, planned, own, wanted, coming)
                samples[form] = missed["rows"] * missed["shards"] / max(1, missed["parts"] * len(own))
            found.append(
                Job(
                    plan=planned,
                    group=group,
                    rows_by_labeler=tuple((use, count) for use, count in rows if count),
                    samples_by_form={form: count for form, count in samples.items() if count},
                    **counts,
                )
            )
    return found


def _count(
    catalog: Catalog,
    planned: CorpusPlan,
    targets: Sequence[Target],
    wanted: Wanted,
    new: NewSamples | None,
) -> dict[str, int]:
    """Counts what is missing of some targets: `parts`, their `rows`, and `shards`."""
    if not targets:
        return {"parts": 0, "rows": 0, "shards": 0}
    among = None if wanted.picked is None else wanted.picked.parts(planned.corpus)
    counts = planning.to_do(catalog, planned.corpus, missing.places_of(targets), retry=wanted.retry, among=among)
    if wanted.picked is not None:
        counts["rows"] = math.ceil(counts["rows"] * wanted.picked.share(planned.corpus))
    if new is None:
        return counts
    coming = {"parts": new.parts, "rows": new.rows, "shards": new.parts * len(targets)}
    return {name: count + coming[name] for name, count in counts.items()}


def known_cost(job: Job, engine: EngineConfig) -> Cost | None:
    """Returns what a job takes by earlier probes, None if one of its labelers was never probed."""
    found = [known(job.plan, use, engine, job.group.pool) for use, _ in job.rows_by_labeler]
    measured = [one for one in found if one is not None]
    return total(job.costs(measured)) if len(measured) == len(found) else None


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
    *,
    workers: int,
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
    for text in (*plain_lines(reasons.table(lines), reasons.NUMBERS), *_head(found, engine, wanted, workers)):
        progress.say(text)
    parts: dict[str, int] = {}
    for corpus in plans:
        of_corpus = [line for line in lines if line.corpus == corpus]
        for name in dict.fromkeys(line.modality for line in of_corpus):
            parts[name] = parts.get(name, 0) + max(line.to_do for line in of_corpus if line.modality == name)
    working = runner(sum(job.parts for job in found))
    committer = Committer(execution, engine, Alarms(catalog))
    progress.plan(parts, workers, engine.gpu_hour_price)
    try:
        for pairs in working.work(chain([first], stream), progress):
            committer.add(pairs)
    finally:
        committer.summarize()


def _head(found: Sequence[Job], engine: EngineConfig, wanted: Wanted, workers: int) -> list[str]:
    most = "at most " if wanted.picked is not None else ""
    parts = sum(job.parts for job in found)
    shards, rows = sum(job.shards for job in found), sum(job.rows for job in found)
    lines = [f"to do: {most}{shards:,} shards in {parts:,} work items ({rows:,} samples to read)"]
    known_costs = [known_cost(job, engine) for job in found]
    if None not in known_costs:
        cost = total(cost for cost in known_costs if cost is not None)
        lines.append(f"by the last probe: {cost.words(engine.gpu_hour_price)}, {cost.wall(min(workers, parts))}")
    return lines
