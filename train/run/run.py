"""Trains a model: snapshots → vocabulary → loader → model → optimizer → steps, with validation and checkpoints.

It is one process. After a kill, a run that goes on from its last checkpoint has the losses that it would have had: order
and masks are computed, not stored, and on a CPU torch is deterministic.
"""

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifests.errors import ConfigError, ShardError, UserError, nearest
from manifests.log.entries import now, workspace_id
from manifests.recipe import canonical_json
from manifests.snapshots.snapshot import Snapshot, open_snapshot
from manifests.store.storage import Storage, cache_folder
from train.data.batch import Batch, MaskedBatch
from train.data.loader import Loader
from train.data.mask import mask_batch
from train.data.mixture import MixtureEntry
from train.data.vocabulary import Vocabulary, of_snapshots
from train.model import loss
from train.model.transformer import Model
from train.optim.adam import adam
from train.run import checkpoint, generators, process, run_folder
from train.run.checkpoint import Saved
from train.run.metrics import Clock, Metrics, Window, count_targets, per_target
from train.settings.trainer import TrainConfig

# Training rows whose targets are counted for the loss of guessing by frequency.
UNIGRAM_ROWS = 4096
_ROWS_NAMED = 4
# How overlong targets began in runs that do not say it.
_RULE_BEFORE = "random"
_RECORDED = ("modmill", "torch", "numpy", "safetensors", "pyarrow")

