import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.transform import downscale_local_mean

from manifests.errors import ConfigError, LabelError
from manifests.modality import Modality, get
from manifests.pixels.crops import (
    Crop,
    CropRule,
    crop_label,
    crop_pixels,
    mask_box,
    plan_crop,
    reduce,
    reduce_to,
    rle_decode,
    rle_encode,
)
from manifests.recipe import canonical_json

WHOLE = Crop(0.0, 0.0, 1.0, 1.0, False)
MIRRORED = replace(WHOLE, flip=True)
RIGHT_HALF = Crop(0.5, 0.0, 1.0, 1.0, False)
RULE = CropRule()


def crop_of(modality: str, label: object, crop: Crop, size: int) -> object:
    return crop_label(get(modality), label, crop, size)


def custom(**facts: object) -> Modality:
    plain: dict = {
        "name": "bands",
        "kind": "image",
        "label_grain": "crop",
        "token_grain": "crop",
        "labeler": "files",
        "tokenizer": "grid",
        "axes": "h w",
        "dtype": "float32",
        "crop_rule": "linear",
    }
    return Modality(**{**plain, **facts})


# The plan.


def test_crop_0_is_the_largest_centered_square():
    assert plan_crop(RULE, "k", 0, 300, 200) == Crop(50 / 300, 0, 250 / 300, 1, False)
    assert plan_crop(RULE, "k", 0, 200, 301) == Crop(0, 50 / 301, 1, 250 / 301, False)
    assert plan_crop(RULE, "k", 0, 1, 1) == WHOLE
    assert plan_crop(CropRule(flip=1.0), "k", 0, 224, 224) == WHOLE


def test_the_plan_is_the_same_for_ever():
    """Known answers: another value here means that every crop of every workspace has moved."""
    crops = [plan_crop(RULE, "00f1a2b3c4d5e6f7", number, 640, 480) for number in (1, 2, 3)]
    pixels = [(crop.x0 * 640, crop.y0 * 480, crop.x1 * 640, crop.y1 * 480, crop.flip) for crop in crops]
    assert [tuple(round(edge) for edge in crop) for crop in pixels] == [
        (41, 20, 589, 473, 0),
        (56, 16, 632, 462, 1),
        (1, 4, 606, 475, 1),
    ]
    assert plan_crop(replace(RULE, seed=1), "00f1a2b3c4d5e6f7", 1, 640, 480) != crops[0]
    assert plan_crop(RULE, "00f1a2b3c4d5e6f8", 1, 640, 480) != crops[0]


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1), st.integers(0, 50), st.integers(1, 5000), st.integers(1, 5000))
def test_crops_lie_inside_on_whole_pixels(key, number, width, height):
    crop = plan_crop(RULE, key, number, width, height)
    assert 0 <= crop.x0 < crop.x1 <= 1
    assert 0 <= crop.y0 < crop.y1 <= 1
    for edge, length in ((crop.x0, width), (crop.x1, width), (crop.y0, height), (crop.y1, height)):
        assert edge * length == pytest.approx(round(edge * length), abs=1e-6)
    assert plan_crop(RULE, key, number, width, height) == crop


def test_areas_ratios_and_flips_follow_the_rule():
    rule = CropRule(scale=(0.2, 0.9), ratio=(0.5, 2.0), flip=0.25)
    crops = [plan_crop(rule, f"key {number}", 1, 1000, 1000) for number in range(2000)]
    areas = np.array([(crop.x1 - crop.x0) * (crop.y1 - crop.y0) for crop in crops])
    ratios = np.array([(crop.x1 - crop.x0) / (crop.y1 - crop.y0) for crop in crops])
    assert 0.19 < areas.min() < 0.22
    assert 0.86 < areas.max() <= 1
    assert ratios.min() > 0.49
    assert ratios.max() < 2.02
    assert abs(np.log(ratios).mean()) < 0.05
    assert abs(np.mean([crop.flip for crop in crops]) - 0.25) < 0.04
    assert abs(np.mean([(crop.x0 + crop.x1) / 2 for crop in crops]) - 0.5) < 0.02


def test_a_panorama_falls_back_to_the_centered_square():
    crop = plan_crop(CropRule(scale=(0.9, 1.0), ratio=(0.75, 1.333), flip=1.0), "k", 1, 5000, 100)
    assert crop == Crop(2450 / 5000, 0, 2550 / 5000, 1, True)


