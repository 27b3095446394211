"""`modmill run FILE --dry-run`: what would be done and why, what it would take, and what would come of it.

Nothing in the workspace changes, and none is made: sources are listed and not ingested, and labelers that have work are
probed in a workspace that is thrown away.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.ingest import ingest
from engine.pipeline import config as pipeline
from engine.plan import costs as probe
from engine.plan import reasons
from engine.plan.corpus import corpus_plan
from engine.plan.missing import Request
from engine.plan.reasons import NewSamples
from engine.progress import table as progress_table
from engine.progress.progress import Progress
from engine.run import labeling
from engine.run.job import (
    STEPS,
    Step,
    check_cluster,
    request_of,
    tokenizer_names,
    trainer,
    worker_settings,
    workers_of,
)
from engine.run.labeling import Job
from engine.sources import scan as sources
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError
from manifests.log.actions import TokenizerAdded
from manifests.log.entries import FORMAT_PATH
from manifests.queries import planning
from manifests.store.storage import Storage, open_storage

if TYPE_CHECKING:
    import pyarrow as pa


_WALLS = (1, 10, 100)
_PARTS_PROBED = 8
_NOTHING_S = 1e-4


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    """A corpus as a dry run sees it: where its source is, what is listed there, and what of it is new."""

    root: str
    scan: sources.Scan | None
    new: NewSamples


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
    """What a run with these options would do, and at what cost, as lines of text.

    The contact sheet is written to `sheet`, by default `probe-<corpus>.png` in the current folder. Raises ConfigError
    where the sheet would lie in the workspace, and what the run would raise before its first work item.
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
    with ExitStack() as stack:
        progress = Progress(None, quiet=quiet)
        stack.callback(progress.close)
        is_there = workspace.exists(FORMAT_PATH)
        if where is not None and not is_there:
            raise ConfigError("--where asks for samples, and there are none yet; run with --only ingest first")
        # Where there is no workspace, an empty one answers.
        from engine.run.probe import scratch

        bench_storage = stack.enter_context(scratch())
        catalog = stack.enter_context(Catalog.open(workspace.uri) if is_there else Catalog(bench_storage))
        return _Dry(config, steps, catalog, workspace, bench_storage, progress).lines(
            refit=refit, retry=retry, where=where, path=path
        )


