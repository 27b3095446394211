"""Measures a photograph and its caption without a model: size, caption length, color statistics."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from labelers.protocol import LabelerSpec
from manifests.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

_SENTENCE_END = re.compile(r"[.!?]+(?:\s+|$)")


class Metadata:
    """Makes modality `metadata`: one record.

    original_width, original_height   px, of the upright photograph
    caption_n_chars                   characters of the caption; its counts are None if the row has no caption
    caption_n_words                   pieces between white space
    caption_n_sentences               pieces between runs of . ! ? that stand before white space or the end
    colorfulness                      Hasler and Suesstrunk, Measuring Colourfulness in Natural Images, 2003, on R, G, B
    brightness, contrast              mean and standard deviation of gray, 0..255 (ITU-R BT.601 luma)
    saturation                        mean S of HSV, 0..255
    entropy                           Shannon entropy of the histogram of gray, bits, 0..8

    Color statistics are of a copy whose longest side is at most `longest` px (means of whole blocks of pixels).
    """

    spec = LabelerSpec(
        name="metadata",
        version=1,
        scope="image",
        inputs=("image", "caption"),
        outputs=("metadata",),
        # They are measured one by one in any case, and of few decoded photographs more stays in the processor's cache.
        batch=2,
        requires=("cv2", "numpy", "PIL"),
    )

    def __init__(
        self, longest: Annotated[int, "longest side, px, of the copy that color statistics are measured on"] = 512
    ) -> None:
        if longest < 1:
            raise ConfigError(f"metadata: longest={longest}; expected a length in pixels of at least 1")
        self.longest = longest

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, list[Any]]:
        from manifests.pixels.crops import reduce_to

        # The decoded image may be smaller than the photograph.
        sizes = batch.get("size") or [(image.shape[1], image.shape[0]) for image in batch["image"]]
        return {
            "metadata": [
                {
                    "original_width": width,
                    "original_height": height,
                    **_caption_counts(caption),
                    **_color_statistics(reduce_to(image, self.longest)),
                }
                for image, caption, (width, height) in zip(batch["image"], batch["caption"], sizes, strict=True)
            ]
        }


def _caption_counts(caption: str | None) -> dict[str, int | None]:
    if caption is None:
        return {"caption_n_chars": None, "caption_n_words": None, "caption_n_sentences": None}
    return {
        "caption_n_chars": len(caption),
        "caption_n_words": len(caption.split()),
        "caption_n_sentences": sum(1 for sentence in _SENTENCE_END.split(caption) if sentence.strip()),
    }


def _color_statistics(image: "np.ndarray") -> dict[str, float]:
    """Returns the statistics of an image, uint8 (h, w, 3)."""
    import cv2
    import numpy as np

    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    brightness, contrast = _mean_and_deviation(gray)
    histogram = cv2.calcHist([gray], [0], None, [256], [0, 256]).ravel().astype(np.float64)
    shares = histogram[histogram > 0] / gray.size
    return {
        "colorfulness": _colorfulness(image),
        "brightness": brightness,
        "contrast": contrast,
        "saturation": cv2.sumElems(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))[1] / gray.size,
        # abs: an image of one gray value has 0 bits, not -0.
        "entropy": abs(float(-(shares * np.log2(shares)).sum())),
    }


def _colorfulness(image: "np.ndarray") -> float:
    """Returns sqrt(std(rg)^2 + std(yb)^2) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2), rg = R - G, yb = (R + G) / 2 - B."""
    import cv2

    red, green, blue = cv2.split(image)
    red_green = cv2.subtract(red, green, dtype=cv2.CV_16S)
    # Twice yb, so that it stays an integer.
    yellow_blue = cv2.addWeighted(red, 1, green, 1, 0, dtype=cv2.CV_16S)
    yellow_blue = cv2.subtract(yellow_blue, cv2.add(blue, blue, dtype=cv2.CV_16S))
    rg_mean, rg_deviation = _mean_and_deviation(red_green)
    yb_mean, yb_deviation = (value / 2 for value in _mean_and_deviation(yellow_blue))
    return math.hypot(rg_deviation, yb_deviation) + 0.3 * math.hypot(rg_mean, yb_mean)


def _mean_and_deviation(values: "np.ndarray") -> tuple[float, float]:
    import cv2

    # The mean is taken from the exact sum: OpenCV's own multiplies by 1 / n, and can come out above the largest value.
    return cv2.sumElems(values)[0] / values.size, float(cv2.meanStdDev(values)[1][0, 0])


LABELER = Metadata
