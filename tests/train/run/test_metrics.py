"""The lines of metrics, cut where a run goes on, and the loss of guessing by frequency."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from manifests.store.storage import open_storage
from train.data.batch import MaskedBatch
from train.data.vocabulary import TokenModality, Vocabulary
from train.run.metrics import FILE, Metrics, Unigram, Window, count_targets, read_lines


def test_lines_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    said: list[str] = []
    storage = open_storage(tmp_path)
    metrics = Metrics(storage, tmp_path, step=0, say=said.append)
    metrics.write("unigram", rows=3)
    for step in (5, 10, 15):
        metrics.write("train", step=step, loss=0.1 * step, losses={"rgb": 1.0, "text": None})
    metrics.close()
    with open(tmp_path / FILE, "a") as file:
        file.write('{"kind": "train", "st')
    metrics = Metrics(storage, tmp_path, step=10, say=said.append)
    metrics.write("train", step=11, loss=7.0)
    metrics.close()
    found = read_lines(tmp_path / FILE)
    assert [line.get("step") for line in found] == [None, 5, 10, 11]
    assert found[2]["loss"] == 0.1 * 10
    assert len(said) in (0, 2), "one line an opening, where TensorBoard is not installed"


def test_lines_of_a_run_on_an_object_store_are_published(tmp_path: Path) -> None:
    storage = open_storage(f"memory://{tmp_path.name}/run")
    metrics = Metrics(storage, tmp_path / "a", step=0, say=lambda text: None)
    metrics.write("train", step=1, loss=1.0)
    metrics.write("train", step=2, loss=1.0)
    metrics.close()
    elsewhere = Metrics(storage, tmp_path / "b", step=1, say=lambda text: None)
    elsewhere.write("train", step=2, loss=2.0)
    elsewhere.close()
    assert [json.loads(line)["loss"] for line in storage.read(FILE).splitlines()] == [1.0, 2.0]


def test_a_window_is_the_mean_of_its_steps() -> None:
    window = Window.empty(2)
    window.add(1.0, [6.0, 0.0], [3, 0], 2.0)
    window.add(2.0, [2.0, 0.0], [1, 0], 4.0)
    assert window.means(["rgb", "text"]) == {"loss": 1.5, "losses": {"rgb": 2.0, "text": None}, "gradient_norm": 3.0}


def test_guessing_by_frequency_costs_its_cross_entropy() -> None:
    seen = Unigram(rows=4, counts={"rgb": np.array([3, 1, 0]), "text": np.array([0, 0])})
    assert seen.entropies()["rgb"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert seen.entropies()["text"] is None
    held_out = Unigram(rows=1, counts={"rgb": np.array([1, 0, 1]), "text": np.array([2, 0])})
    guessed = seen.cross_entropies(held_out)
    assert guessed["rgb"] == pytest.approx(-(math.log(4 / 7) + math.log(1 / 7)) / 2)
    assert guessed["text"] == pytest.approx(math.log(2))
    assert held_out.cross_entropies(seen)["text"] is None


def test_targets_are_counted_by_modality() -> None:
    modalities = tuple(
        TokenModality(name=name, sequence=False, vocabulary=3, tokens=4, offset=0, tokenizer="", digest="", path="")
        for name in ("depth", "rgb")
    )
    none = torch.zeros(0, dtype=torch.int64)
    batch = MaskedBatch(
        samples=2,
        input_ids=none,
        input_modality=none,
        input_position=none,
        input_sample=none,
        target_ids=torch.tensor([2, 2, 0]),
        previous_ids=torch.tensor([-1, -1, -1]),
        target_modality=torch.tensor([1, 1, 0]),
        target_position=torch.tensor([0, 1, 0]),
        target_sample=torch.tensor([0, 0, 1]),
    )
    found = count_targets([batch, batch], Vocabulary(modalities=modalities, size=3))
    assert found.rows == 4
    assert {name: counts.tolist() for name, counts in found.counts.items()} == {"depth": [2, 0, 0], "rgb": [0, 0, 4]}
