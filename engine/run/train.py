"""Does `modmill train FILE`: reads the trainer file, shows how far the run is, and records it in the workspace's log."""

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.pipeline import file
from engine.progress.progress import Progress
from engine.progress.record import started_with
from manifests.errors import ConfigError, ModmillError
from manifests.log import entries as log
from manifests.log.actions import Action, RunEnded
from manifests.store.uris import absolute
from train.run.run import TrainingResult, train
from train.settings.trainer import TrainConfig, parse

_STAGE = "train"
_MOST_SHOWN = 12


def load(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads the configuration in a trainer file, with `--set` overrides.

    Relative paths in the file start at its folder, an `out` that is set at the current one. Raises ConfigError with every
    mistake, a line each.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is not there"
        raise ConfigError(f"{path} {found}, expected a trainer file; examples/train/tiny.yaml is one to begin with")
    document = file.read(path, expected="`steps`, `mixture` and `deepspeed`")
    parsed = [file.parse_override(text) for text in overrides]
    tree = document.tree
    for override in parsed:
        value = file.override_value(override, Path.cwd())
        if override.path == ("out",) and isinstance(value, str):
            value = absolute(value, Path.cwd())
        tree = file.with_override(tree, override, value)
    return parse(tree, folder=path.absolute().parent, where=lambda place: document.where(place, parsed))


def run(config: TrainConfig, *, resume: str | None = None, quiet: bool = False) -> TrainingResult:
    """Trains, with progress on the terminal and a record in the first snapshot's workspace. Raises what `train` raises."""
    if resume not in (None, "auto"):
        resume = absolute(str(resume), Path.cwd())
    progress = Progress(None, quiet=quiet)
    workspace = config.mixture[0].snapshot.rpartition("#")[0]
    record = _Record(workspace, progress.say)
    try:
        outcome = train(config, resume=resume, report=_Told(progress, record))
        record.status = outcome.status
        record.counts = {"steps": outcome.steps_done}
    except KeyboardInterrupt:
        record.status = "interrupted"
        raise
    finally:
        progress.close()
        record.end()
    return outcome


class _Record:
    """Writes the run's entries into a workspace's log. No lease is held: an entry that loses a race is made again."""

    def __init__(self, workspace: str, say: Callable[[str], None]) -> None:
        self.status = "failed"
        self.counts: dict[str, int] = {}
        self._workspace = workspace
        self._say = say
        self._run: str | None = None

    def begin(self, run: str, step: int, document: Mapping[str, Any]) -> None:
        """Commits that the run begins, or goes on after `step`: each sitting is a run of the log, with an end of its own."""
        name = f"{run}+{step}-{secrets.token_hex(3)}" if step else run
        if self._commit(started_with(name, "train", document), name):
            self._run = name

    def end(self) -> None:
        if self._run is not None:
            ended = RunEnded(run=self._run, time=log.now(), status=self.status, counts=self.counts)
            self._commit(ended, self._run)

    def _commit(self, action: Action, run: str) -> bool:
        """Commits an action; returns whether it stands in the log: training does not depend on it."""
        try:
            from manifests.catalog.catalog import Catalog

            with Catalog.open(self._workspace) as catalog:
                catalog.commit([action], run=run)
        except (ImportError, OSError, ModmillError) as error:
            self._say(f"not recorded in the log of {self._workspace}: {error}")
            return False
        return True


class _Told:
    """Takes what `train` reports, for people and for the record."""

    def __init__(self, progress: Progress, record: _Record) -> None:
        self._progress = progress
        self._record = record

    def __call__(self, kind: str, facts: Mapping[str, Any]) -> None:
        handler = getattr(self, f"_{kind}", None)
        if handler is not None:
            handler(facts)

    def _message(self, facts: Mapping[str, Any]) -> None:
        self._progress.say(facts["text"])

    def _run(self, facts: Mapping[str, Any]) -> None:
        document = {**facts["config"]["config"], "snapshots": facts["config"]["snapshots"]}
        self._progress.say(f"{facts['run']}: {facts['parameters']:,} parameters, in {_shortest(facts['folder'])}")
        if facts["step"] < facts["steps"]:
            self._record.begin(facts["run"], facts["step"], document)
            self._progress.stage(_STAGE, facts["steps"], "steps")
            # From here on the rate counts.
            self._progress.update(_STAGE, facts["step"])

    def _unigram(self, facts: Mapping[str, Any]) -> None:
        if facts["held_out"]:
            self._progress.say(f"guessing by frequency, held-out, nats a target: {_by_name(facts['held_out'])}")

    def _train(self, facts: Mapping[str, Any]) -> None:
        self._progress.update(_STAGE, facts["step"], note=f"loss {facts['loss']:.4f}")

    def _validation(self, facts: Mapping[str, Any]) -> None:
        self._progress.say(
            f"step {facts['step']:,}: held-out loss {facts['loss']:.4f} nats a target: {_by_name(facts['losses'])}"
        )


def _by_name(values: Mapping[str, float | None]) -> str:
    shown = [f"{name} {value:.3f}" for name, value in values.items() if value is not None]
    more = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
    return "  ".join(shown[:_MOST_SHOWN]) + more


def _shortest(folder: str) -> str:
    """Returns a path relative to the current folder, if it lies in it."""
    here = f"{os.getcwd()}/"
    return folder.removeprefix(here)