def test_equal_rules_have_equal_documents():
    assert canonical_json(CropRule(scale=(1, 1), flip=0).document()) == canonical_json(
        CropRule(scale=(1.0, 1.0), flip=0.0).document()
    )
    assert RULE.document() == {"seed": 0, "scale": [0.8, 1.0], "ratio": [0.75, 4 / 3], "flip": 0.5}


@pytest.mark.parametrize(
    "wrong", [{"scale": (0, 1)}, {"scale": (0.9, 0.8)}, {"scale": (0.5, 1.5)}, {"ratio": (2, 1)}, {"flip": 1.5}]
)
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"crop {next(iter(wrong))}"):
        CropRule(**wrong)


# Pixels.


def test_pixels_at_their_own_size_are_untouched():
    photo = skimage.data.astronaut()
    np.testing.assert_array_equal(crop_pixels(photo, WHOLE, 512), photo)
    np.testing.assert_array_equal(crop_pixels(photo, MIRRORED, 512), photo[:, ::-1])
    crop = Crop(100 / 512, 7 / 512, 324 / 512, 231 / 512, False)
    np.testing.assert_array_equal(crop_pixels(photo, crop, 224), photo[7:231, 100:324])


@pytest.mark.parametrize("size", [32, 100, 224, 600])
def test_pixels_keep_the_mean_and_have_the_size(size):
    photo = skimage.data.coffee()
    crop = plan_crop(RULE, "k", 0, photo.shape[1], photo.shape[0])
    cropped = crop_pixels(photo, crop, size)
    assert cropped.shape == (size, size, 3)
    assert cropped.dtype == np.uint8
    assert cropped.flags.c_contiguous
    np.testing.assert_allclose(cropped.mean((0, 1)), photo[:, 100:500].mean((0, 1)), atol=1)


def test_stripes_finer_than_a_pixel_become_gray():
    stripes = np.zeros((896, 896, 3), np.uint8)
    stripes[:, ::2] = 255
    cropped = crop_pixels(stripes, WHOLE, 224)
    assert abs(cropped.astype(int) - 128).max() <= 2


def test_nothing_outside_the_crop_bleeds_in():
    photo = np.zeros((300, 400, 3), np.uint8)
    photo[:, 200:] = 255
    assert (crop_pixels(photo, RIGHT_HALF, 64) == 255).all()


def test_reduced_pixels_stay_in_place():
    """Sides that no block divides: a ramp stays a ramp to its end."""
    ramp = np.repeat(np.linspace(0, 255, 1801)[None, :, None], 1357, axis=0).repeat(3, axis=2).astype(np.uint8)
    cropped = crop_pixels(ramp, WHOLE, 100).astype(float)
    expected = (np.arange(100) + 0.5) * 2.55
    assert np.abs(cropped[50, :, 0] - expected)[2:-2].max() < 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (3, 2)])
def test_tiny_photographs_can_be_cropped(shape):
    photo = np.full((*shape, 3), 90, np.uint8)
    for number in range(3):
        crop = plan_crop(RULE, "k", number, shape[1], shape[0])
        assert (crop_pixels(photo, crop, 48) == 90).all()


def test_reduce_gives_block_means():
    photo = skimage.data.astronaut()[:510, :512]
    means = downscale_local_mean(photo, (3, 4, 1))
    assert np.abs(reduce(photo, 3, 4) - means).max() <= 0.51
    uneven = reduce(photo[:100, :101], 3, 4)
    assert uneven.shape == (34, 26, 3)
    assert np.abs(uneven[-1, 0] - photo[99, :4].mean(0)).max() <= 1


def test_reduce_to_takes_the_smallest_factor_that_is_enough():
    photo = np.zeros((300, 1000, 3), np.uint8)
    assert reduce_to(photo, 1000).shape == (300, 1000, 3)
    assert reduce_to(photo, 999).shape == (150, 500, 3)
    assert reduce_to(photo, 100).shape == (30, 100, 3)
    assert reduce_to(np.zeros((2, 1000, 3), np.uint8), 100).shape == (1, 100, 3)


def test_threads_crop_alike():
    photo = skimage.data.astronaut()
    crops = [plan_crop(CropRule(scale=(0.1, 1.0)), "k", number, 512, 512) for number in range(12)]
    alone = [crop_pixels(photo, crop, 64) for crop in crops]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(lambda crop: crop_pixels(photo, crop, 64), crops), alone, strict=True):
            np.testing.assert_array_equal(found, expected)


