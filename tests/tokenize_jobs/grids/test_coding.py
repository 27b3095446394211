"""Codings of labels: tensors on a device as arrays, and feature maps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from manifests.modality import MODALITIES, Modality
from tokenize_jobs.grids.coding import coding_of
from tokenize_jobs.reconstruction import flat


def labels_of(modality: Modality, rng: np.random.Generator) -> np.ndarray:
    """Three rows of 32 px, the last of them with pixels without a value."""
    shape = (3, *modality.shape())
    if modality.dtype == "uint8":
        labels = rng.integers(0, 6, shape).astype(np.uint8)
    else:
        labels = rng.normal(size=shape).astype(np.float32) * 3
    if modality.null is not None:
        labels[2, :9] = modality.null
    return labels


@pytest.mark.parametrize("name", ["rgb", "edges", "depth", "normals", "segmentation", "dinov2"])
def test_tensors_are_prepared_like_arrays(name: str) -> None:
    modality = replace(MODALITIES[name], size=MODALITIES[name].stride * 32)
    coding = replace(coding_of(modality), classes=4 if name == "segmentation" else 0)
    labels = labels_of(modality, np.random.default_rng(0))
    expected, _ = coding.prepare(labels, coding.scaling(labels))
    found = coding.prepare_tensor(torch.from_numpy(labels))
    assert found.dtype == (torch.int64 if name == "segmentation" else torch.float32)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_a_row_without_any_value_is_prepared_as_nothing() -> None:
    modality = replace(MODALITIES["depth"], size=32)
    labels = torch.full((1, 32, 32), float("nan"))
    assert not coding_of(modality).prepare_tensor(labels).any()


def test_features_keep_their_scale() -> None:
    modality = MODALITIES["dinov2"]
    coding = coding_of(modality)
    assert coding.rule == "plain"
    labels = np.random.default_rng(0).normal(2.0, 5.0, (2, *modality.shape())).astype(np.float32)
    labels[0, 3, 4, 5] = np.nan
    inputs, valid = coding.prepare(labels, coding.scaling(labels))
    assert not valid[0, 3, 4]
    assert valid.sum() == 2 * 256 - 1
    assert not inputs[0, 3, 4].any()
    np.testing.assert_array_equal(coding.finish(inputs)[valid], labels[valid])
    assert flat(coding, labels[1:]).shape == labels[1:].shape
