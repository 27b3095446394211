"""Figures of tokenizers, against values worked out by hand."""

import numpy as np
import pytest

from manifests.modality import MODALITIES
from tokenize_jobs.grids.coding import Coding, coding_of
from tokenize_jobs.reconstruction import codebook_figures, edge_f1, figures_of, flat


def coding(name: str, classes: int = 0) -> Coding:
    facts = coding_of(MODALITIES[name])
    return Coding(**{**vars(facts), "classes": classes})


def test_psnr_of_a_known_error() -> None:
    labels = np.full((2, 4, 4, 3), 100, dtype=np.uint8)
    decoded = labels.copy()
    decoded[0] += 51
    # An error of a fifth of the range is 20 log10 5 = 13.98 dB; a perfect row counts 100.
    figures = figures_of(coding("rgb"), [(labels, decoded)])
    assert figures == {"psnr_db": pytest.approx((13.979 + 100) / 2, abs=1e-3)}


def test_angles_of_valid_pixels_only() -> None:
    labels = np.zeros((1, 1, 3, 3), dtype=np.float32)
    labels[0, 0, :2] = (0, 0, -1)
    decoded = np.zeros_like(labels)
    decoded[0, 0, 0], decoded[0, 0, 1], decoded[0, 0, 2] = (0, 0, -1), (0, -1, 0), (1, 0, 0)
    assert figures_of(coding("normals"), [(labels, decoded)]) == {"angle_deg": pytest.approx(45)}


def test_depth_is_compared_in_standardized_form() -> None:
    code = coding("depth")
    labels = np.random.default_rng(0).uniform(1, 9, size=(2, 8, 8)).astype(np.float32)
    labels[1] = np.nan
    decoded = code.prepare(labels, code.scaling(labels))[0][..., 0] + 0.25
    # The row without any depth counts for nothing.
    assert figures_of(code, [(labels, decoded)]) == {"abs_error_std": pytest.approx(0.25, abs=1e-5)}


def test_class_figures_are_of_all_rows_together() -> None:
    labels = np.array([[[0, 0, 1, 255]], [[1, 1, 1, 1]]], dtype=np.uint8)
    decoded = np.array([[[0, 1, 1, 0]], [[1, 1, 1, 1]]], dtype=np.uint8)
    # Class 0: 1 of 2; class 1: 5 of 6; class 2 does not occur.
    figures = figures_of(coding("segmentation", classes=3), [(labels[:1], decoded[:1]), (labels[1:], decoded[1:])])
    assert figures == {"pixel_accuracy": pytest.approx(6 / 7), "miou": pytest.approx((1 / 2 + 5 / 6) / 2)}


def test_lines_within_two_pixels_are_found() -> None:
    label = np.zeros((20, 20), dtype=bool)
    label[10] = True
    assert edge_f1(label, np.roll(label, 2, axis=0)) == 1.0
    assert edge_f1(label, np.roll(label, 3, axis=0)) == 0.0
    half = label & (np.arange(20) < 10)
    # All that is drawn is right; 12 of 20 pixels are within reach of it.
    assert edge_f1(label, half) == pytest.approx(2 * 0.6 / 1.6)
    assert edge_f1(np.zeros_like(label), np.zeros_like(label)) == 1.0


def test_line_drawings_have_an_f1_and_gray_pictures_have_none() -> None:
    lines = np.zeros((1, 16, 16), dtype=np.uint8)
    lines[0, 4] = 255
    assert figures_of(coding("edges"), [(lines, lines)])["edge_f1"] == 1.0
    assert "edge_f1" not in figures_of(coding("edges"), [(lines // 2, lines)])


def test_flat_pictures_are_the_mean_or_the_commonest_class() -> None:
    rgb = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    rgb[0, 0] = 200
    assert (flat(coding("rgb"), rgb) == 100).all()
    classes = np.array([[[2, 2, 1, 255, 255, 255]]], dtype=np.uint8)
    assert (flat(coding("segmentation", classes=3), classes) == 2).all()


def test_codebook_figures() -> None:
    assert codebook_figures(np.array([5, 5, 0, 0])) == {
        "codebook_use": 0.5,
        "entropy_bits": pytest.approx(1.0),
        "perplexity": pytest.approx(2.0),
    }
