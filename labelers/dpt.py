"""Estimates depth by dense prediction transformers: Depth Anything V2 and DPT (arXiv 2406.09414, 2103.13413)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from labelers import pretrained
from labelers.protocol import LabelerSpec
from manifests.errors import LabelError

if TYPE_CHECKING:
    import numpy as np

# The longest side of the model's input, in multiples of its own size: attention over a panorama grows with the square.
_LONGEST = 3


class Dpt:
    """Makes depth of whole photographs at their own aspect; crops are cut from it afterwards. Larger is farther.

    The model sees the whole photograph because it was trained at 518 px and sees little in a crop of 224. One pass also
    serves all crops, and these agree with each other. Metric checkpoints give meters. Relative ones predict inverse
    depth up to scale and shift: the label is the largest value in the photograph minus the value of the pixel, so 0 is
    the nearest point. It cannot be converted to meters; tokens, which hold neither scale nor shift, lose nothing.
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

    def __init__(
        self,
        *,
        checkpoint: Annotated[
            str, "weights: a hub id, a folder, or a URI that every node can read"
        ] = "depth-anything/Depth-Anything-V2-Small-hf",
        device: str = "cpu",
    ) -> None:
        import torch

        self.device = device
        self.model = pretrained.load(checkpoint, "AutoModelForDepthEstimation", ("depth_anything", "dpt"), device)
        # The convolutions of the head make it a tenth faster on a CPU.
        self.model.to(memory_format=torch.channels_last)
        self.preprocessing = pretrained.preprocessing(Path(checkpoint))
        self.is_metric = getattr(self.model.config, "depth_estimation_type", "relative") == "metric"

    def label(self, batch: Mapping[str, Any]) -> "Mapping[str, Sequence[np.ndarray]]":
        """Returns depth maps, float32 (h, w), at the resolution of the model's output."""
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
        """Returns the photographs of each call of the model: on a GPU those of one shape together, else one a call.

        On a CPU nothing is gained by batching, and the bits of a row must not depend on how many others have its shape.
        """
        if not self.device.startswith("cuda"):
            return [[place] for place in range(len(inputs))]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for place, pixels in enumerate(inputs):
            shapes.setdefault(tuple(pixels.shape), []).append(place)
        return list(shapes.values())

    def _resized(self, photo: Any) -> Any:
        """Resizes a photograph, uint8 (h, w, 3), to the model's size, uint8 (h, w, 3)."""
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

    # NaN is the null marker of depth, so a failure of the model would pass as pixels without depth.
    if not np.isfinite(depth).all():
        raise LabelError("depth: the model gave NaN or infinity")
    return depth


def input_size(height: int, width: int, wanted: pretrained.Preprocessing) -> tuple[int, int]:
    """Returns the height and width, px, at which the model sees a photograph: multiples of what the model needs.

    If the aspect is kept, both sides are scaled by the one of their two scales that changes the photograph less.
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
