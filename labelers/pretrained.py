"""Loads checkpoints of the transformers library and their preprocessing, and copies pixels to a device."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import ConfigError

REQUIRES = ("numpy", "safetensors", "torch", "transformers")

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Holds what a model expects of its pixels: the facts of its preprocessor_config.json, or defaults.

    `mean` and `std` are of sRGB values from 0 to 1; `size` is height and width in px (None if the file names none);
    `multiple` is what both sides must be multiples of; `resample` is a mode of torch's interpolation.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    keeps_aspect: bool
    multiple: int
    resample: str

    def normalize(self, pixels: Any, out: Any = None) -> Any:
        """Returns a uint8 tensor (B, h, w, 3) as the float32 (B, 3, h, w) that the model takes, channels last in memory.

        Writes into `out`, float32 (B, h, w, 3), if it is given.
        """
        import torch

        # Mean and deviation are repeated to a whole row of pixels: arithmetic that broadcasts along an axis of three
        # channels takes several times as long.
        mean, std = (
            torch.tensor(values, device=pixels.device).mul(255).repeat(pixels.shape[2])
            for values in (self.mean, self.std)
        )
        floats = pixels.to(torch.float32) if out is None else out.copy_(pixels)
        floats.view(*pixels.shape[:2], -1).sub_(mean).div_(std)
        return floats.permute(0, 3, 1, 2)


def preprocessing(folder: Path) -> Preprocessing:
    """Reads the preprocessing of a checkpoint; mean and deviation are ImageNet's if its folder does not name them."""
    path = folder / "preprocessor_config.json"
    try:
        facts = json.loads(path.read_text()) if path.is_file() else {}
        size = facts.get("size") or {}
        return Preprocessing(
            mean=tuple(facts.get("image_mean") or _IMAGENET_MEAN),
            std=tuple(facts.get("image_std") or _IMAGENET_STD),
            size=(int(size["height"]), int(size["width"])) if "height" in size else None,
            keeps_aspect=bool(facts.get("keep_aspect_ratio", False)),
            multiple=int(facts.get("ensure_multiple_of") or 1),
            # Pillow's numbers for its filters.
            resample="bilinear" if facts.get("resample") == 2 else "bicubic",
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no preprocessor's configuration: {error}") from error


def load(checkpoint: str, auto_class: str, families: tuple[str, ...], device: str) -> Any:
    """Loads the model in a checkpoint's folder, in float32 on a device, for inference only.

    `auto_class` is a class of transformers, `families` are the model types that the folder may hold. Pickles are read as
    tensors only, and code of a checkpoint is never run. Raises ConfigError if the folder holds no such model, or if
    weights are missing, ImportError if the package is not whole.
    """
    import torch
    import transformers

    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"checkpoint {checkpoint}: expected a local folder with config.json and model.safetensors")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in families:
        raise ConfigError(f"{folder / 'config.json'}: the model is of type {kind!r}; expected {' or '.join(families)}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        known = getattr(transformers, auto_class)
    except (AttributeError, RuntimeError) as error:
        raise ImportError(
            f"transformers {transformers.__version__} does not give {auto_class} ({error}); install the extra modmill[label]"
        ) from error
    try:
        model, found = known.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, weights_only=True, dtype=torch.float32
        )
    except ImportError:  # A package is missing or not whole: no fault of the checkpoint.
        raise
    except Exception as error:
        raise ConfigError(f"checkpoint {checkpoint} cannot be loaded: {type(error).__name__}: {error}") from error
    # transformers fills missing weights with random ones: the labels would be noise.
    if missing := sorted([*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]):
        raise ConfigError(
            f"checkpoint {checkpoint} is missing {len(missing)} of the model's tensors, such as {missing[0]}; its download "
            "is incomplete, or it belongs to another model"
        )
    return model.to(device).eval().requires_grad_(False)


def to_device(array: Any, device: str) -> Any:
    """Copies a NumPy array or a tensor to a device; to a GPU through pinned memory, without waiting for the copy."""
    import torch

    # A tensor made from a NumPy array shares its memory.
    tensor = torch.as_tensor(array)
    if device.startswith("cuda") and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def made(tensor: Any) -> Any:
    """Returns labels as the engine takes them, float32: on a GPU a tensor, else a NumPy array that shares its memory."""
    tensor = tensor.float().contiguous()
    return tensor if tensor.is_cuda else tensor.numpy()
