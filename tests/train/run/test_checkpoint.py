"""Checkpoints: whole or not there, checked, kept by count, on a local folder and on an object store."""

import errno
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manifests.errors import ConfigError, ShardError, UserError
from manifests.store.storage import Storage, open_storage
from train.data.vocabulary import TokenModality, Vocabulary
from train.model.transformer import Model, ModelConfig
from train.optim.adam import OptimizerOptions, adam
from train.run import checkpoint, generators
from train.run.checkpoint import Saved
from train.run.metrics import Window


def vocabulary(digest: str = "a" * 64, name: str = "rgb") -> Vocabulary:
    one = TokenModality(
        name=name, sequence=False, vocabulary=8, tokens=4, offset=0, tokenizer=name, digest=digest, path="tokenizers/x"
    )
    return Vocabulary(modalities=(one,), size=8)


CONFIG = {"depth": 1, "dim": 8, "heads": 1, "encoder_depth": None, "decoder_depth": None, "mlp_ratio": 2.0}
DOCUMENT = {
    "vocabulary": vocabulary().document(),
    "model": CONFIG,
    "config": {"seed": 0},
    "workspaces": [{"uri": "../..", "id": "x"}],
    "tokenizers": {"rgb": {"workspace": 0}},
    "identity": "a" * 64,
    "loader": {"slot": 40},
    "window": asdict(Window.empty(1)),
    "losses": {},
    "generators": {},
}


def made(seed: int = 0) -> tuple[Model, torch.optim.Adam]:
    """A model after one update of its head."""
    model = Model(vocabulary(), ModelConfig(**CONFIG))
    model.initialize(seed)
    optimizer = adam(model, OptimizerOptions(weight_decay=0.1), torch.device("cpu"))
    model.logits(torch.ones(2, 8), 0).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(storage: Storage, step: int, keep: int = 2) -> Saved:
    return checkpoint.save(storage, step=step, model=made()[0], optimizer=made()[1], document=DOCUMENT, keep=keep)


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    local = request.param == "local"
    return open_storage(tmp_path / "work/runs/one" if local else f"memory://{tmp_path.name}/work/runs/one")


def steps(storage: Storage) -> list[str]:
    return storage.names(checkpoint.FOLDER)


def test_what_was_saved_comes_back(storage: Storage) -> None:
    model, optimizer = made()
    saved = checkpoint.save(storage, step=4, model=model, optimizer=optimizer, document=DOCUMENT, keep=1)
    other, moments = made(seed=1)
    assert not torch.equal(other.tokens.weight, model.tokens.weight)
    checkpoint.load_model(saved, other)
    checkpoint.load_optimizer(saved, other, moments)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert moments.state.keys() == {other.head.weight}
    for kind, value in optimizer.state[model.head.weight].items():
        assert torch.equal(value, moments.state[other.head.weight][kind]), kind


def test_the_newest_stay_and_are_found(storage: Storage) -> None:
    for step in (5, 10, 15):
        save(storage, step)
    assert steps(storage) == ["step-00000010", "step-00000015"]
    found = checkpoint.latest(storage, pytest.fail)
    assert found is not None
    assert found.step == 15
    assert checkpoint.remove_after(storage, 10) == ["step-00000015"]
    assert steps(storage) == ["step-00000010"]


def test_what_is_not_whole_is_passed_over_and_replaced(storage: Storage) -> None:
    save(storage, 5)
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        storage.put(f"{checkpoint.folder_of(10)}/{name}", b"cut")
    said: list[str] = []
    found = checkpoint.latest(storage, said.append)
    assert found is not None
    assert found.step == 5
    assert len(said) == 1
    assert "step-00000010 is no whole checkpoint (no checkpoint.json)" in said[0]
    save(storage, 10)
    assert checkpoint.latest(storage, pytest.fail).step == 10  # type: ignore[union-attr]