# Labels.


def test_whole_labels_are_unchanged():
    assert crop_of("caption", "a cat", RIGHT_HALF, 224) == "a cat"
    record = {"entropy": 1.0}
    assert crop_of("metadata", record, MIRRORED, 224) is record


def test_rgb_labels_are_cropped_as_pixels():
    photo = skimage.data.astronaut()
    np.testing.assert_array_equal(crop_of("rgb", photo, RIGHT_HALF, 64), crop_pixels(photo, RIGHT_HALF, 64))


def test_nearest_maps_may_have_any_resolution():
    index = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert crop_of("segmentation", index, WHOLE, 2).tolist() == [[5, 7], [13, 15]]
    assert crop_of("segmentation", index, RIGHT_HALF, 2).tolist() == [[6, 7], [14, 15]]
    assert crop_of("segmentation", index, MIRRORED, 4).tolist() == index[:, ::-1].tolist()
    np.testing.assert_array_equal(crop_of("segmentation", index, WHOLE, 8), index.repeat(2, 0).repeat(2, 1))
    one = np.array([[7]], np.uint8)
    assert (crop_of("segmentation", one, RIGHT_HALF, 5) == 7).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(1, 9))
def test_nearest_invents_no_values_and_mirrors_exactly(width, height, size, number):
    index = np.random.default_rng(0).permutation(width * height).reshape(height, width).astype(np.uint16)
    crop = plan_crop(RULE, "k", number, width, height)
    depth = custom(crop_rule="nearest", dtype="uint16")
    cropped = crop_label(depth, index, crop, size)
    assert cropped.shape == (size, size)
    assert cropped.dtype == np.uint16
    assert set(cropped.ravel()) <= set(index.ravel())
    mirrored = crop_label(depth, index, replace(crop, flip=not crop.flip), size)
    np.testing.assert_array_equal(mirrored, cropped[:, ::-1])


def test_nearest_keeps_nulls():
    depth = np.array([[1.0, np.nan], [3.0, 4.0]], np.float32)
    np.testing.assert_array_equal(crop_of("depth", depth, MIRRORED, 2), [[np.nan, 1], [4, 3]])


def test_normals_are_mirrored_in_x():
    normals = np.zeros((2, 2, 3), np.float32)
    normals[0, 0] = [0.6, 0.0, 0.8]
    before = normals.copy()
    flipped = crop_of("normals", normals, MIRRORED, 2)
    np.testing.assert_allclose(flipped[0, 1], [-0.6, 0.0, 0.8])
    assert not np.signbit(flipped[1]).any()
    np.testing.assert_array_equal(crop_of("normals", normals, WHOLE, 2), normals)
    np.testing.assert_array_equal(normals, before)


