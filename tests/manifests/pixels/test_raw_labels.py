import numpy as np
import pytest

from manifests.errors import LabelError
from manifests.modality import Modality, get
from manifests.pixels.raw_labels import fit_array

DEPTH, NORMALS, SEGMENTATION = get("depth"), get("normals"), get("segmentation")


def custom(**facts: object) -> Modality:
    plain: dict = {
        "name": "bands",
        "kind": "image",
        "label_grain": "sample",
        "token_grain": "crop",
        "labeler": "files",
        "tokenizer": "grid",
        "axes": "h w c",
        "dtype": "float32",
        "crop_rule": "nearest",
    }
    return Modality(**{**plain, **facts})


def test_depth_in_millimeters_becomes_meters_and_zero_becomes_null():
    millimeters = np.array([[0, 1500], [65535, 1]], np.uint16)
    depth_m = fit_array(DEPTH, millimeters, scale=0.001, null=0)
    assert depth_m.dtype == np.float32
    np.testing.assert_allclose(depth_m, [[np.nan, 1.5], [65.535, 0.001]], rtol=1e-6)
    np.testing.assert_array_equal(millimeters, [[0, 1500], [65535, 1]])


def test_what_is_not_finite_is_null_where_null_is_nan():
    found = fit_array(DEPTH, np.array([[np.inf, np.nan, 2.0]]))
    np.testing.assert_array_equal(found, np.array([[np.nan, np.nan, 2.0]], np.float32))


def test_scale_comes_before_offset():
    found = fit_array(custom(axes="h w"), np.array([[2]], np.uint8), scale=10, offset=-5)
    assert found.tolist() == [[15.0]]


def test_normals_of_8_bits():
    raw = np.array([[[255, 128, 128], [128, 128, 255], [128, 128, 128], [0, 0, 128]]], np.uint8)
    normals = fit_array(NORMALS, raw)
    assert normals.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), [[1, 1, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(normals[0, 0], [1, 0.004, 0.004], atol=1e-3)
    np.testing.assert_array_equal(normals[0, 2], [0, 0, 0])
    np.testing.assert_allclose(normals[0, 3], [-0.7071, -0.7071, 0.0028], atol=1e-3)


def test_normals_of_16_bits_and_with_another_null():
    raw = np.array([[[65535, 32768, 32768], [32768, 32768, 32768], [0, 0, 0]]], np.uint16)
    np.testing.assert_allclose(fit_array(NORMALS, raw)[0, :2], [[1, 0, 0], [0, 0, 0]], atol=1e-4)
    other = fit_array(NORMALS, raw, null=0)
    np.testing.assert_array_equal(other[0, 2], [0, 0, 0])
    assert np.linalg.norm(other[0, 1]) == pytest.approx(1)


def test_normals_as_floats_are_made_unit_vectors_only_within_their_range():
    found = fit_array(NORMALS, np.array([[[0.0, 0.0, 0.999], [0.0, 0.0, 0.0]]]))
    np.testing.assert_array_equal(found, np.array([[[0, 0, 1], [0, 0, 0]]], np.float32))
    with pytest.raises(LabelError, match=r"numbers from 0.0 to 255.0, expected -1 to 1"):
        fit_array(NORMALS, np.array([[[128.0, 0.0, 255.0]]]))


def test_a_pixel_is_null_where_all_its_channels_are():
    raw = np.array([[[9, 9], [9, 1]]], np.uint8)
    found = fit_array(custom(channels=2, null=-1.0), raw, null=9)
    assert found.tolist() == [[[-1, -1], [9, 1]]]


def test_class_indices_and_their_null():
    found = fit_array(SEGMENTATION, np.array([[3, 1000]], np.uint16), null=1000)
    assert found.dtype == np.uint8
    assert found.tolist() == [[3, 255]]
    with pytest.raises(LabelError, match=r"segmentation: numbers from 3 to 1000, expected 0 to 255"):
        fit_array(SEGMENTATION, np.array([[3, 1000]], np.uint16))


def test_floats_are_rounded_for_integers():
    assert fit_array(SEGMENTATION, np.array([[1.6, 2.4]])).tolist() == [[2, 2]]
    with pytest.raises(LabelError, match="expected 0 to 255"):
        fit_array(SEGMENTATION, np.array([[np.nan, 2.4]]))


def test_a_single_channel_may_stand_or_not():
    assert fit_array(SEGMENTATION, np.zeros((4, 5, 1), np.uint8)).shape == (4, 5)
    assert fit_array(custom(axes="h w c"), np.zeros((4, 5))).shape == (4, 5, 1)
    assert fit_array(custom(axes="c h w"), np.zeros((4, 5))).shape == (1, 4, 5)


def test_other_axes_are_refused():
    with pytest.raises(
        LabelError, match=r"depth: numbers of shape \(4, 5, 3\), expected \(h w\), such as \(224, 224\)"
    ):
        fit_array(DEPTH, np.zeros((4, 5, 3)))


def test_negative_depth_is_refused_with_advice():
    with pytest.raises(LabelError, match=r"numbers from -1.0 to 2.0, expected 0 to inf .*give scale, offset or null"):
        fit_array(DEPTH, np.array([[-1.0, 2.0]]))


def test_vectors_and_booleans():
    vector = custom(kind="vector", axes="c", channels=3, crop_rule="whole")
    assert fit_array(vector, np.array([1, 2, 3])).dtype == np.float32
    assert fit_array(SEGMENTATION, np.array([[True, False]])).tolist() == [[1, 0]]
