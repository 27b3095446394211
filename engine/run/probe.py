"""A probe: some samples of each corpus labeled by the real worker, in a workspace of their own that is thrown away.

It tells what the work to do will take, and shows on one contact sheet what will come of it. Nothing of it needs Ray.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from engine.ingest import ingest
from engine.pipeline.config import CorpusConfig, EngineConfig
from engine.plan import costs
from engine.plan import missing as plan
from engine.plan.corpus import CorpusPlan, LabelerUse, identity
from engine.plan.costs import Measured
from engine.plan.items import Target, WorkItem
from engine.progress.progress import Progress
from engine.run.commit import JUDGED_FROM_ROWS
from engine.run.labeling import Job
from engine.show import contact
from engine.sources import scan as sources
from engine.work.worker import Worker, WorkerSettings
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError
from manifests.formats.shards import encode_samples, file_stem, keys_digest
from manifests.log import entries as log
from manifests.log.actions import Action, PartAdded, RecipeAdded, RecipeCurrent, ShardAdded, TokenizerAdded
from manifests.recipe import sha256_hex
from manifests.store import parquet
from manifests.store.storage import Storage, cache_folder, open_storage, put_same

SAMPLES = 64
SHOWN = 6
_WARM_ROWS = 1
# The parts of the probe's own workspace: to load models, to be measured, to be shown.
_WARM, _MEASURED, _SHOWN = 900_001, 900_002, 900_003


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The probe's workspace, what a probe is made with, and the workers by pool.

    pick      up to so many samples of a corpus, as rows of samples files
    settings  those of the workers of a pool
    unfitted  modalities whose tokenizer is not there yet: labels alone are probed
    failed    what failed of the samples that were probed, in words
    """

    storage: Storage
    engine: EngineConfig
    tokenizers: Mapping[str, TokenizerAdded]
    unfitted: frozenset[str]
    pick: Callable[[str, int], pa.Table]
    settings: Callable[[str], WorkerSettings]
    progress: Progress
    workers: dict[str, Worker] = field(default_factory=dict)
    samples: dict[str, pa.Table] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def worker(self, pool: str) -> Worker:
        """The worker of a pool."""
        if pool not in self.workers:
            self.workers[pool] = Worker(self.storage.uri, self.settings(pool))
        return self.workers[pool]

    def part(self, corpus: str, number: int, rows: int) -> PartAdded:
        """A part of the probe's workspace with so many of the corpus's samples, spread over those at hand."""
        if corpus not in self.samples:
            self.samples[corpus] = self.pick(corpus, SAMPLES)
        table = self.samples[corpus]
        return write_part(self.storage, corpus, number, table.take(pa.array(spread(table.num_rows, rows))))


@contextmanager
def scratch() -> Iterator[Storage]:
    """A workspace in a temporary folder, which goes with all that was made for it."""
    with tempfile.TemporaryDirectory(prefix="modmill-probe-") as folder:
        storage = open_storage(folder)
        identity = log.create_workspace(storage)
        try:
            yield storage
        finally:
            shutil.rmtree(cache_folder() / identity, ignore_errors=True)


def spread(total: int, wanted: int) -> list[int]:
    """Up to so many of 0 .. total - 1, evenly spread."""
    return sorted({round(place) for place in np.linspace(0, total - 1, min(wanted, total))}) if total else []


def write_part(storage: Storage, corpus: str, number: int, table: pa.Table) -> PartAdded:
    """Puts rows of samples files, of whatever parts, down as one part."""
    count = table.num_rows
    own = {
        "corpus": pa.array([corpus] * count, pa.string()),
        "part": pa.array([number] * count, pa.int32()),
        "row": pa.array(range(count), pa.int32()),
    }
    for name, column in own.items():
        table = table.set_column(table.column_names.index(name), name, column)
    data = encode_samples(table)
    sha256 = sha256_hex(data)
    path = f"data/{corpus}/_samples/{file_stem(number, None, sha256)}.parquet"
    put_same(storage, path, data, sha256)
    return PartAdded(
        corpus=corpus,
        part=number,
        rows=count,
        path=path,
        sha256=sha256,
        size_bytes=len(data),
        keys_sha256=keys_digest(table["key"].to_pylist()),
        source_bytes=0,
    )


