import numpy as np
import pytest
import skimage.data

from labelers.segments import Segments
from manifests.errors import ConfigError
from manifests.pixels.crops import mask_box, rle_decode


def label(photo: np.ndarray, **options: float) -> tuple[list[dict], list[dict]]:
    labels = Segments(**options).label({"image": [photo]})
    return labels["instances"][0], labels["boxes"][0]


def mask_of(instance: dict) -> np.ndarray:
    return rle_decode(instance["rle_counts"], instance["rle_height"], instance["rle_width"])


def shapes() -> np.ndarray:
    """A red rectangle and a smaller blue one on white."""
    photo = np.full((100, 200, 3), 255, np.uint8)
    photo[20:60, 40:120] = [200, 0, 0]
    photo[70:90, 150:180] = [0, 0, 200]
    return photo


def test_two_rectangles_on_a_background():
    instances, boxes = label(shapes(), sigma=0.0)
    assert [box["class"] for box in boxes] == ["region", "region"]
    corners = [(box["x0"], box["y0"], box["x1"], box["y1"]) for box in boxes]
    assert corners == [(0.2, 0.2, 0.6, 0.6), (0.75, 0.7, 0.9, 0.9)]
    assert [box["score"] for box in boxes] == pytest.approx([1.0, 1.0])
    mask = mask_of(instances[0])
    assert mask.shape == (100, 200)
    assert mask[20:60, 40:120].all()
    assert mask.sum() == 40 * 80


def test_the_score_is_the_share_of_the_box():
    photo = shapes()
    photo[20:40, 40:80] = 255  # the rectangle loses a quarter
    _, boxes = label(photo, sigma=0.0)
    assert boxes[0]["score"] == pytest.approx(0.75)


def test_small_regions_and_more_than_asked_for_are_left_out():
    assert len(label(shapes(), sigma=0.0, min_area=0.1)[1]) == 1
    assert len(label(shapes(), sigma=0.0, most=1)[1]) == 1


def test_boxes_and_instances_are_the_same_regions():
    photo = skimage.data.coffee()
    instances, boxes = label(photo)
    assert 5 <= len(boxes) == len(instances) <= 32
    areas = []
    taken = np.zeros((149, 224), int)
    for instance, box in zip(instances, boxes, strict=True):
        mask = mask_of(instance)
        assert {name: instance[name] for name in box} == box
        assert mask_box(mask) == {name: box[name] for name in ("x0", "y0", "x1", "y1")}
        assert 0 < box["score"] <= 1
        areas.append(mask.mean())
        taken += mask
    assert areas == sorted(areas, reverse=True)
    assert min(areas) >= 0.0049
    assert taken.max() == 1


def test_a_photograph_of_nothing_has_no_regions():
    assert label(np.full((50, 60, 3), 8, np.uint8)) == ([], [])


@pytest.mark.parametrize("wrong", [{"side": 0}, {"scale": 0}, {"sigma": -1}, {"min_area": 2}, {"most": 0}])
def test_parameters_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected side >= 1"):
        Segments(**wrong)
