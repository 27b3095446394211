import numpy as np
import pytest
import skimage.data

from labelers.metadata import Metadata
from manifests.errors import ConfigError


def label(photo: np.ndarray, caption: str | None = None, **options: int) -> dict:
    (record,) = Metadata(**options).label({"image": [photo], "caption": [caption]})["metadata"]
    return record


def test_one_color_has_brightness_and_nothing_else():
    record = label(np.full((20, 30, 3), 77, np.uint8))
    assert (record["original_width"], record["original_height"]) == (30, 20)
    assert record["brightness"] == 77
    assert [record[name] for name in ("colorfulness", "contrast", "saturation", "entropy")] == [0, 0, 0, 0]


def test_black_and_white_halves():
    photo = np.zeros((20, 30, 3), np.uint8)
    photo[:10] = 255
    record = label(photo)
    assert (record["brightness"], record["contrast"], record["entropy"]) == (127.5, 127.5, 1.0)
    assert record["colorfulness"] == record["saturation"] == 0


def test_red_and_blue_halves():
    photo = np.zeros((20, 30, 3), np.uint8)
    photo[:10, :, 0] = 255
    photo[10:, :, 2] = 255
    record = label(photo)
    assert record["saturation"] == 255
    # rg is 255 and 0, yb 127.5 and -255: deviations 127.5 and 191.25, means 127.5 and -63.75.
    expected = np.hypot(127.5, 191.25) + 0.3 * np.hypot(127.5, 63.75)
    assert record["colorfulness"] == pytest.approx(expected)
    # BT.601 luma of red is 76, of blue 29.
    assert record["brightness"] == 52.5


def test_known_values_on_a_photograph():
    record = label(skimage.data.astronaut())
    assert record["colorfulness"] == pytest.approx(72.6, abs=0.05)
    assert record["brightness"] == pytest.approx(115.4, abs=0.05)
    assert record["contrast"] == pytest.approx(75.1, abs=0.05)
    assert record["saturation"] == pytest.approx(90.9, abs=0.05)
    assert record["entropy"] == pytest.approx(7.45, abs=0.005)


def test_statistics_of_a_reduced_copy_are_near():
    photo = skimage.data.rocket()
    whole, reduced = label(photo, longest=10_000), label(photo)
    assert (reduced["original_width"], reduced["original_height"]) == (640, 427)
    assert whole != reduced
    for name in ("colorfulness", "brightness", "contrast", "saturation", "entropy"):
        assert reduced[name] == pytest.approx(whole[name], rel=0.05)


@pytest.mark.parametrize(
    ("caption", "counts"),
    [
        (None, (None, None, None)),
        ("", (0, 0, 0)),
        ("a cat", (5, 2, 1)),
        ("A cat. It sleeps!", (17, 4, 2)),
        ("Version 2.5 is out... Really?! Yes", (34, 6, 3)),
        ("...", (3, 1, 0)),
        ("喵 😺", (3, 2, 1)),
    ],
)
def test_caption_counts(caption, counts):
    record = label(np.zeros((2, 2, 3), np.uint8), caption)
    assert tuple(record[f"caption_n_{what}"] for what in ("chars", "words", "sentences")) == counts


def test_a_length_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="longest=0"):
        Metadata(longest=0)