class _Dry:
    """One dry run."""

    def __init__(
        self,
        config: pipeline.PipelineConfig,
        steps: Sequence[Step],
        catalog: Catalog,
        workspace: Storage,
        scratch: Storage,
        progress: Progress,
    ) -> None:
        self._config = config
        self._steps = steps
        self._catalog = catalog
        self._workspace = workspace
        self._scratch = scratch
        self._progress = progress
        self._corpora = {name: self._look_at(name, section) for name, section in config.corpora.items()}

    def lines(self, *, refit: bool, retry: Collection[str] | None, where: str | None, path: Path) -> list[str]:
        fitted = {name: self._catalog.tokenizer(name) for name in sorted(tokenizer_names(self._config))}
        missing = {name for name, known in fitted.items() if known is None or refit} if "fit" in self._steps else set()
        tokenizers = {**{name: known for name, known in fitted.items() if known is not None}}
        tokenizers |= {name: _unfitted(name) for name in missing}
        plans = {
            name: corpus_plan(self._config, name, corpus.root, tokenizers) for name, corpus in self._corpora.items()
        }
        unfitted = frozenset(
            name
            for planned in plans.values()
            for name, modality in planned.modalities.items()
            if modality.wants_tokens and modality.tokenizer in missing
        )
        request = request_of(self._catalog, plans, self._steps, retry=retry, where=where)
        new = {name: corpus.new for name, corpus in self._corpora.items() if where is None}
        told = [
            line
            for name, planned in plans.items()
            for line in reasons.lines(self._catalog, planned, request, unfitted=unfitted, new=new.get(name))
            if line.to_do
        ]
        head = self._listed()
        found = labeling.jobs(self._catalog, plans, self._config.engine, request, new)
        if not told or not found:
            return [*head, "nothing to label: everything in the pipeline file is done"]
        text = [
            *head,
            "",
            *reasons.table(told).splitlines(),
            "",
            *self._probed(found, tokenizers, unfitted, request, path),
        ]
        if where is not None:
            text.append("what of it has the rows picked already is seen when the run looks at it")
        return text

    # -- sources ------------------------------------------------------------------------------------------------------

    def _look_at(self, corpus: str, section: pipeline.CorpusConfig) -> _Corpus:
        nothing = NewSamples(parts=0, rows=0)
        if "ingest" not in self._steps:
            return _Corpus(root=ingest.root_of(self._catalog, corpus, section), scan=None, new=nothing)
        scan = sources.scan(section)
        known: set[str] = set()
        if planning.last_part(self._catalog, corpus) >= 0:
            keys = self._catalog.sql(
                "SELECT key FROM samples WHERE corpus = $1 UNION ALL SELECT key FROM dropped WHERE corpus = $1",
                [corpus],
            )
            known = set(keys["key"].to_pylist())
        rows = sum(listed.key not in known for listed in scan.samples)
        return _Corpus(root=scan.root, scan=scan, new=NewSamples(parts=-(-rows // section.part_rows), rows=rows))

    def _listed(self) -> list[str]:
        return [
            f"{name}: {len(corpus.scan.samples):,} samples in the source, {corpus.new.rows:,} to be ingested"
            f"{self._filtered(name) if corpus.new.rows else ''}"
            for name, corpus in self._corpora.items()
            if corpus.scan is not None
        ]

    def _filtered(self, corpus: str) -> str:
        """What is said of new samples that a filter will look at: it knows of each only when its bytes are read."""
        rules = self._config.corpora[corpus].filter.model_dump(exclude_defaults=True)
        return f", before the filter ({', '.join(rules)}), which is not in these figures" if rules else ""

    # -- the probe ----------------------------------------------------------------------------------------------------

    def _probed(
        self,
        found: Sequence[Job],
        tokenizers: Mapping[str, TokenizerAdded],
        unfitted: frozenset[str],
        request: Request,
        path: Path,
    ) -> list[str]:
        from engine.run import probe as probe_run
        from engine.show import contact_sheet

        engine = self._config.engine
        bench = probe_run.Bench(
            storage=self._scratch,
            engine=engine,
            tokenizers={name: known for name, known in tokenizers.items() if known.path},
            unfitted=unfitted,
            pick=lambda corpus, most: self._pick(corpus, most, request),
            settings=lambda pool: worker_settings(engine, "probe", pool),
            progress=self._progress,
        )
        for known in bench.tokenizers.values():
            for name in self._workspace.names(known.path):
                self._scratch.put(f"{known.path}/{name}", self._workspace.read(f"{known.path}/{name}"))
        rows = [("corpus", "group", "labeler", "samples", "images/s", "ms each", "hours", "written")]
        costs: list[probe.Cost] = []
        for job in found:
            labelers = [
                (measured, count, {f: n for f, n in job.samples_of(use).items() if f in measured.bytes_by_form})
                for measured, (use, count) in zip(probe_run.measure(bench, job), job.rows_by_labeler, strict=True)
            ]
            of_job = probe.costs(job.rows, labelers)
            costs += of_job
            named = [
                (use.name, count, measured.label_s)
                for (measured, count, _), (use, _) in zip(labelers, job.rows_by_labeler, strict=True)
            ]
            named.append(("the rest", job.rows, labelers[0][0].rest_s))
            for (name, count, seconds), cost in zip(named, of_job, strict=True):
                # What only hands on has no rate worth a number.
                rate = progress_table.rate_words(1 / seconds if seconds > _NOTHING_S else None) or "-"
                rows.append(
                    (
                        *(job.plan.corpus, job.group.name or "-", name, f"{count:,}", rate),
                        *(f"{1000 * seconds:,.1f}", cost.hours_words, probe.readable(cost.size_bytes)),
                    )
                )
        whole = probe.total(costs)
        workers = workers_of(engine)
        # No two workers share an item.
        items = sum(job.parts for job in found)
        counts = sorted({min(number, items) for number in (workers, *_WALLS)})
        walls = ", ".join(whole.wall(number) for number in counts)
        if items < max(_WALLS):
            walls += f"; more find nothing to do in {items:,} work item{'s' * (items != 1)}"
        notes: list[str] = []
        try:
            shown = probe_run.shown(bench, found, notes)
            if any(card.label is not None or card.decoded is not None for sample in shown for card in sample.cards):
                contact_sheet.write_picture(shown, path)
                looked = f"look at it before you spend: {path}"
            else:
                looked = "nothing came of the samples that would be on the contact sheet: there is none"
        except OSError as error:
            looked = f"the contact sheet cannot be written to {path} ({error.strerror}); start from another folder"
        price = engine.gpu_hour_price
        return [
            f"by a probe of up to {probe_run.SAMPLES} samples on this machine ({probe.machine_words()}); the rest is decoding, "
            "crops, tokens and files:",
            *reasons.aligned(rows, right=range(3, len(rows[0]))).splitlines(),
            f"in all: {whole.words(price)}{'' if price is not None else ' (dollars: --set engine.gpu_hour_price=PRICE)'}",
            f"wall time: {walls}",
            *_about_tokenizers(unfitted),
            *bench.failed,
            *(f"not shown: {note}" for note in notes),
            looked,
        ]

    def _pick(self, corpus: str, most: int, request: Request) -> "pa.Table":
        """Samples of a corpus, spread over its parts where it has some, else over its source."""
        import pyarrow as pa

        from engine.run import probe as probe_run

        among = None if request.selection is None else request.selection.parts(corpus)
        parts = planning.spread_parts(self._catalog, corpus, _PARTS_PROBED, among=among)
        if parts:
            tables = [self._rows_of(part, request, -(-most // len(parts))) for part in parts]
            table = pa.concat_tables(tables, promote_options="permissive").slice(0, most)
            return probe_run.repacked(table, corpus, self._workspace, self._scratch)
        scan = self._corpora[corpus].scan
        assert scan is not None
        chosen = [scan.samples[place] for place in probe_run.spread(len(scan.samples), most)]
        return probe_run.ingested(self._scratch, corpus, self._config.corpora[corpus], replace(scan, samples=chosen))

    def _rows_of(self, part: "planning.PartAdded", request: Request, most: int) -> "pa.Table":
        import numpy as np

        from engine.plan.selection import unpacked
        from engine.run import probe as probe_run
        from manifests.store import parquet

        with self._workspace.open(part.path) as file:
            table = parquet.read(file)
        usable = table["sha256"].is_valid().to_numpy(zero_copy_only=False)
        bits = None if request.selection is None else request.selection.bits(part.corpus, part.part)
        if bits is not None:
            usable = usable & unpacked(bits, part.rows)
        places = np.flatnonzero(usable)
        return table.take(places[probe_run.spread(len(places), most)])


def _unfitted(name: str) -> TokenizerAdded:
    """What stands for a tokenizer that is still to be fitted, so that its tokens are counted as missing."""
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


def _about_tokenizers(unfitted: frozenset[str]) -> list[str]:
    if not unfitted:
        return []
    names = ", ".join(sorted(unfitted))
    return [
        f"of {names} labels only, as tokenizers are still to be fitted: fitting and tokens are not in these figures"
    ]
