"""Runs the main job: ingests, fits the tokenizers that are missing, labels and tokenizes what is missing, freezes, trains.

Each step does only what is missing in the manifest, so that running it again finishes what a crash, a failure or new
photographs left over.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.ingest import ingest
from engine.ingest.again import count_without_bytes
from engine.pipeline import config as pipeline
from engine.plan import missing
from engine.plan.corpus import CorpusPlan, corpus_plan, suffixes_in, tokenizer_names
from engine.plan.items import FitItem
from engine.plan.missing import Wanted
from engine.plan.where import pick
from engine.progress.record import Done, Execution, recorded
from engine.run import freeze, labeling
from engine.run.commit import commit_recipes
from engine.run.runners.pools import workers_of
from engine.run.runners.protocol import Runner
from engine.run.runners.ray import address as ray_address
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, nearest
from manifests.log import entries as log
from manifests.log.actions import TokenizerAdded
from manifests.modality import Form
from manifests.queries import planning
from manifests.store import paths
from manifests.store.storage import open_storage

if TYPE_CHECKING:
    # Torch takes seconds to load, and only some pipelines train.
    from engine.work.inputs import WorkerSettings
    from train.run.run import TrainingResult

Step = Literal["ingest", "fit", "label", "tokenize", "snapshot", "train"]
STEPS: tuple[Step, ...] = ("ingest", "fit", "label", "tokenize", "snapshot", "train")
_FORMS: Mapping[Step, Form] = {"label": "label", "tokenize": "token"}
_ON_WORKERS: frozenset[Step] = frozenset(("fit", *_FORMS))


def run(
    config: pipeline.PipelineConfig,
    *,
    steps: Sequence[Step] = STEPS,
    refit: bool = False,
    retry: Collection[str] | None = None,
    where: str | None = None,
    kind: str = "run",
    quiet: bool = False,
) -> Done:
    """Runs the pipeline; returns what was done. Raises TooManyFailures, and any ModmillError of its parts.

    retry   classes of failures whose rows are made again, empty: every failed row, None: no row
    where   SQL over `samples`: only these rows are labeled; the others of their parts stay as they are, or null
    """
    pipeline.check_labelers(config)
    # A mistake in the trainer file, or a cluster that is not there, is told before hours of work, not after.
    train = trainer(config.train, quiet=quiet) if config.train and "train" in steps else None
    check_cluster(config.engine, steps)
    # Labelers that do not fit together, and weights that are missing, are told before the ingest of millions.
    for corpus in config.corpora:
        corpus_plan(config, corpus, "", dict.fromkeys(tokenizer_names(config)))
    storage = open_storage(config.workspace)
    log.create_workspace(storage)
    with recorded(storage, kind, pipeline.document(config), quiet=quiet) as execution:
        _MainJob(config, execution).all(steps, refit=refit, retry=retry, where=where)
    # Without the lease: others may write to the workspace while a model is trained.
    if train is not None:
        outcome = train()
        execution.done.add("training_steps", outcome.steps_done)
        execution.done.training_folder = outcome.folder
    return execution.done


def check_cluster(engine: pipeline.EngineConfig, steps: Sequence[Step]) -> None:
    """Raises UserError if these steps need a Ray cluster, and nothing listens at its address."""
    address = ray_address.address_of(engine)
    if address is not None and not _ON_WORKERS.isdisjoint(steps):
        ray_address.check_listens(address)


def trainer(file: str, *, quiet: bool) -> "Callable[[], TrainingResult]":
    """Returns what trains as a trainer file says, or goes on with it. Raises ConfigError if the file is not right."""
    from engine.run import train as train_run

    loaded = train_run.load(Path(file))

    def train() -> "TrainingResult":
        outcome = train_run.run(loaded, resume="auto", quiet=quiet)
        if outcome.status == "interrupted":
            raise KeyboardInterrupt
        return outcome

    return train


class _MainJob:
    """Holds one execution: what it was given, and the runner once there is work for one."""

    def __init__(self, config: pipeline.PipelineConfig, execution: Execution) -> None:
        self.config = config
        self.execution = execution
        self.catalog = execution.catalog
        self.progress = execution.progress
        self.done = execution.done
        self._suffixes: dict[str, frozenset[str]] = {}

    def all(self, steps: Sequence[Step], *, refit: bool, retry: Collection[str] | None, where: str | None) -> None:
        roots = self._ingest(steps, retry)
        runner: Runner | None = None

        def start(most: int) -> Runner:
            nonlocal runner
            runner = runner or self._runner(most)
            return runner

        try:
            # A mistake in a condition is told before hours of fits.
            wanted = wanted_of(self.catalog, roots, steps, retry=retry, where=where)
            fitted, plans = self._plans(roots)
            if "fit" in steps:
                fits = missing.fit_items(self.config, plans, self.catalog.parts, refit=refit, fitted=fitted)
                if fits:
                    self._fit(start(len(fits)), fits)
                    fitted, plans = self._plans(roots)
            for line in [] if refit else missing.otherwise_fitted(self.config, plans, fitted):
                self.progress.say(line)
            commit_recipes(self.catalog, plans, run=self.done.run)
            if wanted.forms:
                tokenizers = {name: known for name, known in fitted.items() if known is not None}
                labeling.label(self.execution, plans, tokenizers, self.config.engine, wanted, start)
        finally:
            if runner is not None:
                runner.close()
        if "snapshot" in steps:
            freeze.freeze(self.config.snapshots, self.catalog, self.progress, self.done)
        self.done.failed_corpora = [corpus for corpus in roots if failed_wholly(self.catalog, corpus)]

    # -- ingest -------------------------------------------------------------------------------------------------------

    def _ingest(self, steps: Sequence[Step], retry: Collection[str] | None) -> dict[str, str]:
        """Ingests every corpus; returns the root of each one's source."""
        roots = {}
        for corpus, section in self.config.corpora.items():
            if "ingest" not in steps:
                roots[corpus] = ingest.root_of(self.catalog, corpus, section)
                continue
            stage = f"ingest {corpus}"
            found = ingest.ingest(
                self.catalog,
                corpus,
                section,
                run=self.done.run,
                retry=retry,
                on_new=partial(self.progress.stage, stage, unit="samples"),
                on_rows=partial(self.progress.update, stage),
            )
            roots[corpus] = found.root
            if found.suffixes is not None:
                self._suffixes[corpus] = found.suffixes
            self.done.add("new_samples", found.new)
            self.done.add("new_parts", found.new_parts)
            self.done.add("dropped_samples", found.dropped)
            gone = (
                f"; {found.vanished:,} gone, {found.changed:,} changed since" if found.vanished or found.changed else ""
            )
            self.progress.say(f"{corpus}: {found.samples:,} samples, {found.new:,} new{gone}")
            for note in found.notes:
                self.progress.say(f"{corpus}: note: {note}")
        return roots

    # -- plan ---------------------------------------------------------------------------------------------------------

    def _plans(self, roots: Mapping[str, str]) -> tuple[dict[str, TokenizerAdded | None], dict[str, CorpusPlan]]:
        """Returns the tokenizers that are fitted by now, and the plan of each corpus with them."""
        fitted = {name: self.catalog.tokenizer(name) for name in sorted(tokenizer_names(self.config))}
        for corpus in roots.keys() - self._suffixes.keys():
            # Not by the samples: a run that takes in nothing does not read the names of all.
            self._suffixes[corpus] = suffixes_in(planning.image_inputs(self.catalog, corpus))
        return fitted, {
            corpus: corpus_plan(self.config, corpus, root, fitted, self._suffixes[corpus])
            for corpus, root in roots.items()
        }

    # -- work ---------------------------------------------------------------------------------------------------------

    def _runner(self, most: int) -> Runner:
        engine = self.config.engine
        settings = worker_settings(engine, self.done.run)
        workers = workers_of(engine)
        if engine.runner == "local":
            from engine.run.runners.local import LocalRunner

            self.progress.say(f"{workers} worker{'s' * (workers > 1)} in this process")
            return LocalRunner(self.catalog.storage.uri, settings, engine)
        from engine.run.runners.ray.runner import RayRunner

        if address := ray_address.address_of(engine):
            self.progress.say(f"joining the Ray cluster at {address}")
        else:
            self.progress.say(f"starting Ray with {workers} worker{'s' * (workers > 1)} (some seconds)")
        return RayRunner(self.catalog.storage.uri, settings, engine)

    def _fit(self, runner: Runner, items: Sequence[FitItem]) -> None:
        for item in items:
            if item.family != "text":
                self.progress.stage(f"fit {item.name}", int(item.options["steps"]), "steps")
        for item, fitted in runner.fit(items, self.progress):
            self.catalog.commit([fitted], run=self.done.run)
            for stale in self.catalog.storage.names(paths.RUNS):
                fields = paths.FIT.parse(paths.run(stale))
                if fields is not None and fields["tokenizer"] == item.name:
                    self.catalog.storage.remove_folder(paths.run(stale))
            self.done.add("tokenizers_fitted", 1)
            self.progress.update(f"fit {item.name}", int(item.options.get("steps", 0)))
            figures = ", ".join(f"{name} {value:.4g}" for name, value in fitted.metrics.items())
            self.progress.say(
                f"tokenizer {item.name}: {fitted.rows:,} labels, vocabulary {fitted.vocabulary:,}; {figures}"
            )
            texts = [modality.name for modality in item.modalities if modality.kind == "text"]
            if item.family == "text" and texts and not fitted.rows and "file" not in item.options:
                self.progress.say(
                    f"tokenizer {item.name}: note: no sample has a {' or '.join(texts)} yet, so it knows no words of them; "
                    "once some have, fit it again: --refit"
                )


