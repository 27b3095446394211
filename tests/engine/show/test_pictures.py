"""Labels as pictures."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.show import pictures
from manifests.modality import get
from manifests.pixels.crops import mask_box, rle_encode


def test_pixels_are_shown_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    assert np.array_equal(pictures.picture(get("rgb"), pixels), pixels)
    assert np.array_equal(pictures.picture(get("edges"), pixels[..., 0])[..., 2], pixels[..., 0])


@given(st.floats(0.1, 50), st.floats(-20, 20))
def test_the_scale_of_depth_does_not_show(factor: float, shift: float):
    """Tokens hold depth times a factor plus a shift: label and decoded label must look the same."""
    depth = np.linspace(1, 9, 64).reshape(8, 8)
    one = pictures.picture(get("depth"), depth.astype(np.float32))
    other = pictures.picture(get("depth"), (factor * depth + shift).astype(np.float32))
    assert np.abs(one.astype(int) - other).max() <= 6


def test_depth_without_a_value_stands_out_and_has_no_part_in_the_scale():
    label = np.tile(np.linspace(1, 2, 8, dtype=np.float32), (8, 1))
    label[0] = np.nan
    decoded = label - 1.5
    decoded[0] = 99.0
    one, other = (pictures.picture(get("depth"), shown, label) for shown in (label, decoded))
    assert len(np.unique(one[0], axis=0)) == 1
    assert not (one[0, 0] == one[1:].reshape(-1, 3)).all(axis=1).any()
    assert np.abs(one[1:].astype(int) - other[1:]).max() <= 2


def test_a_map_without_any_value_is_shown():
    nothing = np.full((4, 4), np.nan, np.float32)
    assert len(np.unique(pictures.picture(get("depth"), nothing).reshape(-1, 3), axis=0)) == 1


def test_normals_that_face_the_camera_are_blue():
    facing = np.zeros((2, 2, 3), np.float32)
    facing[..., 2] = -1
    assert pictures.picture(get("normals"), facing)[0, 0].tolist() == [128, 128, 255]


def test_classes_have_fixed_colors_and_none_has_another():
    classes = np.array([[0, 1, 2], [3, 4, 255]], np.uint8)
    colors = pictures.picture(get("segmentation"), classes)
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) == 6
    assert np.array_equal(colors[0, 2], pictures.CATEGORIES[2])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_bands_is_shown(channels: int):
    bands = np.random.default_rng(1).normal(size=(6, 7, channels)).astype(np.float32)
    shown = pictures.picture(None, bands)
    assert shown.shape == (6, 7, 3)
    assert shown.dtype == np.uint8
    assert shown.max() > 200


def test_an_array_that_is_no_picture_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        pictures.picture(None, np.zeros(3))


def test_boxes_are_drawn_where_they_are():
    base = pictures.blank(100)
    box = {"class": "cube", "x0": 0.2, "y0": 0.4, "x1": 0.6, "y1": 0.8}
    drawn = pictures.with_boxes(base, [box])
    rows, columns = np.nonzero((drawn != base).any(axis=2))
    assert (columns.min(), columns.max(), rows.max()) == (20, 59, 79)
    assert np.array_equal(drawn[50:70, 30:50], base[50:70, 30:50])
    assert np.array_equal(base, pictures.blank(100))


def test_masks_and_boxes_of_one_thing_have_one_color():
    mask = np.zeros((50, 50), bool)
    mask[10:30, 5:25] = True
    thing = {"class": "a", **mask_box(mask), "rle_height": 50, "rle_width": 50, "rle_counts": rle_encode(mask)}
    shown = pictures.with_masks(pictures.blank(100), [thing]).astype(int)
    inside, outside = shown[40, 30], shown[90, 90]
    assert len(set(outside)) == 1
    assert np.argmax(inside) == np.argmax(pictures.color_of(0))
    assert len(set(inside)) > 1


def test_swatches_are_as_wide_as_their_share():
    colors = [{"r": 255, "g": 0, "b": 0, "share": 0.75}, {"r": 0, "g": 0, "b": 255, "share": 0.25}]
    shown = pictures.swatches(colors, side=100)
    assert (shown[0, :, 0] == 255).sum() == 75
    unknown = pictures.swatches([{**color, "share": None} for color in colors], side=100)
    assert (unknown[0, :, 0] == 255).sum() == 50


def test_the_sheet_has_a_place_for_every_cell():
    row = pictures.SheetRow(
        title="a" * 900,
        note="held out",
        labels={"rgb": pictures.blank(), "caption": "word " * 200},
        decoded={"rgb": pictures.blank()},
    )
    sheet = pictures.sheet([row, row], ["rgb", "caption"])
    one = pictures.sheet([row], ["rgb", "caption"])
    assert sheet.width == one.width > 2 * pictures.TILE
    assert sheet.height > one.height + 2 * pictures.TILE
    no_tokens = pictures.sheet([replace(row, decoded={"rgb": None})], ["rgb", "caption"])
    assert no_tokens.height < one.height - pictures.TILE
