"""Takes the photograph itself: the pixels of a crop are its label."""

from collections.abc import Mapping
from typing import Any

from labelers.protocol import LabelerSpec


class Rgb:
    """Makes modality `rgb`: uint8 (s, s, 3), sRGB, as `manifests/pixels/crops.py` cut them."""

    spec = LabelerSpec(name="rgb", version=1, scope="crop", outputs=("rgb",), batch=64, requires=("numpy",))

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, list[Any]]:
        return {"rgb": list(batch["image"])}


LABELER = Rgb