def test_altered_bytes_are_found(storage: Storage) -> None:
    save(storage, 5)
    path = f"{checkpoint.folder_of(10)}/{checkpoint.MODEL}"
    saved = save(storage, 10)
    data = bytearray(storage.read(path))
    data[-1] ^= 1
    storage.replace(path, bytes(data))
    said: list[str] = []
    assert checkpoint.latest(storage, said.append).step == 5  # type: ignore[union-attr]
    assert "model.safetensors has sha256" in said[0]
    with pytest.raises(ShardError, match="it was altered or truncated; use another"):
        saved.tensors(checkpoint.MODEL)
    storage.replace(path, bytes(data[:-1]))
    with pytest.raises(ShardError, match="is missing or has not its"):
        checkpoint.read(storage, checkpoint.folder_of(10))


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    # A disk that is truly full cannot be had in a test: the k-th file that is put finds no space.
    storage = open_storage(tmp_path / "run")
    save(storage, 5, keep=1)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    put, calls = Storage.put, []

    def full(self: Storage, path: str, data: Any) -> bool:
        calls.append(path)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(self, path, data)

    monkeypatch.setattr(Storage, "put", full)
    with pytest.raises(
        UserError, match=r"is full: the checkpoint of step 10 could not be saved, .*step-00000005 stays"
    ):
        save(storage, 10, keep=1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert checkpoint.latest(storage, pytest.fail).step == 5  # type: ignore[union-attr]


def test_another_vocabulary_is_named_with_both_digests(tmp_path: Path) -> None:
    saved = save(open_storage(tmp_path), 5)
    checkpoint.check_vocabulary(saved, vocabulary())
    with pytest.raises(
        ConfigError, match=r"trained on another 'rgb' .* row of rgb-aaaaaaaaaaaa, .* row of rgb-bbbbbbbbbbbb"
    ):
        checkpoint.check_vocabulary(saved, vocabulary("b" * 64))
    with pytest.raises(ConfigError, match=r"trained on another 'depth' .* it has no such modality, they have 4 tokens"):
        checkpoint.check_vocabulary(saved, vocabulary(name="depth"))


def test_a_checkpoint_opens_from_its_folder_and_its_runs_and_moves_with_its_workspace(tmp_path: Path) -> None:
    save(open_storage(tmp_path / "work/runs/one"), 5)
    (tmp_path / "work").rename(tmp_path / "moved")
    run = tmp_path / "moved/runs/one"
    for place in (run, run / "checkpoints/step-00000005", f"{run}/"):
        opened = checkpoint.open_checkpoint(place)
        assert opened.step == 5
        assert opened.workspaces == {"rgb": str(tmp_path / "moved")}
        assert torch.equal(opened.model.head.weight, made()[0].head.weight)
    with pytest.raises(ConfigError, match=r"is no checkpoint and no run's folder with one; `modmill train FILE`"):
        checkpoint.open_checkpoint(tmp_path)


def altered(storage: Storage, change: Any) -> list[str]:
    """What is said when the newer of two checkpoints has other bytes in its document: the older one is found."""
    save(storage, 5)
    mark = f"{save(storage, 10).path}/{checkpoint.MARK}"
    storage.replace(mark, change(storage.read(mark)))
    said: list[str] = []
    found = checkpoint.latest(storage, said.append)
    assert found is not None
    assert found.step == 5
    assert len(said) == 1
    return said


def test_a_flipped_bit_of_the_document_is_found(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    save(storage, 5)
    mark = f"{save(storage, 10).path}/{checkpoint.MARK}"
    whole = storage.read(mark)
    # Not the name of the seal: without one it is a document of before.
    for place in (*range(0, len(whole) - 75, 5), *range(len(whole) - 66, len(whole) - 2, 5)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        storage.replace(mark, bytes(data))
        assert checkpoint.latest(storage, lambda _: None).step == 5, (place, data)  # type: ignore[union-attr]


def unsealed(data: bytes, change: Any = dict) -> bytes:
    """A document as it was before there were seals."""
    return json.dumps(change({name: value for name, value in json.loads(data).items() if name != "seal"})).encode()


@pytest.mark.parametrize("step", [11, 1_000_000, -1, "10", 10.5, None, True])
def test_another_step_is_found_in_a_document_without_a_seal_too(tmp_path: Path, step: Any) -> None:
    altered(open_storage(tmp_path), lambda data: unsealed(data, lambda document: {**document, "step": step}))


@pytest.mark.parametrize("name", [*sorted({"step", "files", *DOCUMENT})])
def test_a_missing_or_null_field_falls_back_to_the_checkpoint_before(tmp_path: Path, name: str) -> None:
    for number, change in enumerate((lambda found: found.pop(name), lambda found: found.update({name: None}))):

        def changed(document: dict[str, Any], change: Any = change) -> dict[str, Any]:
            change(document)
            return document

        said = altered(open_storage(tmp_path / str(number)), lambda data, of=changed: unsealed(data, of))
        assert name in said[0]
        assert "\n" not in said[0]


@pytest.mark.parametrize("name", ["vocabulary", "model", "files", "tokenizers", "workspaces", "window"])
@pytest.mark.parametrize("value", [{}, {"size": "x"}, {"rgb": 5}, [5], [{}], 5])
def test_a_field_of_another_form_falls_back_to_the_checkpoint_before(tmp_path: Path, name: str, value: Any) -> None:
    if value == {} and name in ("tokenizers", "model"):
        return  # There may be none, and a model has defaults.
    altered(open_storage(tmp_path), lambda data: unsealed(data, lambda document: {**document, name: value}))


@pytest.mark.parametrize("data", [b"[" * 100_000 + b"]" * 100_000, b"null", b"[]", b"\xff", b"9" * 5000])
def test_a_document_that_is_none_falls_back_to_the_checkpoint_before(tmp_path: Path, data: bytes) -> None:
    altered(open_storage(tmp_path), lambda _: data)


def test_a_checkpoint_of_before_there_were_seals_is_read(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    mark = f"{save(storage, 10).path}/{checkpoint.MARK}"
    storage.replace(mark, unsealed(storage.read(mark)))
    assert checkpoint.open_checkpoint(tmp_path).step == 10


def test_a_newer_format_and_a_broken_mark_are_refused(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    mark = f"{save(storage, 5).path}/{checkpoint.MARK}"
    document = json.loads(storage.read(mark))
    storage.replace(mark, json.dumps({**document, "format": 2}).encode())
    with pytest.raises(ConfigError, match="has format 2, this modmill reads up to 1"):
        checkpoint.open_checkpoint(tmp_path)
    storage.replace(mark, b"{}")
    with pytest.raises(ConfigError, match=r"checkpoint.json cannot be read"):
        checkpoint.open_checkpoint(tmp_path)


def test_workspaces_are_named_relative_only_inside_of_them() -> None:
    run = open_storage("/data/work/runs/one")
    assert checkpoint.relative_uri(open_storage("/data/work"), run) == "../.."
    assert checkpoint.relative_uri(open_storage("/data/wor"), run) == "/data/wor"
    remote = open_storage("memory://bucket/work/runs/one")
    assert checkpoint.relative_uri(open_storage("memory://bucket/work"), remote) == "../.."
    assert checkpoint.relative_uri(open_storage("/data/work"), remote) == "/data/work"
    assert checkpoint.resolved("../..", remote) == "memory://bucket/work"
    assert checkpoint.resolved("../..", run) == "/data/work"


def test_generators_go_on_where_they_were() -> None:
    document = json.loads(json.dumps(generators.states()))
    drawn = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    generators.restore(document)
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == drawn
