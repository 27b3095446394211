"""The contract of `labelers/protocol.py`, held against every labeler of the folder; weights are small random ones."""

import copy
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data

from labelers import protocol
from manifests.modality import MODALITIES
from manifests.recipe import canonical_json

# What a constructor needs that has no default, by the labeler's name.
OPTIONS: dict[str, dict[str, Any]] = {"files": {"modality": "depth", "column": "depth", "null": 0.0}}
PHOTOS = [
    skimage.data.astronaut(),
    np.ascontiguousarray(skimage.data.coffee()[:, :301]),
    skimage.data.rocket()[100:140, 200:320].copy(),
]
COLUMNS = [
    {"caption": "  An astronaut smiles. ", "text": "One.\n", "depth": [[0.0, 1.0], [2.0, 3.0]]},
    {"caption": ["", "a cup of coffee"], "text": "Two", "depth": [[4.0, 5.0]]},
    {"caption": None},
]
INPUTS: dict[str, Sequence[Any]] = {
    "columns": COLUMNS,
    "source": ["photos/a.png", "photos/b.png", "memory://photos/c.png"],
    "caption": ["An astronaut smiles.", "a cup of coffee", None],
}
WEIGHTLESS = [name for name in protocol.names() if protocol.find(name).spec.checkpoint is None]
WITH_WEIGHTS = [name for name in protocol.names() if name not in WEIGHTLESS]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a labeler opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def build(name: str, **options: Any) -> protocol.Labeler:
    return protocol.build(protocol.find(name), {**OPTIONS.get(name, {}), **options})


def batch_for(labeler: protocol.Labeler, rows: Sequence[int], side: int = 64) -> dict[str, Any]:
    """A batch of some of the three samples, with the labeler's inputs and no others."""
    if labeler.spec.scope == "crop":
        photos: Any = np.stack([cv2.resize(PHOTOS[row], (side, side), interpolation=cv2.INTER_AREA) for row in rows])
    else:
        photos = [PHOTOS[row].copy() for row in rows]
    available = {**{name: [values[row] for row in rows] for name, values in INPUTS.items()}, "image": photos}
    return {name: copy.deepcopy(available[name]) for name in labeler.spec.inputs}


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right
        assert type(left) is type(right)


def assert_fits(name: str, label: Any, size: int | None) -> None:
    """Type, axes and dtype by the protocol's own check, then range and plain values."""
    modality = MODALITIES[name]
    protocol.check_label(modality, label, any_size=True)
    if modality.kind == "structured":
        records = label if modality.many else [label]
        for record in records:
            canonical_json(record)
            for field, arrow_type in modality.fields.items():
                assert_field(record[field], arrow_type)
            if modality.range:
                assert all(0 <= record[field] <= 1 for field in ("score", "x0", "y0", "x1", "y1"))
                assert record["x0"] < record["x1"]
                assert record["y0"] < record["y1"]
    elif modality.kind != "text":
        lowest, highest = modality.range or (-np.inf, np.inf)
        label = np.asarray(label)
        present = label[~np.isnan(label)] if label.dtype.kind == "f" else label
        assert present.min() >= lowest
        assert present.max() <= highest
        if size is not None:
            assert label.shape[0] == size
            assert "h" not in modality.axes or label.shape[:2] == (size, size)


def assert_field(value: Any, arrow_type: str) -> None:
    if arrow_type.startswith("list<"):
        for entry in value:
            assert_field(entry, arrow_type[5:-1])
    elif arrow_type == "string":
        assert isinstance(value, str)
    elif arrow_type.startswith("float"):
        assert isinstance(value, float)
        assert np.isfinite(value)
    elif value is not None:
        assert type(value) is int
        limits = np.iinfo(arrow_type)
        assert limits.min <= value <= limits.max


