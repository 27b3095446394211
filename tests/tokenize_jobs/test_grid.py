"""The grid tokenizer: codings of labels, encode and decode."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from manifests.errors import ConfigError, TokenizeError
from manifests.modality import MODALITIES, Modality
from tokenize_jobs import protocol
from tokenize_jobs.grid import GridTokenizer, write
from tokenize_jobs.grids.coding import Coding, coding_of, trimmed_statistics
from tokenize_jobs.grids.networks import empty, initialize, start_from
from tokenize_jobs.quantizers.vq import start_codebook

BANDS = Modality(
    name="bands",
    kind="image",
    label_grain="crop",
    token_grain="crop",
    crop_rule="linear",
    labeler="files",
    tokenizer="grid",
    axes="h w c",
    channels=5,
    dtype="uint16",
    unit="digital number",
    range=(0, 10000),
    null=0.0,
)


def coding(name: str, classes: int = 4) -> Coding:
    found = coding_of(MODALITIES[name])
    return replace(found, classes=classes) if found.rule == "classes" else found


def labels_of(modality: Modality, rows: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (rows, *modality.shape())
    if coding_of(modality).rule == "classes":
        return rng.integers(4, size=shape).astype(modality.dtype)
    if coding_of(modality).rule == "direction":
        vectors = rng.normal(size=shape)
        return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return rng.uniform(1, 250, size=shape).astype(modality.dtype)


def tokenizer_folder(folder: Path, modality: Modality) -> Path:
    """A tokenizer that was started from random latents and not fitted."""
    code = coding_of(modality)
    if code.rule == "classes":
        code = replace(code, classes=4)
    shape = {
        "channels": 5 if code.rule == "classes" else code.channels,
        "classes": code.classes,
        "patch": 8,
        "codebook": 32,
        "latent": 4,
        "width": 8,
        "encoder_blocks": 1,
        "decoder_blocks": 1,
    }
    generator = torch.Generator().manual_seed(0)
    network = empty(**shape)
    initialize(network, generator)
    start_from(network, torch.randn(100, 64 * shape["channels"], generator=generator), generator)
    latents = torch.randn(500, 4, generator=generator)
    start_codebook(network.codebook, latents, rounds=2, batch=100, rng=np.random.default_rng(0))
    write(folder, network, code, modality=modality, shape=shape, fit={"steps": 0})
    return folder


def small(name: str) -> Modality:
    return replace(MODALITIES[name], size=32) if name in MODALITIES else replace(BANDS, size=32)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("rgb", "range"),
        ("edges", "range"),
        ("depth", "standardize"),
        ("normals", "direction"),
        ("segmentation", "classes"),
    ],
)
def test_the_facts_of_a_modality_choose_its_coding(name: str, rule: str) -> None:
    found = coding_of(MODALITIES[name])
    assert found.rule == rule
    assert found.mirror_x == (name == "normals")
    assert Coding(**asdict(found)) == found


def test_own_modalities_need_no_code() -> None:
    assert coding_of(BANDS).rule == "range"
    assert coding_of(replace(BANDS, range=None)).rule == "standardize"
    with pytest.raises(ConfigError, match="axes 'd'"):
        coding_of(replace(BANDS, axes="d"))
    with pytest.raises(ConfigError, match="low < high"):
        coding_of(replace(BANDS, range=(5, 5)))


@given(arrays(np.uint8, (2, 4, 4, 3)))
def test_bytes_survive_scaling(labels: np.ndarray) -> None:
    code = coding("rgb")
    prepared, valid = code.prepare(labels, code.scaling(labels))
    assert prepared.dtype == np.float32
    assert prepared.min() >= -1
    assert prepared.max() <= 1
    assert valid.all()
    assert np.array_equal(code.finish(prepared), labels)


@given(arrays(np.uint16, (1, 3, 3, 5), elements=st.integers(0, 10000)))
def test_16_bit_bands_survive_scaling_where_they_are_valid(labels: np.ndarray) -> None:
    code = coding_of(BANDS)
    prepared, valid = code.prepare(labels, code.scaling(labels))
    assert np.array_equal(valid, (labels != 0).any(axis=-1))
    assert not prepared[~valid].any()
    assert np.array_equal(code.finish(prepared)[valid], labels[valid])


def test_values_outside_the_range_are_clipped() -> None:
    code = replace(coding_of(BANDS), channels=1)
    labels = np.array([20000, 10000], dtype=np.uint16).reshape(1, 1, 2, 1)
    assert code.prepare(labels, code.scaling(labels))[0].ravel().tolist() == [1.0, 1.0]
    assert code.finish(np.array([-3.0, 3.0], dtype=np.float32).reshape(1, 1, 2, 1)).ravel().tolist() == [0, 10000]


@given(arrays(np.float32, st.integers(1, 200), elements=st.floats(0, 100, width=32)))
def test_trimmed_statistics_are_those_of_the_middle_of_the_sorted_values(values: np.ndarray) -> None:
    cut = len(values) // 10
    middle = np.sort(values)[cut : len(values) - cut].astype(np.float64)
    mean, deviation = trimmed_statistics(values)
    assert mean == pytest.approx(middle.mean(), abs=1e-6)
    assert deviation == pytest.approx(np.sqrt(middle.var() + 1e-6), rel=1e-6)


def test_depth_loses_its_scale_and_its_nulls() -> None:
    code = coding("depth")
    near = np.random.default_rng(0).uniform(1, 5, size=(1, 20, 20)).astype(np.float32)
    holes = near.copy()
    holes[0, :5] = np.nan
    holes[0, 5, 0] = np.inf
    prepared, valid = code.prepare(
        np.concatenate([near, near * 30 + 2]), code.scaling(np.concatenate([near, near * 30 + 2]))
    )
    assert np.allclose(prepared[0], prepared[1], atol=1e-4)
    assert valid.all()
    prepared, valid = code.prepare(holes, code.scaling(holes))
    assert valid.sum() == 400 - 101
    assert not prepared[0][~valid[0]].any()
    assert np.isfinite(prepared).all()
    nothing = np.full((1, 20, 20), np.nan, dtype=np.float32)
    assert not code.prepare(nothing, code.scaling(nothing))[0].any()


def test_normals_without_a_direction_are_null_and_decoded_ones_have_length_1() -> None:
    code = coding("normals")
    labels = np.zeros((1, 1, 2, 3), dtype=np.float32)
    labels[0, 0, 0] = (0.6, 0.0, -0.8)
    assert code.prepare(labels, code.scaling(labels))[1].tolist() == [[[True, False]]]
    assert np.allclose(code.finish(labels * 0.7)[0, 0, 0], (0.6, 0.0, -0.8))
    assert not code.finish(labels * 0.3).any()


def test_classes_that_were_never_seen_are_null() -> None:
    labels = np.array([[[0, 3, 4, 255]]], dtype=np.uint8)
    code = coding("segmentation", classes=4)
    prepared, valid = code.prepare(labels, code.scaling(labels))
    assert prepared.tolist() == [[[0, 3, 4, 4]]]
    assert valid.tolist() == [[[True, True, False, False]]]
    decoded = code.finish(np.eye(4, dtype=np.float32)[[2, 0]].reshape(1, 1, 2, 4))
    assert decoded.dtype == np.uint8
    assert decoded.tolist() == [[[2, 0]]]


@pytest.mark.parametrize("name", ["rgb", "edges", "depth", "normals", "segmentation", "bands"])
def test_encodes_and_decodes_in_the_form_of_the_labels(tmp_path: Path, name: str) -> None:
    modality = small(name)
    folder = tokenizer_folder(tmp_path / "tokenizer", modality)
    tokenizer = protocol.load(folder, name)
    assert isinstance(tokenizer, protocol.Tokenizer)
    assert (tokenizer.spec.vocabulary, tokenizer.spec.tokens) == (32, 16)
    labels = labels_of(modality)
    labels[2] = 0
    tokens = tokenizer.encode(labels)
    assert [row.shape for row in tokens] == [(16,)] * 3
    assert all(row.dtype == np.int64 for row in tokens)
    decoded = tokenizer.decode(tokens)
    assert isinstance(decoded, np.ndarray)
    assert (decoded.shape, decoded.dtype) == (labels.shape, labels.dtype)
    assert np.isfinite(decoded).all()
    assert all(np.array_equal(a, b) for a, b in zip(tokens, tokenizer.encode(labels), strict=True))


@pytest.mark.parametrize("name", ["rgb", "depth", "segmentation"])
def test_rows_do_not_see_each_other(tmp_path: Path, name: str) -> None:
    modality = small(name)
    tokenizer = GridTokenizer.load(tokenizer_folder(tmp_path, modality), name)
    labels = labels_of(modality, rows=4)
    others = labels_of(modality, rows=4, seed=1)
    others[1] = labels[1]
    assert np.array_equal(tokenizer.encode(labels)[1], tokenizer.encode(others)[1])
    assert not np.array_equal(tokenizer.encode(labels)[0], tokenizer.encode(others)[0])


def test_tokens_are_in_row_major_order(tmp_path: Path) -> None:
    modality = small("rgb")
    tokenizer = GridTokenizer.load(tokenizer_folder(tmp_path, modality), "rgb")
    labels = labels_of(modality, rows=1)
    changed = labels.copy()
    changed[0, 0:8, 24:32] = 255
    before, after = tokenizer.encode(labels)[0], tokenizer.encode(changed)[0]
    # The trunks start at zero, so that only the changed patch, the last of the first row, may change.
    assert np.flatnonzero(before != after).tolist() in ([3], [])
    changed[0, 8:16, 0:8] = 255 - changed[0, 8:16, 0:8]
    assert set(np.flatnonzero(before != tokenizer.encode(changed)[0]).tolist()) <= {3, 4}


def test_equal_arguments_are_written_as_equal_bytes(tmp_path: Path) -> None:
    folders = [tokenizer_folder(tmp_path / name, small("normals")) for name in ("a", "b")]
    assert protocol.digest(folders[0]) == protocol.digest(folders[1])
    assert sorted(path.name for path in folders[0].iterdir()) == ["config.json", "model.safetensors"]


def test_serves_modalities_of_the_same_form(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, small("rgb"))
    larger = GridTokenizer.load(folder, "rgb@64")
    assert (larger.spec.modality, larger.spec.tokens) == ("rgb@64", 64)
    assert larger.encode(np.zeros((1, 64, 64, 3), dtype=np.uint8))[0].shape == (64,)
    with pytest.raises(ConfigError, match="fitted on 'rgb'"):
        GridTokenizer.load(folder, "normals")


def test_wrong_files_labels_and_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no grid tokenizer"):
        GridTokenizer.load(tmp_path, "rgb")
    tokenizer = GridTokenizer.load(tokenizer_folder(tmp_path, small("rgb")), "rgb")
    with pytest.raises(TokenizeError, match=r"uint8 \(16, 16, 3\), expected uint8 \(32, 32, 3\)"):
        tokenizer.encode(np.zeros((1, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(TokenizeError, match="float32"):
        tokenizer.encode(np.zeros((1, 32, 32, 3), dtype=np.float32))
    with pytest.raises(TokenizeError, match=r"shape \(5,\)"):
        tokenizer.decode([np.zeros(5, dtype=np.int64)])
    with pytest.raises(TokenizeError, match="from 0 to 32, expected 0 to 31"):
        tokenizer.decode([np.array([0] * 15 + [32])])