def failed_wholly(catalog: Catalog, corpus: str) -> bool:
    """Tells whether no source of a corpus could be read, or all rows failed that were made of it."""
    read = any(part.source_bytes for part in catalog.parts(corpus))
    if not read and count_without_bytes(catalog, corpus):
        return True
    query = "SELECT sum(ok) AS ok, sum(failed) AS failed FROM coverage WHERE corpus = ?"
    made = catalog.sql(query, [corpus]).to_pylist()[0]
    return not made["ok"] and bool(made["failed"])


def wanted_of(
    catalog: Catalog,
    corpora: Collection[str],
    steps: Sequence[Step],
    *,
    retry: Collection[str] | None,
    where: str | None,
) -> Wanted:
    """Returns what the options of a run ask for. Raises ConfigError for a class that no failed row has, and for `where`."""
    forms: frozenset[Form] = frozenset(form for step, form in _FORMS.items() if step in steps)
    for name in retry or ():
        known = planning.failure_classes(catalog)
        if known and name not in known:
            raise ConfigError(f"--class {name}: no row failed with that; {nearest(name, known)}")
    return Wanted(
        forms=forms,
        picked=None if where is None or not forms else pick(catalog, where, corpora),
        retry=None if retry is None else frozenset(retry),
    )


def worker_settings(engine: pipeline.EngineConfig, run: str) -> "WorkerSettings":
    """Returns how the workers of a run work; a pool may have other threads and batches."""
    from engine.work.inputs import WorkerSettings

    return WorkerSettings(
        run=run,
        threads=engine.threads,
        batch=engine.batch,
        decode_threads=engine.decode_threads,
        queue_bytes=engine.queue_mb << 20,
        models_bytes=engine.models_mb << 20,
        device=engine.device,
        dtype=engine.dtype,
        compile=engine.compile,
        batch_deadline_s=engine.batch_deadline_s,
        spill_after_s=engine.spill_after_s,
    )
