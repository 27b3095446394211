"""Does `modmill run FILE --dry-run`: tells what would be done, why, at what cost, and shows samples of the result.

The workspace is not changed, and none is made: sources are listed and not ingested, and labelers that have work are
probed in a workspace that is thrown away.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from engine.ingest import ingest
from engine.ingest.filters import OTHER_KIND
from engine.pipeline import config as pipeline
from engine.plan import costs, reasons
from engine.plan.corpus import corpus_plan, suffixes_in, tokenizer_names
from engine.plan.reasons import NewSamples
from engine.progress import table as progress_table
from engine.progress.progress import Progress
from engine.run import labeling
from engine.run.job import (
    STEPS,
    Step,
    check_cluster,
    trainer,
    wanted_of,
)
from engine.run.labeling import Job
from engine.run.probe import SAMPLES, Probe, scratch
from engine.run.runners.pools import workers_of
from engine.show import contact_sheet
from engine.show.tables import plain_lines
from engine.sources import scan as sources
from engine.sources.listing import suffixes_of
from manifests import units
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError
from manifests.log.actions import TokenizerAdded
from manifests.queries import planning
from manifests.store import paths
from manifests.store.storage import open_storage

_WALLS = (1, 10, 100)
_NOTHING_S = 1e-4
_COLUMNS = ("corpus", "group", "labeler", "samples", "images/s", "ms each", "hours", "written")


@dataclass(frozen=True, kw_only=True)
class _ListedSource:
    """Holds a corpus as a dry run sees it: where its source is, what is listed there, what is new, all names' suffixes."""

    root: str
    scan: sources.Scan | None
    new: NewSamples
    suffixes: frozenset[str]


def dry_run(
    config: pipeline.PipelineConfig,
    *,
    steps: Sequence[Step] = STEPS,
    refit: bool = False,
    retry: Collection[str] | None = None,
    where: str | None = None,
    sheet: Path | None = None,
    quiet: bool = False,
) -> list[str]:
    """Returns lines of text: what a run with these options would do, and at what cost.

    The contact sheet is written to `sheet`, by default `probe-<corpus>.png` in the current folder. Raises ConfigError
    if the sheet would lie in the workspace. Raises also what the run would raise before its first work item.
    """
    pipeline.check_labelers(config)
    if config.train and "train" in steps:
        trainer(config.train, quiet=True)
    check_cluster(config.engine, steps)
    path = sheet or Path(f"probe-{'-'.join(config.corpora)}.png")
    workspace = open_storage(config.workspace)
    if workspace.is_local and path.absolute().is_relative_to(workspace.root):
        raise ConfigError(
            f"the contact sheet {path} lies in the workspace, which a dry run does not change; start from another folder"
        )
    is_there = workspace.exists(paths.FORMAT)
    if where is not None and not is_there:
        raise ConfigError("--where asks for samples, and there are none yet; run with --only ingest first")
    with ExitStack() as stack:
        progress = Progress(None, quiet=quiet)
        stack.callback(progress.close)
        empty = stack.enter_context(scratch())
        # If there is no workspace, the empty one answers.
        catalog = stack.enter_context(Catalog.open(workspace.uri)) if is_there else empty
        dry = _Dry(config, catalog, empty, progress, steps)
        return dry.lines(refit=refit, retry=retry, where=where, path=path)


