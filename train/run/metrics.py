"""Writes a run's metrics: always metrics.jsonl, TensorBoard if it is installed; and computes the loss of guessing.

A line of metrics.jsonl is one JSON object with `kind` and `time`; numbers per modality stand in an object by its name:

    {"kind": "unigram", ...}      what guessing by frequency costs, see `Unigram`
    {"kind": "train", "step": 20, "loss": .., "losses": {"rgb": ..}, "lr": .., "gradient_norm": .., "tokens_per_s": .., ...}
    {"kind": "validation", "step": 100, "loss": .., "losses": {"rgb": ..}, "targets": {"rgb": ..}}

Losses are nats per target. `train` lines are means over the steps since the line before.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
import torch
from jaxtyping import Int64

from manifests.log.entries import now
from manifests.store.storage import Storage, replace_file
from train.data.batch import MaskedBatch
from train.data.vocabulary import Vocabulary

FILE = "metrics.jsonl"
_TENSORBOARD = "tensorboard"


class Metrics:
    """Writes the lines of a run's metrics to a local folder, and copies them to the run's own if that is on an object store.

    `step` is where the run goes on: later lines are removed first, so that each step stands there once.
    """

    def __init__(self, storage: Storage, local: Path, *, step: int, say: Callable[[str], None]) -> None:
        self._storage = storage
        self._path = local / FILE
        local.mkdir(parents=True, exist_ok=True)
        if not storage.is_local and storage.exists(FILE):
            self._path.write_bytes(storage.read(FILE))
        _cut(self._path, step)
        self._file: TextIO = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self._writer = _tensorboard(local / _TENSORBOARD, step, say)

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Writes one line and returns it. Its numbers go to TensorBoard if the line has a step."""
        line = {"kind": kind, "time": now(), **fields}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._writer is not None and "step" in fields:
            for name, value in _scalars(fields):
                self._writer.add_scalar(f"{kind}/{name}", value, fields["step"])
        return line

    def publish(self) -> None:
        """Copies the lines to an object store."""
        if not self._storage.is_local:
            self._storage.replace(FILE, self._path.read_bytes())

    def close(self) -> None:
        """Publishes, and closes what is open."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        self.publish()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a metrics file; one that a crash cut off is skipped."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _cut(path: Path, step: int) -> None:
    """Removes the lines after a step, and incomplete lines."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line.get("step", 0) <= step]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _tensorboard(folder: Path, step: int, say: Callable[[str], None]) -> Any:
    """Returns TensorBoard's writer, or None if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say(f"TensorBoard is not installed (`pip install tensorboard`): metrics go to {FILE} alone")
        return None
    if step == 0 and folder.exists():
        shutil.rmtree(folder)
    return SummaryWriter(str(folder), purge_step=step + 1)


def _scalars(fields: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{below}", number) for below, number in value.items() if number is not None)
        elif name != "step" and isinstance(value, int | float):
            yield name, value


# -- what a line sums up ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Window:
    """Adds up the steps since the last line of metrics. It is part of a checkpoint: a stop does not change the lines."""

    steps: int
    loss: float
    norm: float
    sums: list[float]
    counts: list[int]

    @classmethod
    def empty(cls, modalities: int) -> Self:
        """Returns the window before the first step."""
        return cls(steps=0, loss=0.0, norm=0.0, sums=[0.0] * modalities, counts=[0] * modalities)

    def add(self, value: float, sums: Sequence[float], counts: Sequence[int], norm: float) -> None:
        """Adds a step: its loss, nats and targets by modality, gradient norm."""
        self.steps += 1
        self.loss += value
        self.norm += norm
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]

    def means(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns the fields of a line of metrics."""
        return {
            "loss": self.loss / max(1, self.steps),
            "losses": per_target(names, self.sums, self.counts),
            "gradient_norm": self.norm / max(1, self.steps),
        }


class Clock:
    """Measures time, rows and tokens since the last line of metrics."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited_s = 0.0
        self.tokens = 0
        self.rows = 0


def per_target(names: Sequence[str], sums: Sequence[float], counts: Sequence[int]) -> dict[str, float | None]:
    """Returns nats per target by modality, None if it had no target."""
    return {name: total / count if count else None for name, total, count in zip(names, sums, counts, strict=True)}


# -- guessing by frequency -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Unigram:
    """Counts how often each token was a target in masked training rows: what a model that looks at nothing can know.

    rows    training rows that were counted
    counts  by modality, of each token
    """

    rows: int
    counts: Mapping[str, Int64[np.ndarray, "vocabulary"]]

    def entropies(self) -> dict[str, float | None]:
        """Returns nats per target of the counted rows themselves, by modality; None if it had no target."""
        found: dict[str, float | None] = {}
        for name, counts in self.counts.items():
            shares = counts[counts > 0] / max(1, counts.sum())
            found[name] = float(-(shares * np.log(shares)).sum()) if len(shares) else None
        return found

    def cross_entropies(self, held_out: "Unigram") -> dict[str, float | None]:
        """Returns nats per target of other rows if each token is guessed as often as it was counted here, plus one.

        A model has to beat this loss on those rows. None if the modality has no target there.
        """
        found: dict[str, float | None] = {}
        for name, counts in self.counts.items():
            asked = held_out.counts[name]
            logs = np.log((counts + 1) / (counts.sum() + len(counts)))
            found[name] = float(-(asked * logs).sum() / asked.sum()) if asked.sum() else None
        return found


def count_targets(batches: Iterable[MaskedBatch], vocabulary: Vocabulary) -> Unigram:
    """Counts the targets of masked batches."""
    counts = [torch.zeros(one.vocabulary, dtype=torch.int64) for one in vocabulary.modalities]
    rows = 0
    for batch in batches:
        rows += batch.samples
        for index, found in enumerate(counts):
            ids = batch.target_ids[batch.target_modality == index].cpu()
            found += torch.bincount(ids, minlength=len(found))
    return Unigram(
        rows=rows, counts={one.name: found.numpy() for one, found in zip(vocabulary.modalities, counts, strict=True)}
    )
