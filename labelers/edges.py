"""Finds Canny edges.

J. Canny, A Computational Approach to Edge Detection, 1986, as OpenCV implements it (3 x 3 Sobel, L1 gradient). Other
libraries scale the thresholds differently and agree only in part, so this implementation defines the label.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from labelers.protocol import LabelerSpec
from manifests.errors import ConfigError


class Edges:
    """Makes modality `edges`: uint8 (s, s), 255 on an edge of the crop's gray values, else 0.

    Pixels whose gradient is over `high` are edges, and so are pixels over `low` that are connected to them.
    """

    spec = LabelerSpec(name="edges", version=1, scope="crop", outputs=("edges",), batch=64, requires=("cv2", "numpy"))

    def __init__(
        self,
        low: Annotated[int, "gradient over which a pixel beside an edge is one too, 0 to `high`"] = 100,
        high: Annotated[int, "gradient over which a pixel is an edge"] = 200,
    ) -> None:
        if not 0 <= low <= high:
            raise ConfigError(f"edges: thresholds low={low}, high={high}; expected 0 <= low <= high")
        self.low, self.high = low, high

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, list[Any]]:
        import cv2

        grays = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in batch["image"])
        return {"edges": [cv2.Canny(gray, self.low, self.high) for gray in grays]}


LABELER = Edges