@dataclass(frozen=True)
class _Dry:
    """Plans and probes one run. `catalog` is the workspace's, `scratch` that of the probe."""

    config: pipeline.PipelineConfig
    catalog: Catalog
    scratch: Catalog
    progress: Progress
    steps: Sequence[Step]

    def lines(self, *, refit: bool, retry: Collection[str] | None, where: str | None, path: Path) -> list[str]:
        config, catalog = self.config, self.catalog
        found = {name: self._look_at(name, section) for name, section in config.corpora.items()}
        lines = list(self._listed(found))
        fitted = {name: catalog.tokenizer(name) for name in sorted(tokenizer_names(config))}
        missing = {name for name, known in fitted.items() if known is None or refit} if "fit" in self.steps else set()
        known = {name: known for name, known in fitted.items() if known is not None and name not in missing}
        tokenizers = {**known, **{name: _unfitted(name) for name in missing}}
        plans = {
            name: corpus_plan(config, name, source.root, tokenizers, source.suffixes) for name, source in found.items()
        }
        made = [modality for planned in plans.values() for modality in planned.modalities.values()]
        unfitted = frozenset(each.modality.name for each in made if each.wants_tokens and each.tokenizer in missing)
        wanted = wanted_of(catalog, plans, self.steps, retry=retry, where=where)
        new = {name: source.new if where is None else NewSamples() for name, source in found.items()}
        told = [
            line
            for name, planned in plans.items()
            for line in reasons.lines(catalog, planned, wanted, unfitted=unfitted, new=new[name])
            if line.to_do
        ]
        jobs = labeling.jobs(catalog, plans, config.engine, wanted, new)
        if not told or not jobs:
            return [*lines, "nothing to label: everything in the pipeline file is done"]
        probe = Probe(
            config=config,
            catalog=catalog,
            scratch=self.scratch,
            scans={name: source.scan for name, source in found.items()},
            wanted=wanted,
            tokenizers=known,
            unfitted=unfitted,
            progress=self.progress,
        )
        lines += ["", *plain_lines(reasons.table(told), reasons.NUMBERS), "", *_probed(probe, jobs, path)]
        if where is not None:
            lines.append("what of it has the rows picked already is seen when the run looks at it")
        return lines

    def _look_at(self, corpus: str, section: pipeline.CorpusConfig) -> _ListedSource:
        if "ingest" not in self.steps:
            root = ingest.root_of(self.catalog, corpus, section)
            return _ListedSource(
                root=root,
                scan=None,
                new=NewSamples(),
                suffixes=suffixes_in(planning.image_inputs(self.catalog, corpus)),
            )
        ingest.check_unchanged(self.catalog, corpus, section)
        scan = sources.scan(section)
        found = self.catalog.sql(
            "SELECT key, source FROM samples WHERE corpus = $1 "
            f"UNION ALL SELECT key, NULL FROM dropped WHERE corpus = $1 AND reason <> '{OTHER_KIND}'",
            [corpus],
        )
        known = set(found["key"].to_pylist())
        names = [*filter(None, found["source"].to_pylist()), *(listed.source for listed in scan.samples)]
        rows = sum(listed.key not in known for listed in scan.samples)
        return _ListedSource(
            root=scan.root,
            scan=scan,
            new=NewSamples(parts=-(-rows // section.part_rows), rows=rows),
            suffixes=suffixes_of(names),
        )

    def _listed(self, found: Mapping[str, _ListedSource]) -> Iterator[str]:
        for name, source in found.items():
            if source.scan is None:
                continue
            # A filter knows of a sample only when its bytes are read.
            rules = self.config.corpora[name].filter.model_dump(exclude_defaults=True) if source.new.rows else None
            before = f", before the filter ({', '.join(rules)}), which is not in these figures" if rules else ""
            listed = f"{len(source.scan.samples):,} samples in the source"
            yield f"{name}: {listed}, {source.new.rows:,} to be ingested{before}"
            yield from (f"{name}: note: {note}" for note in source.scan.notes)


def _probed(probe: Probe, jobs: Sequence[Job], path: Path) -> Iterator[str]:
    """Probes each job, yields what they take, and draws the contact sheet."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    found: list[costs.Cost] = []
    for job in jobs:
        measured = probe.measure(job)
        of_job = job.costs(measured)
        found += of_job
        named = [
            (use.name, count, one.label_s) for (use, count), one in zip(job.rows_by_labeler, measured, strict=True)
        ]
        for (name, count, seconds), cost in zip(
            [*named, ("the rest", job.rows, measured[0].rest_s)], of_job, strict=True
        ):
            # A labeler that only passes columns on has no rate worth a number.
            rate = progress_table.rate_words(1 / seconds if seconds > _NOTHING_S else None) or "-"
            cells = (job.plan.corpus, job.group.name or "-", name, f"{count:,}", rate, f"{1000 * seconds:,.1f}")
            rows.append((*cells, cost.hours_words, units.size(cost.size_bytes)))
    whole, price = costs.total(found), probe.config.engine.gpu_hour_price
    # No two workers share an item.
    items = sum(job.parts for job in jobs)
    walls = [whole.wall(n) for n in sorted({min(n, items) for n in (workers_of(probe.config.engine), *_WALLS)})]
    more = f"; more workers than {items:,} find no work" if items < max(_WALLS) else ""
    yield (
        f"by a probe of up to {SAMPLES} samples on this machine ({_machine()}); the rest is decoding, crops, "
        "tokens and files:"
    )
    yield from plain_lines(rows, range(3, len(_COLUMNS)))
    yield f"in all: {whole.words(price)}{'' if price is not None else ' (dollars: --set engine.gpu_hour_price=PRICE)'}"
    yield f"wall time: {', '.join(walls)}{more}"
    if probe.unfitted:
        names = ", ".join(sorted(probe.unfitted))
        yield f"not in these figures: fitting the tokenizers of {names}, and their tokens"
    yield from probe.failed
    yield from _draw(probe, jobs, path)


def _draw(probe: Probe, jobs: Sequence[Job], path: Path) -> Iterator[str]:
    """Writes the contact sheet, and yields lines about it."""
    notes: list[str] = []
    try:
        shown = probe.shown(jobs, notes)
        if any(card.label is not None or card.decoded is not None for sample in shown for card in sample.cards):
            contact_sheet.write_picture(shown, path)
            told = f"look at it before you spend: {path}"
        else:
            told = "nothing came of the samples that would be on the contact sheet: there is none"
    except OSError as error:
        told = f"the contact sheet cannot be written to {path} ({error.strerror}); start from another folder"
    yield from (f"not shown: {note}" for note in notes)
    yield told


def _machine() -> str:
    """Returns the processors and GPUs that a probe's figures hold for; a moment's work, without torch."""
    texts = [path.read_text() for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    gpus = [line.partition(":")[2].strip() for text in texts for line in text.splitlines() if line.startswith("Model:")]
    return f"{os.cpu_count()} cores, {f'{len(gpus)} x {gpus[0]}' if gpus else 'no GPU'}"


def _unfitted(name: str) -> TokenizerAdded:
    """Stands for a tokenizer that is still to be fitted, so that its tokens are counted as missing."""
    return TokenizerAdded(
        name=name,
        digest="unfitted",
        path="",
        family="unfitted",
        family_version=0,
        vocabulary=0,
        options={},
        rows=0,
        metrics={},
    )
