"""Finds regions without weights: Felzenszwalb and Huttenlocher's graph-based segmentation, as boxes and masks.

P. Felzenszwalb and D. Huttenlocher, Efficient Graph-Based Image Segmentation, 2004, as scikit-image implements it. The
regions are parts of one color and texture, not objects: useful without a detector, and to try a pipeline.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from labelers.protocol import LabelerSpec
from manifests.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np


class Segments:
    """Makes modalities `boxes` and `instances`: the regions of a photograph, largest first, the same in both.

    The class is "region". The score is the share of its box that a region fills, above 0 and up to 1: how well the box
    describes it, not a confidence. Masks are run lengths at the size that was segmented, boxes are their extents.
    """

    spec = LabelerSpec(
        name="segments",
        version=1,
        scope="image",
        outputs=("instances", "boxes"),
        licence_code="Apache-2.0 AND BSD-3-Clause",
        requires=("cv2", "numpy", "PIL", "skimage"),
    )

    def __init__(
        self,
        side: Annotated[int, "longest side, px, of the copy that is segmented"] = 224,
        scale: Annotated[float, "larger values give larger regions"] = 200.0,
        sigma: Annotated[float, "width, px, of the Gaussian that smooths the copy"] = 0.8,
        min_area: Annotated[float, "smallest region, as a fraction of the photograph"] = 0.005,
        most: Annotated[
            int, "how many regions are kept; one that touches all four sides (the background) never is"
        ] = 32,
    ) -> None:
        if side < 1 or scale <= 0 or sigma < 0 or not 0 <= min_area <= 1 or most < 1:
            raise ConfigError(
                f"segments: side={side}, scale={scale}, sigma={sigma}, min_area={min_area}, most={most}; "
                "expected side >= 1, scale > 0, sigma >= 0, min_area from 0 to 1, most >= 1"
            )
        self.side, self.scale, self.sigma, self.min_area, self.most = side, scale, sigma, min_area, most

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, list[Any]]:
        instances = [self._regions(image) for image in batch["image"]]
        boxes = [[_without_mask(region) for region in regions] for regions in instances]
        return {"instances": instances, "boxes": boxes}

    def _regions(self, image: "np.ndarray") -> list[dict[str, Any]]:
        import numpy as np
        from skimage.segmentation import felzenszwalb

        small = _fit(image, self.side)
        smallest = max(1, round(self.min_area * small.shape[0] * small.shape[1]))
        index = felzenszwalb(small, scale=self.scale, sigma=self.sigma, min_size=smallest)
        areas = np.bincount(index.ravel())
        largest_first = np.argsort(-areas, kind="stable")
        surrounding = set.intersection(*({*side.tolist()} for side in (index[0], index[-1], index[:, 0], index[:, -1])))
        kept = [number for number in largest_first.tolist() if areas[number] >= smallest and number not in surrounding]
        return [_record(index == number) for number in kept[: self.most]]


def _fit(image: "np.ndarray", side: int) -> "np.ndarray":
    """Returns a copy whose longest side is at most `side` px, each pixel the mean of its area; nothing is enlarged."""
    import cv2

    height, width = image.shape[:2]
    if max(height, width) <= side:
        return image
    share = side / max(height, width)
    size = (max(1, round(width * share)), max(1, round(height * share)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _record(mask: "np.ndarray") -> dict[str, Any]:
    """Returns the instance of a mask, bool (h, w)."""
    from manifests.pixels.crops import mask_box, rle_encode

    box = mask_box(mask)
    share = float(mask.mean())
    return {
        "class": "region",
        "score": min(1.0, share / ((box["x1"] - box["x0"]) * (box["y1"] - box["y0"]))),
        **box,
        "rle_height": mask.shape[0],
        "rle_width": mask.shape[1],
        "rle_counts": rle_encode(mask),
    }


def _without_mask(region: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in region.items() if not name.startswith("rle_")}


LABELER = Segments
