"""Scores the demo's model on scenes it never saw: colors of captions, depth, boxes. Pure functions of labels."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

# Found in 94 of 94 renderings that a caption names the color of, and in none of 266 that it does not.
_HUE_WITHIN_DEG = 11.0
_LEAST_SATURATION = 0.5
_LEAST_VALUE = 0.2
_LEAST_SHARE = 0.005


def colors_in(picture: np.ndarray, colors: Mapping[str, tuple[int, int, int]]) -> set[str]:
    """Returns the named colors that at least 0.5 % of a picture (h, w, 3) uint8 sRGB has; grays are left out of `colors`.

    A pixel has a color if its hue is within 11 degrees of it and it is neither pale nor dark: shading changes the
    value of a solid and not its hue.
    """
    hue, saturation, value = np.moveaxis(cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2HSV), -1, 0)
    vivid = (saturation > _LEAST_SATURATION) & (value > _LEAST_VALUE)
    found = set()
    for name, color in colors.items():
        wanted = 360 * colorsys.rgb_to_hsv(*(channel / 255 for channel in color))[0]
        apart = np.abs((hue - wanted + 180) % 360 - 180)
        if (vivid & (apart < _HUE_WITHIN_DEG)).mean() >= _LEAST_SHARE:
            found.add(name)
    return found


def chromatic(colors: Mapping[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
    """Returns the colors that have a hue."""
    return {name: color for name, color in colors.items() if max(color) - min(color) > 40}


def color_recall(
    pictures: Sequence[np.ndarray], captions: Sequence[str], colors: Mapping[str, tuple[int, int, int]]
) -> tuple[int, int]:
    """Returns how many of the colors that captions name are in their pictures, and how many are named."""
    hits = named = 0
    for picture, caption in zip(pictures, captions, strict=True):
        words = set(caption.split()) & set(colors)
        hits += len(words & colors_in(picture, colors))
        named += len(words)
    return hits, named


def depth_error(found: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> float:
    """Returns the mean absolute difference of standardized depths (h, w), in standard deviations of the picture's own depth."""
    return float(np.mean([np.abs(a - b).mean() for a, b in zip(found, true, strict=True)]))


def overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Returns intersection over union of two boxes with corners x0 y0 x1 y1."""
    width = min(one["x1"], other["x1"]) - max(one["x0"], other["x0"])
    height = min(one["y1"], other["y1"]) - max(one["y0"], other["y0"])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((box["x1"] - box["x0"]) * (box["y1"] - box["y0"]) for box in (one, other))
    return shared / max(areas - shared, 1e-12)


def box_f1(
    found: Sequence[Sequence[Mapping[str, Any]]],
    true: Sequence[Sequence[Mapping[str, Any]]],
    *,
    least_overlap: float = 0.5,
    classes: bool = True,
) -> float:
    """Returns F1 over all pictures: a found box is right if a true one of its class, not taken yet, overlaps it enough."""
    right = total = 0
    for some, all_true in zip(found, true, strict=True):
        total += len(some) + len(all_true)
        left = list(all_true)
        for box in some:
            fitting = [one for one in left if not classes or one["class"] == box["class"]]
            best = max(fitting, key=lambda one: overlap(one, box), default=None)
            if best is not None and overlap(best, box) >= least_overlap:
                left.remove(best)
                right += 1
    return 2 * right / max(total, 1)
