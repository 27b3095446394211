"""The demo's scores: exact answers on pictures and boxes made by hand, and on renderings."""

import numpy as np
import pytest

from benchmarks import scenes
from examples.demo import scores

COLORS = {"red": (215, 32, 36), "blue": (28, 74, 214), "white": (236, 236, 233)}


def test_colors_are_found_in_light_and_shade_and_not_where_they_are_not() -> None:
    picture = np.full((40, 40, 3), 128, np.uint8)
    colors = scores.chromatic(COLORS)
    assert set(colors) == {"red", "blue"}
    assert scores.colors_in(picture, colors) == set()
    picture[:10, :10] = COLORS["red"]
    assert scores.colors_in(picture, colors) == {"red"}
    picture[:10, :10] = (100, 15, 17)
    assert scores.colors_in(picture, colors) == {"red"}
    picture[:10, :10] = 128
    picture[0, :4] = COLORS["blue"]
    assert scores.colors_in(picture, colors) == set()


def test_every_color_that_a_caption_names_is_in_its_rendering_and_no_other() -> None:
    colors = scores.chromatic(scenes.COLORS)
    rendered = [scenes.render(index, seed=5) for index in range(12)]
    pictures, captions = [scene.rgb for scene in rendered], [scene.caption for scene in rendered]
    hits, named = scores.color_recall(pictures, captions, colors)
    assert hits == named > 8
    for picture, caption in zip(pictures, captions, strict=True):
        assert scores.colors_in(picture, colors) <= set(caption.split())


def test_depth_error_is_in_deviations() -> None:
    flat = np.zeros((4, 4), np.float32)
    assert scores.depth_error([flat, flat], [flat, flat + 1]) == 0.5


def box(name: str, x0: float, y0: float, x1: float, y1: float) -> dict:
    return {"class": name, "x0": x0, "y0": y0, "x1": x1, "y1": y1}


def test_overlaps_are_intersections_over_unions() -> None:
    assert scores.overlap(box("a", 0, 0, 1, 1), box("a", 0, 0, 1, 1)) == 1
    assert scores.overlap(box("a", 0, 0, 1, 1), box("a", 0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert scores.overlap(box("a", 0, 0, 1, 1), box("a", 2, 2, 3, 3)) == 0


def test_a_box_is_right_once_and_only_with_its_class() -> None:
    true = [[box("cube", 0, 0, 1, 1), box("cone", 2, 0, 3, 1)]]
    assert scores.box_f1(true, true) == 1
    assert scores.box_f1([[]], true) == 0
    assert scores.box_f1([[box("cube", 0, 0, 1, 1)] * 2], true) == pytest.approx(2 / 4)
    assert scores.box_f1([[box("cone", 0, 0, 1, 1)]], true) == 0
    assert scores.box_f1([[box("cone", 0, 0, 1, 1)]], true, classes=False) == pytest.approx(2 / 3)