@pytest.mark.parametrize("name", protocol.names())
def test_the_spec_states_the_facts(name):
    labeler = protocol.find(name)
    spec = labeler.spec
    assert spec.name == name
    assert spec.version >= 1
    assert spec.licence_code
    assert (spec.licence_weights is None) == (spec.checkpoint is None)
    assert all(output in MODALITIES for output in spec.outputs or ())
    assert labeler.__doc__
    parameters = protocol.parameters(labeler, OPTIONS.get(name, {}))
    canonical_json(parameters)
    assert parameters.get("checkpoint") == spec.checkpoint


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_the_contract(name):
    labeler = build(name)
    assert isinstance(labeler, protocol.Labeler)
    batch = batch_for(labeler, [0, 1, 2])
    before = copy.deepcopy(batch)
    together = labeler.label(batch)
    assert_same(batch, before)

    outputs = labeler.spec.outputs or (OPTIONS[name]["modality"],)
    assert set(together) == set(outputs)
    assert any(label is not None for labels in together.values() for label in labels)
    for output, labels in together.items():
        assert len(labels) == 3
        for label in labels:
            if label is not None:
                assert_fits(output, label, 64 if labeler.spec.scope == "crop" else None)

    assert_same(dict(labeler.label(batch_for(labeler, [0, 1, 2]))), dict(together))
    assert_same(dict(build(name).label(batch_for(labeler, [0, 1, 2]))), dict(together))
    for row in range(3):
        alone = labeler.label(batch_for(labeler, [row]))
        for output in outputs:
            assert_same(alone[output][0], together[output][row])


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_the_contract_of_those_with_weights(name: str, checkpoint: Callable[[str], str]) -> None:
    """Bits may depend on the shape of the batch, which the engine fixes, and on nothing else."""
    labeler = build(name, checkpoint=checkpoint(name))
    assert isinstance(labeler, protocol.Labeler)
    batch = batch_for(labeler, [0, 1, 2], 224)
    before = copy.deepcopy(batch)
    together = labeler.label(batch)
    assert_same(batch, before)
    assert set(together) == set(labeler.spec.outputs or ())
    for output, labels in together.items():
        assert len(labels) == 3
        for label in labels:
            assert_fits(output, label, MODALITIES[output].shape()[0] if labeler.spec.scope == "crop" else None)

    again = build(name, checkpoint=checkpoint(name))
    for other in (labeler.label(batch), again.label(batch)):
        for output, labels in together.items():
            assert_same(list(other[output]), list(labels))
    batch["image"][1] = np.zeros_like(batch["image"][1])
    beside_a_blank = labeler.label(batch)
    for output, labels in together.items():
        assert_same([beside_a_blank[output][row] for row in (0, 2)], [labels[row] for row in (0, 2)])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_photographs_of_few_pixels_have_depth_too(shape: tuple[int, int], checkpoint: Callable[[str], str]) -> None:
    labeler = build("dpt", checkpoint=checkpoint("dpt"))
    (label,) = labeler.label({"image": [np.full((*shape, 3), 90, np.uint8)]})["depth"]
    assert_fits("depth", label, None)


@pytest.mark.parametrize("name", [name for name in WEIGHTLESS if "image" in protocol.find(name).spec.inputs])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_photographs_of_few_pixels_have_labels_too(name, shape):
    labeler = build(name)
    batch = batch_for(labeler, [0])
    side = max(shape)
    batch["image"] = (
        np.full((1, side, side, 3), 90, np.uint8)
        if labeler.spec.scope == "crop"
        else [np.arange(shape[0] * shape[1] * 3, dtype=np.uint64).astype(np.uint8).reshape(*shape, 3)]
    )
    for output, (label,) in labeler.label(batch).items():
        assert_fits(output, label, None)


def test_specs_can_be_read_where_only_the_base_is_installed():
    """`requires` is for telling a person what to install, so reading it must not need it."""
    code = (
        "import sys\n"
        "for package in ('numpy', 'cv2', 'PIL', 'skimage', 'scipy', 'torch'):\n"
        "    sys.modules[package] = None\n"
        "from labelers import protocol\n"
        "print([protocol.find(name).spec.name for name in sys.argv[1:]])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, *protocol.names()], capture_output=True, text=True)
    assert ran.stdout.strip() == str(protocol.names()), ran.stderr