Status = Literal["done", "interrupted"]
# Called with what happens: `run`, `message`, `unigram`, `train`, `validation`, `checkpoint`, each with its facts.
Report = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Tells how a run ended. `step` counts all updates, `steps_done` those of this sitting."""

    run: str
    folder: str
    status: Status
    step: int
    steps_done: int


def train(
    config: TrainConfig, *, resume: str | None = None, report: Report = lambda kind, facts: None
) -> TrainingResult:
    """Trains as the file says; `resume` is None (a new run), `auto` (its newest run, if there is one) or a run's folder.

    The first Ctrl-C or SIGTERM ends the run after its step, with a checkpoint. Raises ConfigError for what cannot be trained
    or resumed, UserError for a full disk and for a loss that is not finite; checkpoints before it stay.
    """

    def say(text: str) -> None:
        report("message", {"text": text})

    for note in config.notes:
        say(f"note: {note}")
    opened = {uri: open_snapshot(uri) for uri in dict.fromkeys(source.snapshot for source in config.mixture)}
    snapshots = [opened[source.snapshot] for source in config.mixture]
    vocabulary = of_snapshots(list(opened.values()), most_tokens=config.sequence_tokens)
    _check_names(config, vocabulary)
    device = process.device(config.device)
    identity = run_folder.identity(config, snapshots)
    out = config.out or snapshots[0].storage.uri.rstrip("/") + "/runs"
    saved = run_folder.to_resume(resume, out, config, identity, say)
    storage = run_folder.new(out, config) if saved is None else saved.storage
    config = _with_rule(config, saved)
    # Everything that can be wrong with the file is found before anything is written.
    training = _Training(config, snapshots, vocabulary, storage, device, identity, report, say)
    with run_folder.only_writer(storage), process.torch_settings(device, config.threads):
        return training.run(saved)


@dataclass
class _Training:
    """Trains one sitting of a run: holds what it was given, and what its steps change."""

    config: TrainConfig
    snapshots: Sequence[Snapshot]
    vocabulary: Vocabulary
    storage: Storage
    device: torch.device
    identity: str
    report: Report
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        config, engine = self.config, self.config.engine
        self.name = Path(self.storage.root).name
        self.modalities = [one.name for one in self.vocabulary.modalities]
        self.entries = [
            MixtureEntry(snapshot=snapshot, corpora=source.corpora, weight=source.weight)
            for source, snapshot in zip(config.mixture, self.snapshots, strict=True)
        ]
        self.loader = Loader(
            self.entries, vocabulary=self.vocabulary, seed=config.seed, batch=engine.micro_batch, workers=config.workers
        )
        model = Model(self.vocabulary, config.model)
        # On the CPU, before it moves: every device begins with the same numbers.
        model.initialize(config.seed)
        self.model = model.to(self.device)
        self.optimizer = adam(self.model, engine.optimizer, self.device)
        weights = [config.loss_weights.get(name, 1.0) for name in self.modalities]
        self.weights = torch.tensor(weights, device=self.device)
        self.bf16 = self.device.type == "cuda" if engine.bf16 == "auto" else engine.bf16
        # What to validate on, masked once.
        rows = config.validation.rows
        self.held_out = [self._masked(batch) for batch in self.loader.held_out_batches(rows)] if rows else []
        self.step = 0
        self.window = Window.empty(len(self.modalities))
        self.losses: dict[str, Any] = {}

    def run(self, saved: Saved | None) -> TrainingResult:
        if saved is not None:
            self._restore(saved)
        begun = self.step
        self.report(
            "run",
            {
                "run": self.name,
                "folder": self.storage.uri,
                "step": self.step,
                "steps": self.config.steps,
                "config": self._facts(),
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            },
        )
        if self.step >= self.config.steps:
            self.say(
                f"{self.name} is at step {self.step} of {self.config.steps}: nothing to do; raise `steps` to go on"
            )
            return self._result("done", begun)
        self.storage.put("config.json", canonical_json(self._facts()))
        local = Path(self.storage.root) if self.storage.is_local else cache_folder() / "runs" / self.name
        metrics = Metrics(self.storage, local, step=self.step, say=self.say)
        try:
            if self.step == 0:
                self._unigram(metrics)
            status = self._steps(metrics)
        finally:
            self.loader.close()
            metrics.close()
        return self._result(status, begun)

    def _steps(self, metrics: Metrics) -> Status:
        config, steps = self.config, self.config.steps
        batches = iter(self.loader)
        with process.stop_signals() as stop:
            clock = Clock()
            while self.step < steps:
                began = time.perf_counter()
                taken = [next(batches) for _ in range(config.engine.accumulation)]
                clock.waited_s += time.perf_counter() - began
                clock.tokens += self._update(taken)
                clock.rows += sum(map(len, taken))
                self.step += 1
                last = self.step == steps or stop.is_set()
                if self.step % config.log_every == 0 or self.step == steps:
                    self._log(metrics, clock)
                    clock = Clock()
                began = time.perf_counter()
                if self.held_out and (self.step % config.validation.every == 0 or self.step == steps):
                    self._validate(metrics)
                if self.step % config.checkpoint.every == 0 or last:
                    self._save(metrics)
                # Rates are of training alone.
                clock.began += time.perf_counter() - began
                if last:
                    break
        return "done" if self.step == steps else "interrupted"

    # -- one step -----------------------------------------------------------------------------------------------------

    def _update(self, batches: Sequence[Batch]) -> int:
        """Makes one update on the batches of a step and returns how many tokens it saw."""
        masked = [self._masked(batch) for batch in batches]
        modalities = len(self.modalities)
        # Of the whole step, so that the loss does not depend on how it is cut into micro-batches.
        counts = torch.stack([batch.counts(modalities) for batch in masked]).sum(0)
        sums = torch.zeros(modalities, device=self.device)
        value = 0.0
        for batch, shown in zip(batches, masked, strict=True):
            found = self._sums(shown)
            part = loss.total(found, counts, self.weights)
            # A small micro-batch may have no targets, and its loss then no gradient.
            if part.requires_grad:
                part.backward()
            value += part.item()
            self._check_finite("loss", part.item(), batch)
            sums += found.detach()
        clip = self.config.engine.gradient_clipping or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip).item()
        self._check_finite("gradient's norm", norm, *batches)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.engine.schedule.rate(self.step, self.config.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.window.add(value, sums.tolist(), counts.tolist(), norm)
        return sum(len(one.input_ids) + len(one.target_ids) for one in masked)

    def _masked(self, batch: Batch) -> MaskedBatch:
        return mask_batch(batch, self.vocabulary, self.config.masking, device=self.device)

    def _sums(self, batch: MaskedBatch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return loss.sums(self.model, self.model(batch), batch)

    def _check_finite(self, what: str, value: float, *batches: Batch) -> None:
        if math.isfinite(value):
            return
        rows = [
            f"{batch.corpora[corpus]} part {part} row {row}"
            for batch in batches
            for corpus, part, row in zip(batch.corpus, batch.parts, batch.rows, strict=True)
        ]
        more = f" and {len(rows) - _ROWS_NAMED} more" if len(rows) > _ROWS_NAMED else ""
        raise UserError(
            f"step {self.step + 1}: the {what} is {value} on {', '.join(rows[:_ROWS_NAMED])}{more}; nothing was updated, "
            "and the checkpoints before it stay: lower the learning rate or gradient_clipping, or warm up for longer"
        )

    # -- what is written ----------------------------------------------------------------------------------------------

    def _log(self, metrics: Metrics, clock: Clock) -> None:
        elapsed_s = max(time.perf_counter() - clock.began, 1e-9)
        line = metrics.write(
            "train",
            step=self.step,
            **self.window.means(self.modalities),
            lr=self.config.engine.schedule.rate(self.step - 1, self.config.steps),
            tokens_per_s=clock.tokens / elapsed_s,
            rows_per_s=clock.rows / elapsed_s,
            data_wait=clock.waited_s / elapsed_s,
        )
        self.window = Window.empty(len(self.modalities))
        self._tell("train", line)

    @torch.no_grad()
    def _validate(self, metrics: Metrics) -> None:
        self.model.eval()
        counts = torch.stack([batch.counts(len(self.modalities)) for batch in self.held_out]).sum(0)
        sums = torch.stack([self._sums(batch) for batch in self.held_out]).sum(0)
        self.model.train()
        line = metrics.write(
            "validation",
            step=self.step,
            loss=loss.total(sums, counts, self.weights).item(),
            losses=per_target(self.modalities, sums.tolist(), counts.tolist()),
            targets=dict(zip(self.modalities, counts.tolist(), strict=True)),
        )
        self._tell("validation", line)

    def _tell(self, kind: str, line: Mapping[str, Any]) -> None:
        self.losses[kind] = {name: line[name] for name in ("step", "loss", "losses")}
        self.report(kind, line)

    def _unigram(self, metrics: Metrics) -> None:
        rows = min(UNIGRAM_ROWS, sum(self.loader.rows))
        with Loader(self.entries, vocabulary=self.vocabulary, seed=self.config.seed, batch=rows) as counting:
            seen = count_targets([self._masked(counting.batch_at(0))], self.vocabulary)
        guessed = seen.cross_entropies(count_targets(self.held_out, self.vocabulary)) if self.held_out else {}
        self.report("unigram", metrics.write("unigram", rows=seen.rows, entropies=seen.entropies(), held_out=guessed))

    def _save(self, metrics: Metrics) -> None:
        metrics.publish()
        saved = checkpoint.save(
            self.storage,
            step=self.step,
            model=self.model,
            optimizer=self.optimizer,
            document={
                **self._facts(),
                "time": now(),
                "loader": self.loader.state(),
                "window": asdict(self.window),
                "losses": self.losses,
                "generators": generators.states(),
            },
            keep=self.config.checkpoint.keep,
        )
        self.report("checkpoint", {"step": self.step, "path": saved.location})

    def _facts(self) -> dict[str, Any]:
        """Returns what is the same in every checkpoint of the run."""
        found = {snapshot.uri: snapshot for snapshot in self.snapshots}
        homes = list({snapshot.storage.uri: snapshot.storage for snapshot in found.values()}.values())
        places = [home.uri for home in homes]
        first = {
            facts.modality: places.index(snapshot.storage.uri)
            for snapshot in reversed(found.values())
            for facts in snapshot.modalities
        }
        return {
            "run": self.name,
            "identity": self.identity,
            "config": self.config.document(),
            "model": asdict(self.config.model),
            "vocabulary": self.vocabulary.document(),
            "snapshots": [{"uri": uri, "sha256": snapshot.sha256} for uri, snapshot in found.items()],
            "workspaces": [
                {"uri": checkpoint.relative_uri(home, self.storage), "id": workspace_id(home)} for home in homes
            ],
            "tokenizers": {
                one.name: {"name": one.tokenizer, "digest": one.digest, "path": one.path, "workspace": first[one.name]}
                for one in self.vocabulary.modalities
            },
            "versions": {**{name: metadata.version(name) for name in _RECORDED}, "python": platform.python_version()},
            "device": str(self.device),
        }

    # -- going on -----------------------------------------------------------------------------------------------------

    def _restore(self, saved: Saved) -> None:
        document = saved.document
        checkpoint.check_vocabulary(saved, self.vocabulary)
        if document["model"] != asdict(self.config.model):
            raise ConfigError(
                f"{saved.location} holds a model of {document['model']}, the trainer file says {asdict(self.config.model)}; "
                "give it the same `model`, or start a new run"
            )
        try:
            self.loader.load_state(document["loader"])
        except ConfigError as error:
            raise ConfigError(f"{saved.location}: {error}") from error
        checkpoint.load_model(saved, self.model)
        checkpoint.load_optimizer(saved, self.model, self.optimizer)
        self.step = saved.step
        self.window = Window(**document["window"])
        self.losses = dict(document["losses"])
        if document["identity"] != self.identity:
            old, new = document["config"], self.config.document()
            old = {**old, "masking": {"overlong": _RULE_BEFORE, **old["masking"]}}
            changed = [name for name in new if new[name] != old.get(name)]
            self.say(f"goes on with another configuration than it began with: {', '.join(changed)}")
        if self.step < self.config.steps:
            for name in checkpoint.remove_after(self.storage, self.step):
                self.say(f"removed {name}, which is after the checkpoint that the run goes on from")
        try:
            generators.restore(document["generators"])
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, RuntimeError) as error:
            raise ShardError(f"{saved.location}: the states of its generators cannot be read ({error!r})") from error
        self.say(f"goes on from {saved.location}")

    def _result(self, status: Status, begun: int) -> TrainingResult:
        return TrainingResult(
            run=self.name, folder=self.storage.uri, status=status, step=self.step, steps_done=self.step - begun
        )


def _with_rule(config: TrainConfig, saved: Saved | None) -> TrainConfig:
    """Returns the configuration with the rule for overlong targets that the file says, or else the run began with."""
    if config.masking.overlong is not None:
        return config
    began = "fill" if saved is None else saved.document["config"]["masking"].get("overlong", _RULE_BEFORE)
    return config.model_copy(update={"masking": replace(config.masking, overlong=began)})


def _check_names(config: TrainConfig, vocabulary: Vocabulary) -> None:
    config.masking.check(vocabulary)
    known = [one.name for one in vocabulary.modalities]
    for name in config.loss_weights:
        if name not in known:
            raise ConfigError(f"loss_weights: no modality {name!r} in the snapshots; {nearest(name, known)}")
