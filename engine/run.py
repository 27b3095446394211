"""The main job, told once: ingest, fit the tokenizers that are missing, label and tokenize what is missing, freeze,
train.

Each step does only what the manifest lacks, so that running it again finishes what a crash, a failure or new
photographs left over.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from engine import config as pipeline
from engine import corpus_plan, ingest, plan, snapshot
from engine.corpus_plan import CorpusPlan
from engine.failures import FailureBudget
from engine.plan import FitItem
from engine.progress import Progress
from engine.run_record import Done, Execution, recorded
from engine.work import WorkItem
from manifests import log
from manifests.actions import (
    Action,
    PartAdded,
    RecipeAdded,
    RecipeCurrent,
    ShardAdded,
    TokenizerAdded,
)
from manifests.modality import Form
from manifests.storage import open_storage

if TYPE_CHECKING:
    # Torch takes seconds to load, and only some pipelines train.
    from train.run import Outcome

Step = Literal["ingest", "fit", "label", "tokenize", "snapshot", "train"]
STEPS: tuple[Step, ...] = ("ingest", "fit", "label", "tokenize", "snapshot", "train")
_FORMS: Mapping[Step, Form] = {"label": "label", "tokenize": "token"}


class Runner(Protocol):
    """Where items are done: `run_local.LocalRunner`, `run_ray.RayRunner`."""

    def fit(self, items: Sequence[FitItem], progress: Progress) -> Iterator[tuple[FitItem, TokenizerAdded]]: ...

    def work(self, items: Sequence[WorkItem], progress: Progress) -> Iterator[tuple[WorkItem, list[ShardAdded]]]: ...

    def close(self) -> None: ...


def run(
    config: pipeline.PipelineConfig,
    *,
    steps: Sequence[Step] = STEPS,
    refit: bool = False,
    retry_failed: bool = False,
    kind: str = "run",
    quiet: bool = False,
) -> Done:
    """Runs the pipeline; what was done. Raises TooManyFailures, and any ModmillError of its parts."""
    pipeline.check_labelers(config)
    # A mistake in the trainer file is told before hours of work, not after.
    train = _trainer(config.train, quiet=quiet) if config.train and "train" in steps else None
    storage = open_storage(config.workspace)
    log.create_workspace(storage)
    with recorded(storage, kind, pipeline.document(config), quiet=quiet) as execution:
        _Run(config, execution).all(steps, refit=refit, retry_failed=retry_failed)
    # Without the lease: others may write to the workspace while a model is trained.
    if train is not None:
        outcome = train()
        execution.done.add("training_steps", outcome.steps_done)
        execution.done.training_folder = outcome.folder
    return execution.done


def _trainer(file: str, *, quiet: bool) -> "Callable[[], Outcome]":
    """What trains as a trainer file says, or goes on with it.

    Raises ConfigError where the file is not right.
    """
    from engine import train_run

    loaded = train_run.load(Path(file))

    def train() -> "Outcome":
        outcome = train_run.run(loaded, resume="auto", quiet=quiet)
        if outcome.status == "interrupted":
            raise KeyboardInterrupt
        return outcome

    return train


class _Run:
    """One execution: what it was given, and the runner once there is work for one."""

    def __init__(self, config: pipeline.PipelineConfig, execution: Execution) -> None:
        self.config = config
        self.catalog = execution.catalog
        self.progress = execution.progress
        self.done = execution.done

    def all(self, steps: Sequence[Step], *, refit: bool, retry_failed: bool) -> None:
        roots = self._ingest(steps)
        parts = {corpus: self.catalog.parts(corpus) for corpus in roots}
        runner: Runner | None = None
        try:
            fits = self._missing_fits(roots, parts, refit=refit) if "fit" in steps else []
            if fits:
                runner = self._runner(len(fits))
                self._fit(runner, fits)
            plans = self._plans(roots)
            self._commit_recipes(plans)
            forms: frozenset[Form] = frozenset(form for step, form in _FORMS.items() if step in steps)
            items = self._missing_work(plans, parts, forms, retry_failed=retry_failed)
            if items:
                runner = runner or self._runner(len(items))
                self._work(runner, items)
        finally:
            if runner is not None:
                runner.close()
        if "snapshot" in steps:
            snapshot.freeze(self.config.snapshots, self.catalog, self.progress, self.done)

    # -- ingest -------------------------------------------------------------------------------------------------------

    def _ingest(self, steps: Sequence[Step]) -> dict[str, str]:
        """Ingests every corpus; where each one's source is."""
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
                on_new=partial(self.progress.stage, stage, unit="samples"),
                on_rows=partial(self.progress.update, stage),
            )
            roots[corpus] = found.root
            self.done.add("new_samples", found.new)
            self.done.add("new_parts", found.new_parts)
            gone = (
                f"; {found.vanished:,} gone, {found.changed:,} changed since" if found.vanished or found.changed else ""
            )
            self.progress.say(f"{corpus}: {found.samples:,} samples, {found.new:,} new{gone}")
            for note in found.notes:
                self.progress.say(f"{corpus}: note: {note}")
        return roots

    # -- plan ---------------------------------------------------------------------------------------------------------

    def _tokenizer_names(self) -> set[str]:
        names = {corpus_plan.TEXT_TOKENIZER}
        for corpus in self.config.corpora:
            names |= set(corpus_plan.corpus_modalities(self.config, corpus))
        return names

    def _fitted(self) -> dict[str, TokenizerAdded | None]:
        return {name: self.catalog.tokenizer(name) for name in sorted(self._tokenizer_names())}

    def _plans(self, roots: Mapping[str, str]) -> dict[str, CorpusPlan]:
        fitted = self._fitted()
        return {corpus: corpus_plan.corpus_plan(self.config, corpus, root, fitted) for corpus, root in roots.items()}

    def _missing_fits(
        self, roots: Mapping[str, str], parts: Mapping[str, Sequence[PartAdded]], *, refit: bool
    ) -> list[FitItem]:
        return plan.fit_items(self.config, self._plans(roots), parts, refit=refit, fitted=self._fitted())

    def _missing_work(
        self,
        plans: Mapping[str, CorpusPlan],
        parts: Mapping[str, Sequence[PartAdded]],
        forms: frozenset[Form],
        *,
        retry_failed: bool,
    ) -> list[WorkItem]:
        fitted = {name: known for name, known in self._fitted().items() if known is not None}
        items = []
        for corpus, planned in plans.items():
            live = self.catalog.live_shards(corpus)
            items += plan.work_items(planned, parts[corpus], live, fitted, forms=forms, retry_failed=retry_failed)
        return items

    def _commit_recipes(self, plans: Mapping[str, CorpusPlan]) -> None:
        """Puts recipes that the log does not know into it, and says which are current from here on."""
        known = self.catalog.known_recipes()
        actions: list[Action] = []
        for corpus, planned in plans.items():
            current = self.catalog.current_recipes(corpus)
            for name, modality in planned.modalities.items():
                for form, recipe in modality.written().items():
                    grains = planned.grains(name, form)
                    crops = None if grains == (None,) else len(grains)
                    if recipe.fingerprint not in known:
                        known.add(recipe.fingerprint)
                        actions.append(RecipeAdded(fingerprint=recipe.fingerprint, document=recipe.document()))
                    before = current.get((name, form))
                    if before is None or (before.fingerprint, before.crops) != (recipe.fingerprint, crops):
                        actions.append(
                            RecipeCurrent(
                                corpus=corpus, modality=name, form=form, fingerprint=recipe.fingerprint, crops=crops
                            )
                        )
        if actions:
            self.catalog.commit(actions, run=self.done.run)

    # -- work ---------------------------------------------------------------------------------------------------------

    def _runner(self, most: int) -> Runner:
        from engine.worker import WorkerSettings

        engine = self.config.engine
        settings = WorkerSettings(
            threads=engine.threads,
            batch=engine.batch,
            decode_threads=engine.decode_threads,
            queue_bytes=engine.queue_mb << 20,
            device=engine.device,
        )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = engine.workers or max(1, cores // engine.threads)
        if engine.runner == "local":
            from engine.run_local import LocalRunner

            self.progress.say(f"{workers} worker{'s' * (workers > 1)} in this process")
            return LocalRunner(self.catalog.storage.uri, settings, workers)
        from engine.run_ray import RayRunner

        self.progress.say(f"starting Ray with {workers} worker{'s' * (workers > 1)} (some seconds)")
        return RayRunner(self.catalog.storage.uri, settings, workers, engine.ray_address)

    def _fit(self, runner: Runner, items: Sequence[FitItem]) -> None:
        for item in items:
            if item.family != "text":
                self.progress.stage(f"fit {item.name}", int(item.options["steps"]), "steps")
        for item, fitted in runner.fit(items, self.progress):
            self.catalog.commit([fitted], run=self.done.run)
            for stale in self.catalog.storage.names("runs"):
                if stale.startswith(f"fit-{item.name}-"):
                    self.catalog.storage.remove_folder(f"runs/{stale}")
            self.done.add("tokenizers_fitted", 1)
            self.progress.update(f"fit {item.name}", int(item.options.get("steps", 0)))
            figures = ", ".join(f"{name} {value:.4g}" for name, value in fitted.metrics.items())
            self.progress.say(
                f"tokenizer {item.name}: {fitted.rows:,} labels, vocabulary {fitted.vocabulary:,}; {figures}"
            )

    def _work(self, runner: Runner, items: Sequence[WorkItem]) -> None:
        rows = sum(item.part.rows for item in items)
        shards = sum(len(item.targets) for item in items)
        self.progress.say(f"to do: {shards:,} shards of {len(items):,} parts ({rows:,} samples)")
        self.progress.stage("work", rows, "samples")
        budget = FailureBudget(self.config.engine.max_failed_fraction)
        for item, records in runner.work(items, self.progress):
            self.catalog.commit(records, run=self.done.run)
            failed = sum(record.failed for record in records)
            self.done.add("shards", len(records))
            self.done.add("rows", sum(record.rows for record in records))
            self.done.add("failed_rows", failed)
            self.progress.update("work", item.part.rows, item=item.name, failed=failed)
            self.progress.event("item", item=item.name, shards=len(records), failed=failed)
            budget.add(sum(record.rows for record in records), failed)
