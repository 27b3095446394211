"""Depth of photographs: the true architecture with random weights, through the same loading path as published ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from labelers import pretrained
from labelers.dpt import Dpt, input_size
from manifests.errors import LabelError
from manifests.modality import MODALITIES
from manifests.pixels import crops

Checkpoint = Callable[[str], str]


def test_relative_depth_is_inverse_depth_turned_round(checkpoint: Checkpoint) -> None:
    """0 is the nearest point of the photograph, and larger is farther."""
    from transformers import AutoModelForDepthEstimation

    photo = skimage.data.coffee()
    labeler = Dpt(checkpoint=checkpoint("dpt"))
    (depth,) = labeler.label({"image": [photo]})["depth"]
    # 400 x 600 px at a shorter side of 112, in multiples of 14.
    assert (depth.shape, depth.dtype.name) == ((112, 168), "float32")
    assert depth.min() == 0
    assert depth.std() > 0.01

    with torch.inference_mode():
        model = AutoModelForDepthEstimation.from_pretrained(checkpoint("dpt")).eval()
        pixels = labeler.preprocessing.normalize(labeler._resized(torch.from_numpy(photo))[None])
        inverse = model(pixel_values=pixels).predicted_depth[0].numpy()
    np.testing.assert_allclose(depth, inverse.max() - inverse, rtol=0, atol=1e-4)


def test_metric_depth_is_meters(checkpoint: Checkpoint) -> None:
    (depth,) = Dpt(checkpoint=checkpoint("metric")).label({"image": [skimage.data.coffee()]})["depth"]
    assert depth.min() > 0
    assert depth.max() <= 20


def test_crops_are_cut_from_the_photographs_depth(checkpoint: Checkpoint) -> None:
    photo = skimage.data.coffee()
    (depth,) = Dpt(checkpoint=checkpoint("dpt")).label({"image": [photo]})["depth"]
    centre = crops.plan_crop(crops.CropRule(), "key", 0, 600, 400)
    cut = crops.crop_label(MODALITIES["depth"], depth, centre, 224)
    # 400 of 600 px are 112 of the 168 columns.
    np.testing.assert_array_equal(cut, depth[:, 28:140].repeat(2, axis=0).repeat(2, axis=1))


def test_a_photograph_is_labeled_the_same_beside_others(checkpoint: Checkpoint) -> None:
    labeler = Dpt(checkpoint=checkpoint("dpt"))
    photos = [skimage.data.coffee(), skimage.data.astronaut(), skimage.data.coffee()[:, ::-1]]
    together = labeler.label({"image": photos})["depth"]
    for photo, depth in zip(photos, together, strict=True):
        np.testing.assert_array_equal(labeler.label({"image": [photo]})["depth"][0], depth)


@pytest.mark.parametrize(
    ("photo", "expected"),
    [
        ((750, 1000), (518, 686)),  # the shorter side is the model's
        ((1000, 750), (686, 518)),
        ((200, 300), (350, 518)),  # enlarged no more than it must be
        ((600, 10_000), (518, 1554)),  # a panorama is squeezed
        ((1, 300), (14, 518)),
        ((1, 1), (518, 518)),
    ],
)
def test_the_size_that_goes_in(photo: tuple[int, int], expected: tuple[int, int], tmp_path: Path) -> None:
    facts = {"size": {"height": 518, "width": 518}, "keep_aspect_ratio": True, "ensure_multiple_of": 14}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    assert input_size(*photo, pretrained.preprocessing(tmp_path)) == expected


def test_the_size_that_goes_in_where_the_aspect_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 384, "width": 384}}))
    assert input_size(750, 1000, pretrained.preprocessing(tmp_path)) == (384, 384)


def test_what_is_not_finite_is_no_depth(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """NaN would pass as pixels without a value."""
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(checkpoint("dpt"), tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["head.conv1.bias"][0] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LabelError, match="NaN"):
        Dpt(checkpoint=str(copy)).label({"image": [skimage.data.coffee()]})
