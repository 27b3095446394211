"""Depth by dense prediction transformers: Depth Anything V2, and DPT (arXiv 2406.09414, 2103.13413)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from labelers import pretrained
from labelers.protocol import LabelerSpec
from manifests.errors import LabelError

if TYPE_CHECKING:
    import numpy as np

# A panorama is squeezed to so many times the model's own size: what it takes grows with the square.
_LONGEST = 3


class Dpt:
    """Depth of whole photographs at their own aspect, of which crops are then cut: larger is farther.

    Of the whole, since a model that is trained at 518 px sees little in a crop of 224, one pass serves all crops, and
    these agree with each other. Metric checkpoints give meters. Relative ones know inverse depth up to scale and shift;
    their label is how far it is below its largest value in the photograph, so 0 is the nearest point. No depth in meters
    follows from it, and tokens, which hold no scale and no shift, lose nothing.
    """

    spec: ClassVar[LabelerSpec] = LabelerSpec(
        name="dpt",
        version=1,
        scope="image",
        outputs=("depth",),
        batch=8,
        checkpoint="depth-anything/Depth-Anything-V2-Small-hf",
        licence_weights="Apache-2.0",
        requires=pretrained.REQUIRES,
    )

    def __init__(self, *, checkpoint: str = "depth-anything/Depth-Anything-V2-Small-hf", device: str = "cpu") -> None:
        import torch

        self.device = device
        self.model = pretrained.load(checkpoint, "AutoModelForDepthEstimation", ("depth_anything", "dpt"), device)
        # A tenth faster on a CPU, for the convolutions of the head.
        self.model.to(memory_format=torch.channels_last)
        self.preprocessing = pretrained.preprocessing(Path(checkpoint))
        self.is_metric = getattr(self.model.config, "depth_estimation_type", "relative") == "metric"

    def label(self, batch: Mapping[str, Any]) -> "Mapping[str, Sequence[np.ndarray]]":
        """Depth maps, float32 (h, w), at the resolution of the model's output."""
        import numpy as np
        import torch

        found: list[Any] = [None] * len(batch["image"])
        with torch.inference_mode():
            inputs = [self._resized(torch.from_numpy(np.ascontiguousarray(photo))) for photo in batch["image"]]
            for places in self._calls(inputs):
                pixels = pretrained.to_device(torch.stack([inputs[place] for place in places]), self.device)
                outputs = self.model(pixel_values=self.preprocessing.normalize(pixels)).predicted_depth.float()
                depth = outputs if self.is_metric else outputs.amax(dim=(1, 2), keepdim=True) - outputs
                for place, array in zip(places, depth.cpu().numpy(), strict=True):
                    found[place] = _finite(array)
        return {"depth": found}

    def _calls(self, inputs: Sequence[Any]) -> list[list[int]]:
        """Which photographs go through the model together: on a GPU those of one shape, else each by itself.

        On a CPU a row's bits must not depend on how many others have its shape, and nothing is gained.
        """
        if not self.device.startswith("cuda"):
            return [[place] for place in range(len(inputs))]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for place, pixels in enumerate(inputs):
            shapes.setdefault(tuple(pixels.shape), []).append(place)
        return list(shapes.values())

    def _resized(self, photo: Any) -> Any:
        """A photograph, uint8 (h, w, 3), at the model's size, uint8 (h, w, 3)."""
        from torch.nn.functional import interpolate

        height, width = photo.shape[:2]
        size = input_size(height, width, self.preprocessing)
        pixels = photo.permute(2, 0, 1)[None]
        return (
            interpolate(pixels, size=size, mode=self.preprocessing.resample, antialias=True)[0]
            .permute(1, 2, 0)
            .contiguous()
        )


def _finite(depth: "np.ndarray") -> "np.ndarray":
    import numpy as np

    # NaN would mean a pixel without depth, and pass as a label.
    if not np.isfinite(depth).all():
        raise LabelError("depth: the model gave NaN or infinity")
    return depth


def input_size(height: int, width: int, wanted: pretrained.Preprocessing) -> tuple[int, int]:
    """The height and width, px, at which a photograph goes into the model: whole multiples of what the model needs.

    Where the aspect is kept, both sides are scaled alike: by that of the two scales that changes the photograph less.
    """
    target = wanted.size or (518, 518)
    scales = (target[0] / height, target[1] / width)
    if wanted.keeps_aspect:
        nearest = min(scales, key=lambda scale: abs(1 - scale))
        scales = (nearest, nearest)
    multiple = max(wanted.multiple, 1)

    def side(length: int, scale: float, whole: int) -> int:
        most = max(multiple, _LONGEST * whole // multiple * multiple)
        return min(most, max(multiple, round(length * scale / multiple) * multiple))

    return side(height, scales[0], target[0]), side(width, scales[1], target[1])


LABELER = Dpt