def ingested(storage: Storage, corpus: str, section: CorpusConfig, scan: sources.Scan) -> pa.Table:
    """The rows that an ingest of these samples makes, in a workspace of the probe's."""
    with Catalog(storage) as catalog:
        ingest.ingest(catalog, corpus, section, run="probe", scan=scan)
        parts = catalog.parts(corpus)
    if not parts:
        raise ConfigError(
            f"corpora.{corpus}: the filter leaves none of the {len(scan.samples)} samples that were probed"
        )
    return pa.concat_tables([parquet.read(storage.read(part.path)) for part in parts], promote_options="permissive")


def repacked(table: pa.Table, corpus: str, workspace: Storage, storage: Storage) -> pa.Table:
    """Rows whose bytes lie in packs of the workspace, with these copied into one pack of the probe's; others as they are."""
    if "source_pack" not in table.column_names:
        return table
    rows = table.select(["source_pack", "source_offset", "size_bytes"]).to_pylist()
    data = bytearray()
    offsets = [row["source_offset"] for row in rows]
    for place, row in enumerate(rows):
        if row["source_pack"]:
            offsets[place] = len(data)
            data += workspace.read_range(row["source_pack"], row["source_offset"], row["size_bytes"])
    sha256 = sha256_hex(bytes(data))
    path = f"data/{corpus}/_samples/pack-{sha256[:8]}"
    put_same(storage, path, bytes(data), sha256)
    packs = [path if row["source_pack"] else None for row in rows]
    for name, values in (("source_pack", packs), ("source_offset", offsets)):
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    return table


def measure(bench: Bench, job: Job) -> list[Measured]:
    """What each labeler of a job that has work takes, in the order of `job.rows_by_labeler`; kept for later runs."""
    uses = [use for use, _ in job.rows_by_labeler]
    planned = _labels_where_unfitted(job.plan, bench.unfitted)
    targets = _targets(planned, uses)
    worker = bench.worker(job.group.pool)
    name = f"probe {job.plan.corpus}{f'/{job.group.name}' if job.group.name else ''}"
    part = bench.part(job.plan.corpus, _MEASURED, SAMPLES)
    bench.progress.stage(name, part.rows, "samples")
    worker.work(_item(bench, planned, bench.part(job.plan.corpus, _WARM, _WARM_ROWS), targets), lambda beat: None)
    item = _item(bench, planned, part, targets)
    result = worker.work(item, lambda beat: bench.progress.update(name, min(beat.rows, part.rows)))
    bench.progress.update(name, part.rows)
    bench.failed.extend(_failed(bench.storage, part, result.records))
    share = sum(record.failed for record in result.records) / max(1, sum(record.rows for record in result.records))
    if share > bench.engine.max_failed_fraction and job.rows >= JUDGED_FROM_ROWS:
        bench.failed.append(
            f"{part.corpus}: {share:.0%} of the rows failed, and engine.max_failed_fraction is "
            f"{bench.engine.max_failed_fraction:g}: a run would stop with exit code 3 from its hundredth row on; mend it"
        )
    own_s = [_own_seconds(use, uses, result.seconds_by_labeler) for use in uses]
    rest_s = max(0.0, result.seconds["total"] - sum(own_s)) / part.rows
    found = []
    for use, seconds in zip(uses, own_s, strict=True):
        made = {output.name for output in use.outputs}
        sizes = {
            f"{modality}/{form}": sum(r.size_bytes for r in result.records if (r.modality, r.form) == (modality, form))
            for modality, form in dict.fromkeys((target.modality, target.form) for target in targets)
            if modality in made and form in job.plan.modalities[modality].written()
        }
        measured = Measured(
            samples=part.rows,
            label_s=seconds / part.rows,
            rest_s=rest_s,
            bytes_by_form={form: size / part.rows for form, size in sizes.items()},
            model_bytes=worker.models.bytes_of(identity(use)),
            on_gpu=worker.settings.device.startswith("cuda"),
        )
        costs.keep(job.plan, use, bench.engine, job.group.pool, measured)
        found.append(measured)
    return found


