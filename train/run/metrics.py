"""What a run writes about itself: metrics.jsonl always, TensorBoard where it is installed; and the loss of guessing.

A line of metrics.jsonl is one JSON object with `kind` and `time`; numbers a modality stand in an object by its name:

    {"kind": "unigram", ...}      what guessing by frequency costs, see `Unigram`
    {"kind": "train", "step": 20, "loss": .., "losses": {"rgb": ..}, "lr": .., "gradient_norm": .., "tokens_per_s": .., ...}
    {"kind": "validation", "step": 100, "loss": .., "losses": {"rgb": ..}, "targets": {"rgb": ..}}

Losses are nats a target. `train` lines are means over the steps since the line before.
"""

import json
import os
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
from manifests.store.storage import Storage
from train.data.batch import MaskedBatch
from train.data.vocabulary import Vocabulary

FILE = "metrics.jsonl"
_TENSORBOARD = "tensorboard"


class Metrics:
    """The lines of a run's metrics, kept in a local folder and copied to the run's own where that is on an object store.

    `step` is where the run goes on: later lines are cut off first, so that the file tells one story.
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
        """One line, which is returned; its numbers go to TensorBoard where the line has a step."""
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
    """The whole lines of a metrics file; one that a crash cut off is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _cut(path: Path, step: int) -> None:
    """Takes away the lines after a step, and what is no whole line."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line.get("step", 0) <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _tensorboard(folder: Path, step: int, say: Callable[[str], None]) -> Any:
    """TensorBoard's writer, None where it is not installed."""
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
    """Sums over the steps since the last line of metrics; part of a checkpoint, so that lines do not depend on it."""

    steps: int
    loss: float
    norm: float
    sums: list[float]
    counts: list[int]

    @classmethod
    def empty(cls, modalities: int) -> Self:
        """Before the first step."""
        return cls(steps=0, loss=0.0, norm=0.0, sums=[0.0] * modalities, counts=[0] * modalities)

    def add(self, value: float, sums: Sequence[float], counts: Sequence[int], norm: float) -> None:
        """One step more: its loss, nats and targets by modality, gradient norm."""
        self.steps += 1
        self.loss += value
        self.norm += norm
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]

    def means(self, names: Sequence[str]) -> dict[str, Any]:
        """The fields of a line of metrics."""
        return {
            "loss": self.loss / max(1, self.steps),
            "losses": per_target(names, self.sums, self.counts),
            "gradient_norm": self.norm / max(1, self.steps),
        }


class Clock:
    """Time and rows since the last line of metrics."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited_s = 0.0
        self.tokens = 0
        self.rows = 0


def per_target(names: Sequence[str], sums: Sequence[float], counts: Sequence[int]) -> dict[str, float | None]:
    """Nats a target by modality, None where there was none."""
    return {name: total / count if count else None for name, total, count in zip(names, sums, counts, strict=True)}


# -- guessing by frequency -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Unigram:
    """How often each token was a target in masked training rows: what a model knows that looks at nothing.

    rows    training rows that were counted
    counts  by modality, of each token
    """

    rows: int
    counts: Mapping[str, Int64[np.ndarray, "vocabulary"]]

    def entropies(self) -> dict[str, float | None]:
        """Nats a target of the counted rows themselves, by modality; None where it had no target."""
        found: dict[str, float | None] = {}
        for name, counts in self.counts.items():
            shares = counts[counts > 0] / max(1, counts.sum())
            found[name] = float(-(shares * np.log(shares)).sum()) if len(shares) else None
        return found

    def cross_entropies(self, held_out: "Unigram") -> dict[str, float | None]:
        """Nats a target of other rows when each token is guessed as often as it was counted here, plus one.

        This is the loss that a model has to beat there; None where the modality has no target there.
        """
        found: dict[str, float | None] = {}
        for name, counts in self.counts.items():
            asked = held_out.counts[name]
            logs = np.log((counts + 1) / (counts.sum() + len(counts)))
            found[name] = float(-(asked * logs).sum() / asked.sum()) if asked.sum() else None
        return found


def count_targets(batches: Iterable[MaskedBatch], vocabulary: Vocabulary) -> Unigram:
    """The targets of masked batches, counted."""
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