def test_linear_maps_are_resampled_channel_by_channel():
    ramp = np.linspace(0, 1, 64, dtype=np.float32)
    bands = np.stack([np.tile(ramp, (64, 1)), np.tile(1 - ramp, (64, 1))], axis=-1)
    two = custom(axes="h w c", channels=2)
    cropped = crop_label(two, bands, WHOLE, 16)
    assert cropped.shape == (16, 16, 2)
    assert cropped.dtype == np.float32
    np.testing.assert_allclose(cropped.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(cropped[8, 1:-1, 0], ((np.arange(16) + 0.5) / 16)[1:-1], atol=0.02)
    np.testing.assert_array_equal(crop_label(two, bands, MIRRORED, 16), cropped[:, ::-1])
    first = custom(axes="c h w", channels=2)
    np.testing.assert_array_equal(crop_label(first, np.moveaxis(bands, -1, 0), WHOLE, 16), np.moveaxis(cropped, -1, 0))


def test_linear_integers_are_rounded_within_their_type():
    steps = np.zeros((8, 8), np.uint16)
    steps[:, 4:] = 65535
    cropped = crop_label(custom(dtype="uint16", crop_rule="pixels"), steps, WHOLE, 32)
    assert cropped.dtype == np.uint16
    assert cropped.min() == 0
    assert cropped.max() == 65535
    assert 20_000 < cropped[0, 15] < cropped[0, 16] < 45_000


def test_linear_nulls_spread_to_what_they_reach():
    values = np.ones((8, 8), np.float32)
    values[0, 0] = -1
    cropped = crop_label(custom(null=-1.0), values, WHOLE, 4)
    assert cropped[0, 0] == -1
    assert (cropped[2:, 2:] == 1).all()
    assert set(np.unique(cropped)) == {-1, 1}


def test_arrays_with_other_axes_are_refused():
    with pytest.raises(LabelError, match=r"segmentation.*shape \(2, 2, 3\).*expected axes \['h', 'w'\]"):
        crop_of("segmentation", np.zeros((2, 2, 3), np.uint8), WHOLE, 2)


def box(x0: float, y0: float, x1: float, y1: float, name: str = "cat") -> dict:
    return {"class": name, "score": 0.5, "x0": x0, "y0": y0, "x1": x1, "y1": y1}


def test_boxes_are_clipped_renormalized_and_dropped():
    boxes = [box(0.25, 0.5, 0.75, 1.0, "a"), box(0.0, 0.0, 0.5, 1.0, "left"), box(0.6, 0.1, 0.8, 0.2, "b")]
    before = copy.deepcopy(boxes)
    cropped = crop_of("boxes", boxes, RIGHT_HALF, 224)
    assert [found["class"] for found in cropped] == ["a", "b"]
    assert cropped[0] == box(0.0, 0.5, 0.5, 1.0, "a")
    assert cropped[1] == pytest.approx(box(0.2, 0.1, 0.6, 0.2, "b"))
    mirrored = crop_of("boxes", boxes, replace(RIGHT_HALF, flip=True), 224)
    assert mirrored[0] == box(0.5, 0.5, 1.0, 1.0, "a")
    assert boxes == before
    assert crop_of("boxes", [], WHOLE, 224) == []


FRACTIONS = st.floats(0, 1, width=32)


@given(st.lists(st.tuples(FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS), max_size=5), st.integers(0, 20))
def test_boxes_of_a_crop_lie_in_it(corners, number):
    boxes = [box(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    crop = plan_crop(RULE, "k", number, 640, 480)
    for found in crop_of("boxes", boxes, crop, 224):
        assert 0 <= found["x0"] < found["x1"] <= 1
        assert 0 <= found["y0"] < found["y1"] <= 1


def instance(mask: np.ndarray) -> dict:
    height, width = mask.shape
    return {
        **box(0, 0, 1, 1),
        **mask_box(mask),
        "rle_height": height,
        "rle_width": width,
        "rle_counts": rle_encode(mask),
    }


def test_instances_are_rasterized_again():
    left, both = np.zeros((6, 8), bool), np.zeros((6, 8), bool)
    left[1:3, :3] = True
    both[2:5, 2:6] = True
    instances = [instance(left), instance(both)]
    before = copy.deepcopy(instances)
    cropped = crop_of("instances", instances, RIGHT_HALF, 12)
    assert instances == before
    (found,) = cropped
    expected = np.zeros((12, 12), bool)
    expected[4:10, :6] = True
    np.testing.assert_array_equal(rle_decode(found["rle_counts"], 12, 12), expected)
    assert (found["rle_height"], found["rle_width"]) == (12, 12)
    assert (found["x0"], found["y0"], found["x1"], found["y1"]) == (0, 4 / 12, 0.5, 10 / 12)
    assert found["class"] == "cat"
    (mirrored,) = crop_of("instances", instances, replace(RIGHT_HALF, flip=True), 12)
    np.testing.assert_array_equal(rle_decode(mirrored["rle_counts"], 12, 12), expected[:, ::-1])
    assert mirrored["x0"] == 0.5


def test_run_lengths_are_those_of_coco():
    mask = np.array([[0, 1], [0, 1], [1, 1]], bool)
    assert rle_encode(mask) == [2, 4]
    assert rle_encode(~mask) == [0, 2, 4]
    assert rle_encode(np.zeros((2, 3), bool)) == [6]
    assert rle_encode(np.ones((2, 3), bool)) == [0, 6]


@settings(deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=30)))
def test_run_lengths_round_trip(mask):
    counts = rle_encode(mask)
    assert all(isinstance(count, int) for count in counts)
    assert sum(counts) == mask.size
    np.testing.assert_array_equal(rle_decode(counts, *mask.shape), mask)
    np.testing.assert_array_equal(rle_decode(np.array(counts, np.uint32), *mask.shape), mask)


@pytest.mark.parametrize("counts", [[5], [7], [-1, 7], [[6]]])
def test_run_lengths_that_do_not_fit_are_refused(counts):
    with pytest.raises(LabelError, match=r"expected 2 x 3 = 6"):
        rle_decode(counts, 2, 3)