def _failed(storage: Storage, part: PartAdded, records: Sequence[ShardAdded]) -> Iterator[str]:
    """What failed, a line for each stage and class."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record.failed_path is not None:
            for row in parquet.read(storage.read(record.failed_path)).to_pylist():
                found.setdefault((row["stage"], row["class"]), []).append(row)
    for (stage, name), rows in sorted(found.items()):
        count, made = len({row["row"] for row in rows}), ", ".join(sorted({row["modality"] for row in rows}))
        yield (
            f"{part.corpus}: {count} of {part.rows} samples failed at {stage} with {name} ({made}), such as: "
            f"{rows[0]['message']}"
        )


def _own_seconds(use: LabelerUse, uses: Sequence[LabelerUse], by_name: Mapping[str, float]) -> float:
    """The seconds of a labeler's own calls; those of labelers of one name are taken to be equal."""
    return by_name.get(use.name, 0.0) / sum(other.name == use.name for other in uses)


def shown(bench: Bench, jobs: Sequence[Job], notes: list[str]) -> list[contact.Sample]:
    """Some samples of each corpus with all that the jobs make of them, tokens decoded where they have a tokenizer.

    What cannot be shown is told in `notes`.
    """
    found: list[contact.Sample] = []
    with Catalog(bench.storage) as catalog:
        for corpus in dict.fromkeys(job.plan.corpus for job in jobs):
            actions: list[Action] = []
            for job in (job for job in jobs if job.plan.corpus == corpus):
                planned = _all_kept(job.plan, bench.unfitted)
                part = bench.part(corpus, _SHOWN, SHOWN)
                targets = _targets(planned, [use for use, _ in job.rows_by_labeler])
                result = bench.worker(job.group.pool).work(_item(bench, planned, part, targets), lambda beat: None)
                actions += [*_described(planned, part, targets), *result.records]
            known = {name: known for name, known in bench.tokenizers.items() if bench.storage.exists(known.path)}
            catalog.commit([*known.values(), *actions], run="probe")
            found += contact.samples(catalog, corpus, SHOWN, notes)
    return found


def _described(planned: CorpusPlan, part: PartAdded, targets: Sequence[Target]) -> Iterator[Action]:
    """What the log must know for the shards of a part to be found."""
    yield ingest.corpus_added(planned.corpus, planned.config)
    yield part
    for target in targets:
        recipe = planned.modalities[target.modality].written()[target.form]
        crops = None if target.crop is None else planned.crops
        yield RecipeAdded(fingerprint=recipe.fingerprint, document=recipe.document())
        yield RecipeCurrent(
            corpus=planned.corpus,
            modality=target.modality,
            form=target.form,
            fingerprint=recipe.fingerprint,
            crops=crops,
        )


def _targets(planned: CorpusPlan, uses: Sequence[LabelerUse]) -> list[Target]:
    made = {output.name for use in uses for output in use.outputs}
    return [target for target in plan.wanted_targets(planned) if target.modality in made]


def _labels_where_unfitted(planned: CorpusPlan, unfitted: frozenset[str]) -> CorpusPlan:
    """The plan with labels in place of the tokens that cannot be made yet."""
    changed = {
        name: replace(modality, keep=True, token=None) if name in unfitted else modality
        for name, modality in planned.modalities.items()
    }
    return replace(planned, modalities=changed)


def _all_kept(planned: CorpusPlan, unfitted: frozenset[str]) -> CorpusPlan:
    """The plan with every label kept, of the crop in the centre alone."""
    whole = _labels_where_unfitted(planned, unfitted)
    kept = {name: replace(modality, keep=True) for name, modality in whole.modalities.items()}
    return replace(whole, modalities=kept, crops=1)


def _item(bench: Bench, planned: CorpusPlan, part: PartAdded, targets: Sequence[Target]) -> WorkItem:
    names = {planned.modalities[target.modality].tokenizer for target in targets if target.form == "token"}
    return WorkItem(
        plan=planned,
        part=part,
        targets=tuple(targets),
        tokenizers={name: bench.tokenizers[name] for name in sorted(names)},
    )
