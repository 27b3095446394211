"""Makes checkpoints of true architectures with random weights, saved as the library saves the published ones.

For tests and benchmarks on machines without weights:

    python -m benchmarks.engine.weights dinov2|dinov2-tiny|depth-tiny FOLDER
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from labelers.dinov2 import Dinov2
from labelers.protocol import LabelerSpec
from manifests.modality import MODALITIES

_NORMALIZE = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


_LABELER = f"{__name__}:TinyDinov2"

# The features of `dinov2_tiny`: maps of 8 x 8 cells and class tokens, of 192 channels.
TINY_MAP = replace(
    MODALITIES["dinov2"], name="tiny_map", labeler=_LABELER, channels=192, stride=28, tokens=64, unit="features"
)
TINY_GLOBAL = replace(MODALITIES["dinov2_global"], name="tiny_global", labeler=_LABELER, channels=192, unit="features")


class TinyDinov2(Dinov2):
    """Makes the labels of `dinov2`, for modalities of another width than ViT-B's: more than 200 images/s on one core."""

    spec: ClassVar[LabelerSpec] = replace(Dinov2.spec, name=_LABELER, outputs=("tiny_map", "tiny_global"))


def dinov2(folder: Path, *, registers: int = 0, seed: int = 0, **config: Any) -> Path:
    """Saves a DINOv2: ViT-B/14 (86 million parameters), unless `config`, of transformers' Dinov2Config, says otherwise."""
    import torch
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = {"image_size": 518, "patch_size": 14, **config}
    torch.manual_seed(seed)
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **config))
    else:
        model = Dinov2Model(Dinov2Config(**config))
    model.save_pretrained(folder)
    crop = {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**_NORMALIZE, **crop, "resample": 3}))
    return folder


def dinov2_tiny(folder: Path, *, seed: int = 0) -> Path:
    """Saves six layers of ViT-Ti's width (3.2 million parameters) on patches of 28 px, for `TinyDinov2`."""
    tiny = {"image_size": 224, "patch_size": 28, "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3}
    return dinov2(folder, seed=seed, **tiny)


def depth_tiny(folder: Path, *, metric: bool = False, side: int = 112, seed: int = 0) -> Path:
    """Saves a Depth Anything V2 whose backbone has four layers of 32 channels, for photographs at `side` px."""
    import torch
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    torch.manual_seed(seed)
    facts: dict[str, Any] = {"image_size": side, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 4}
    facts |= {"num_attention_heads": 2, "mlp_ratio": 2, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    backbone = Dinov2Config(**facts, apply_layernorm=True)
    model = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 16, 16, 16],
            fusion_hidden_size=16,
            head_hidden_size=8,
            depth_estimation_type="metric" if metric else "relative",
            max_depth=20 if metric else 1,
        )
    )
    for name, weight in model.named_parameters():
        # The library starts these so small that depths would all be 0.
        if weight.ndim > 1 and not name.startswith("backbone"):
            torch.nn.init.normal_(weight, std=(2 / weight[0].numel()) ** 0.5)
    model.save_pretrained(folder)
    facts = {"size": {"height": side, "width": side}, "keep_aspect_ratio": True, "ensure_multiple_of": 14}
    (folder / "preprocessor_config.json").write_text(json.dumps({**_NORMALIZE, **facts, "resample": 3}))
    return folder


if __name__ == "__main__":
    made = {"dinov2": dinov2, "dinov2-tiny": dinov2_tiny, "depth-tiny": depth_tiny}[sys.argv[1]](Path(sys.argv[2]))
    print(made)
