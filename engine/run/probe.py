"""Probes the work to do: the real worker labels some samples of each corpus, in a workspace that is thrown away.

The probe tells what the work will take, and shows its result on one contact sheet. It needs no Ray.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from engine.ingest import ingest
from engine.ingest.part import put_part
from engine.pipeline.config import PipelineConfig
from engine.plan import missing as plan
from engine.plan.corpus import CorpusPlan
from engine.plan.costs import Measured
from engine.plan.items import ItemResult, WorkItem
from engine.plan.missing import Wanted
from engine.plan.where import unpacked
from engine.progress.progress import Progress
from engine.run.commit import JUDGED_FROM_ROWS, commit_recipes
from engine.run.job import worker_settings
from engine.run.labeling import Job
from engine.run.runners.pools import pools
from engine.show import contact
from engine.sources.scan import Scan
from engine.work.worker import Worker
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError
from manifests.formats.shards import encode_samples
from manifests.log import entries as log
from manifests.log.actions import PartAdded, ShardAdded, TokenizerAdded
from manifests.queries import planning
from manifests.recipe import sha256_hex
from manifests.store import parquet, paths
from manifests.store.storage import cache_folder, open_storage, put_same

SAMPLES = 64
SHOWN = 6
_PARTS_PROBED = 8
_RUN = "probe"


@contextmanager
def scratch() -> Iterator[Catalog]:
    """Opens a new workspace in a temporary folder; deletes it and its cache at the end."""
    with tempfile.TemporaryDirectory(prefix="modmill-probe-") as folder:
        storage = open_storage(folder)
        identity = log.create_workspace(storage)
        try:
            with Catalog(storage) as catalog:
                yield catalog
        finally:
            shutil.rmtree(cache_folder() / identity, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Labels some samples of a pipeline's corpora in a scratch workspace.

    catalog     of the workspace, which is only read
    scratch     of the probe's own workspace
    scans       the sources as they were listed, by corpus: samples come from there if the corpus has no parts yet
    wanted      which rows of the parts may be probed
    tokenizers  those that are fitted
    unfitted    modalities whose tokenizer is still to be fitted: only their labels are probed
    failed      what failed of the samples, in words; filled by `measure`
    """

    config: PipelineConfig
    catalog: Catalog
    scratch: Catalog
    scans: Mapping[str, Scan | None]
    wanted: Wanted
    tokenizers: Mapping[str, TokenizerAdded]
    unfitted: frozenset[str]
    progress: Progress
    failed: list[str] = field(default_factory=list)
    _workers: dict[str, Worker] = field(default_factory=dict)
    _made: dict[str, list[ShardAdded]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for known in self.tokenizers.values():
            for name in self.catalog.storage.names(known.path):
                path = f"{known.path}/{name}"
                self.scratch.storage.put(path, self.catalog.storage.read(path))
        self.scratch.commit(list(self.tokenizers.values()), run=_RUN)

    def measure(self, job: Job) -> list[Measured]:
        """Probes a job and returns what each labeler with work takes, in the order of `job.rows_by_labeler`."""
        if job.plan.corpus not in self._made:
            self._add_parts(job.plan)
        worker = self._worker(job.group.pool)
        probed = self._without_unfitted(job.plan)
        item = self._items(job, probed)[0]
        name = f"probe {job.plan.corpus}{f'/{job.group.name}' if job.group.name else ''}"
        self.progress.stage(name, item.part.rows, "samples")
        # The samples of the sheet go first: they load the models, so that the others are measured without that.
        self._made[job.plan.corpus] += worker.work(self._items(job, _all_kept(probed))[1]).records
        result = worker.work(item, lambda beat: self.progress.update(name, min(beat.rows, item.part.rows)))
        self.progress.update(name, item.part.rows)
        self.failed.extend(self._failed(job, item, result))
        return [*self._measured(job, worker, item, result)]

    def shown(self, jobs: Sequence[Job], notes: list[str]) -> list[contact.SheetSample]:
        """Returns some samples of each measured corpus with all that was made of them, tokens decoded too.

        What cannot be shown is told in `notes`.
        """
        found: list[contact.SheetSample] = []
        for corpus, planned in {job.plan.corpus: job.plan for job in jobs}.items():
            commit_recipes(self.scratch, {corpus: _all_kept(self._without_unfitted(planned))}, run=_RUN)
            self.scratch.commit(self._made[corpus], run=_RUN)
            found += contact.samples(self.scratch, corpus, SHOWN, notes)
        return found

    def _worker(self, pool: str) -> Worker:
        if pool not in self._workers:
            engine = self.config.engine
            settings = pools(engine, worker_settings(engine, _RUN), has_gpus=False)[pool].settings
            self._workers[pool] = Worker(self.scratch.storage.uri, settings)
        return self._workers[pool]

    def _without_unfitted(self, planned: CorpusPlan) -> CorpusPlan:
        """Returns the plan with labels in place of the tokens that cannot be made yet."""
        labels = {
            n: replace(planned.modalities[n], keep=True, token=None) for n in self.unfitted & {*planned.modalities}
        }
        return replace(planned, modalities={**planned.modalities, **labels})

    def _items(self, job: Job, planned: CorpusPlan) -> list[WorkItem]:
        """Returns the items of the samples to be measured and of those to be shown, for the labelers with work."""
        group = replace(job.group, labelers=tuple(use for use, _ in job.rows_by_labeler))
        return list(plan.work_items(self.scratch, planned, group, self.tokenizers, Wanted()))[-2:]

    # -- samples ------------------------------------------------------------------------------------------------------

    def _add_parts(self, planned: CorpusPlan) -> None:
        """Adds two parts of a corpus's samples to the scratch workspace: those to be measured, then those to be shown."""
        corpus = planned.corpus
        self._made[corpus] = []
        table = self._picked(corpus)
        self.scratch.commit([ingest.corpus_added(corpus, planned.config)], run=_RUN)
        for most in (SAMPLES, SHOWN):
            rows = table.take(pa.array(_spread(table.num_rows, most)))
            number = planning.last_part(self.scratch, corpus) + 1
            for name, values in (("part", [number] * rows.num_rows), ("row", list(range(rows.num_rows)))):
                rows = _with_column(rows, name, values)
            keys = rows["key"].to_pylist()
            part = put_part(self.scratch.storage, corpus, number, keys, encode_samples(rows))
            self.scratch.commit([part], run=_RUN)

    def _picked(self, corpus: str) -> pa.Table:
        """Returns samples of a corpus as rows of samples files, spread over its parts if it has some, else over its source."""
        picked = self.wanted.picked
        among = None if picked is None else picked.parts(corpus)
        parts = planning.spread_parts(self.catalog, corpus, _PARTS_PROBED, among=among)
        if parts:
            each = -(-SAMPLES // len(parts))
            tables = [self._rows_of(part, each) for part in parts]
            return self._repacked(corpus, pa.concat_tables(tables, promote_options="permissive").slice(0, SAMPLES))
        scan = self.scans[corpus]
        assert scan is not None
        chosen = [scan.samples[place] for place in _spread(len(scan.samples), SAMPLES)]
        ingest.ingest(self.scratch, corpus, self.config.corpora[corpus], run=_RUN, scan=replace(scan, samples=chosen))
        made = self.scratch.parts(corpus)
        if not made:
            raise ConfigError(f"corpora.{corpus}: the filter leaves none of the {len(chosen)} samples that were probed")
        tables = [parquet.read(self.scratch.storage.read(part.path)) for part in made]
        return pa.concat_tables(tables, promote_options="permissive")

    def _rows_of(self, part: PartAdded, most: int) -> pa.Table:
        table = parquet.read(self.catalog.storage.read(part.path))
        usable = table["sha256"].is_valid().to_numpy(zero_copy_only=False)
        picked = self.wanted.picked
        bits = None if picked is None else picked.bits(part.corpus, part.part)
        places = np.flatnonzero(usable if bits is None else usable & unpacked(bits, part.rows))
        return table.take(places[_spread(len(places), most)])

    def _repacked(self, corpus: str, table: pa.Table) -> pa.Table:
        """Copies the bytes that lie in packs of the workspace into packs of the scratch workspace, one a sample."""
        if "source_pack" not in table.column_names:
            return table
        rows = table.select(["source_pack", "source_offset", "size_bytes"]).to_pylist()
        for row in rows:
            if row["source_pack"] is None:
                continue
            data = self.catalog.storage.read_range(row["source_pack"], row["source_offset"], row["size_bytes"])
            sha256 = sha256_hex(data)
            row.update(source_pack=paths.pack(corpus, 0, sha256), source_offset=0)
            put_same(self.scratch.storage, row["source_pack"], data, sha256)
        for name in ("source_pack", "source_offset"):
            table = _with_column(table, name, [row[name] for row in rows])
        return table

    # -- what came of them --------------------------------------------------------------------------------------------

    def _measured(self, job: Job, worker: Worker, item: WorkItem, result: ItemResult) -> Iterator[Measured]:
        """Yields the figures of each labeler; those of labelers of one name are taken to be equal."""
        rows = item.part.rows
        uses = [use for use, _ in job.rows_by_labeler]
        names = [use.name for use in uses]
        own_s = [result.seconds_by_labeler.get(name, 0.0) / names.count(name) for name in names]
        rest_s = max(0.0, result.seconds["total"] - sum(own_s)) / rows
        for use, seconds in zip(uses, own_s, strict=True):
            sizes: dict[str, float] = {}
            for record in result.records:
                of_use = any(output.name == record.modality for output in use.outputs)
                if of_use and record.form in job.plan.modalities[record.modality].written():
                    form = f"{record.modality}/{record.form}"
                    sizes[form] = sizes.get(form, 0.0) + record.size_bytes / rows
            yield Measured(
                label_s=seconds / rows,
                rest_s=rest_s,
                bytes_by_form=sizes,
                on_gpu=worker.settings.device.startswith("cuda"),
            )

    def _failed(self, job: Job, item: WorkItem, result: ItemResult) -> Iterator[str]:
        """Yields what failed, a line for each stage and class, and a warning if a run would stop for it."""
        corpus, storage = item.part.corpus, self.scratch.storage
        paths = [record.failed_path for record in result.records if record.failed_path is not None]
        rows = [row for path in paths for row in parquet.read(storage.read(path)).to_pylist()]
        for stage, name in sorted({(row["stage"], row["class"]) for row in rows}):
            own = [row for row in rows if (row["stage"], row["class"]) == (stage, name)]
            count, made = len({row["row"] for row in own}), ", ".join(sorted({row["modality"] for row in own}))
            yield (
                f"{corpus}: {count} of {item.part.rows} samples failed at {stage} with {name} ({made}), such as: "
                f"{own[0]['message']}"
            )
        most = self.config.engine.max_failed_fraction
        share = sum(record.failed for record in result.records) / max(1, sum(record.rows for record in result.records))
        if share > most and job.rows >= JUDGED_FROM_ROWS:
            yield (
                f"{corpus}: {share:.0%} of the rows failed, and engine.max_failed_fraction is {most:g}: a run would stop "
                "with exit code 3 from its hundredth row on; mend it"
            )


def _all_kept(planned: CorpusPlan) -> CorpusPlan:
    """Returns the plan with every label kept, of the crop in the center alone."""
    kept = {name: replace(modality, keep=True) for name, modality in planned.modalities.items()}
    return replace(planned, modalities=kept, crops=1)


def _with_column(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, table.schema.field(name).type))


def _spread(total: int, wanted: int) -> list[int]:
    """Returns up to `wanted` of 0 .. total - 1, evenly spread."""
    return sorted({round(place) for place in np.linspace(0, total - 1, min(wanted, total))}) if total else []
