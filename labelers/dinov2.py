"""Makes DINOv2's features of crops: a map of patch tokens, and the class token (Oquab et al., arXiv 2304.07193)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from labelers import pretrained
from labelers.protocol import LabelerSpec
from manifests.errors import ConfigError
from manifests.modality import MODALITIES


class Dinov2:
    """Makes dense and global features in one pass, by any DINOv2 that transformers loads, with or without registers.

    The side of a crop must be a multiple of the patch (14 px: 224 px give 16 x 16 cells). The modalities are those of
    ViT-B; for another width declare your own, and name them as `outputs` of the spec of a subclass: a name that ends in
    `_global` gets the class token, any other the map.
    """

    spec: ClassVar[LabelerSpec] = LabelerSpec(
        name="dinov2",
        version=1,
        scope="crop",
        outputs=("dinov2", "dinov2_global"),
        batch=64,
        checkpoint="facebook/dinov2-base",
        licence_weights="Apache-2.0",
        requires=pretrained.REQUIRES,
    )

    def __init__(
        self,
        *,
        checkpoint: Annotated[
            str, "weights: a hub id, a folder, or a URI that every node can read"
        ] = "facebook/dinov2-base",
        device: str = "cpu",
    ) -> None:
        self.device = device
        self.model = pretrained.load(checkpoint, "AutoModel", ("dinov2", "dinov2_with_registers"), device)
        self.preprocessing = pretrained.preprocessing(Path(checkpoint))
        self.patch = int(self.model.config.patch_size)
        # The class token, and the registers if the model has any, come before the patches.
        self.before = 1 + int(getattr(self.model.config, "num_register_tokens", 0))
        # Pixels of a call on a CPU, kept: allocating them in each call takes a tenth of a small model's time.
        self.floats: Any = None
        width = int(self.model.config.hidden_size)
        for output in self.spec.outputs or ():
            if output in MODALITIES and MODALITIES[output].channels != width:
                raise ConfigError(
                    f"checkpoint {checkpoint} has features of {width} channels, {output} has "
                    f"{MODALITIES[output].channels}; declare a modality of your own for it, and a subclass that makes it"
                )

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns normalized tokens, float32: maps (B, s / patch, s / patch, C) and class tokens (B, C)."""
        import torch

        with torch.inference_mode():
            pixels = pretrained.to_device(batch["image"], self.device)
            if not pixels.is_cuda and (self.floats is None or self.floats.shape != pixels.shape):
                self.floats = torch.empty(pixels.shape)
            normalized = self.preprocessing.normalize(pixels, None if pixels.is_cuda else self.floats)
            tokens = self.model(pixel_values=normalized).last_hidden_state
            side = pixels.shape[1] // self.patch
            found = {}
            for output in self.spec.outputs or ():
                if output.endswith("_global"):
                    found[output] = pretrained.made(tokens[:, 0])
                else:
                    grid = tokens[:, self.before :].unflatten(1, (side, side))
                    found[output] = pretrained.made(grid)
        return found


LABELER = Dinov2
