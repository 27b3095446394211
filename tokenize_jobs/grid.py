"""The tokenizer of image-like modalities: a VQ-VAE whose tokens are the cells of a grid, row by row.

How labels become what the network sees is a `Coding`, chosen from the facts of the modality alone and kept in
config.json, so that a fitted tokenizer needs no table. A modality of your own (any number of bands, integer or float)
needs no code here. `train/fit_tokenizer.py` makes the folder that `load` reads.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor

from manifests import modality as modalities
from manifests.errors import ConfigError, TokenizeError
from manifests.modality import Modality
from manifests.recipe import canonical_json
from tokenize_jobs.networks import GridNetwork, empty
from tokenize_jobs.protocol import TokenizerSpec

FAMILY = "grid"
VERSION = 1

Rule = Literal["range", "standardize", "direction", "classes"]

# Rows a pass over many labels holds in memory at a time.
_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How a label array becomes the input of the network, and its output a label again.

    rule          `range`: low..high to -1..1, clipped (pixels, edges, bands of a known range)
                  `standardize`: each crop and channel less its trimmed mean, by its trimmed deviation (depth); decoded
                  labels stay standardized, since tokens hold no scale
                  `direction`: unit vectors as they are; decoded ones have length 1, or are zero where nothing is
                  `classes`: class indices, embedded; decoded to the likeliest class
    dtype         of the label
    channels      of the label; 1 where it has no channel axis
    channel_axis  whether it has one
    low, high     the range, for `range`
    null          the marker of a pixel without a value, if finite; a pixel with NaN or infinity in it is always null. A
                  null pixel becomes 0 after scaling; for `classes` it has an index of its own
    mirror_x      whether channel 0 changes sign when the picture is mirrored
    classes       how many classes are known, for `classes`; a class from there on is encoded as null
    """

    rule: Rule
    dtype: str
    channels: int
    channel_axis: bool
    low: float = 0.0
    high: float = 0.0
    null: float | None = None
    mirror_x: bool = False
    classes: int = 0

    def valid(self, labels: np.ndarray) -> Bool[np.ndarray, "B H W"]:
        """Which pixels have a value."""
        pixels = self._with_channels(labels)
        # Channel by channel: numpy is slow at reducing an axis of three.
        channels = [pixels[..., channel] for channel in range(self.channels)]
        valid = np.ones(pixels.shape[:3], dtype=bool)
        if np.issubdtype(pixels.dtype, np.floating):
            for values in channels:
                valid &= np.isfinite(values)
        if self.null is not None:
            valid &= np.logical_or.reduce([values != self.null for values in channels])
        if self.rule == "classes":
            valid &= channels[0] < self.classes
        return valid

    def scaling(self, labels: np.ndarray) -> Float[np.ndarray, "B 2 C"]:
        """Shift and divisor of each row, float32; a window of a row is prepared with those of the whole row."""
        rows = np.zeros((len(labels), 2, self.channels), dtype=np.float32)
        rows[:, 1] = 1.0
        if self.rule == "range":
            rows[:, 0], rows[:, 1] = (self.low + self.high) / 2, (self.high - self.low) / 2
        elif self.rule == "standardize":
            valid = self.valid(labels)
            for row, pixels, kept in zip(rows, self._with_channels(labels), valid, strict=True):
                for channel in range(self.channels):
                    row[:, channel] = trimmed_statistics(pixels[..., channel][kept])
        return rows

    def prepare(
        self, labels: np.ndarray, scaling: Float[np.ndarray, "B 2 C"]
    ) -> tuple[np.ndarray, Bool[np.ndarray, "B H W"]]:
        """The network's input, float32 (B, H, W, C) or int64 (B, H, W) for `classes`, and which pixels are valid."""
        pixels, valid = self._with_channels(labels), self.valid(labels)
        if self.rule == "classes":
            return np.where(valid, pixels[..., 0], self.classes).astype(np.int64), valid
        # In place, since this is a tenth of a step of fitting.
        scaled = pixels.astype(np.float32)
        scaled -= scaling[:, 0, None, None]
        scaled *= 1 / scaling[:, 1, None, None]
        if self.rule == "range":
            scaled.clip(-1.0, 1.0, out=scaled)
        if not valid.all():
            scaled[~valid] = 0.0
        return scaled, valid

    def finish(self, outputs: Float[np.ndarray, "B H W outputs"]) -> np.ndarray:
        """Labels (B, H, W[, C]) of what the network gives."""
        if self.rule == "classes":
            labels = outputs.argmax(axis=-1)[..., None]
        elif self.rule == "range":
            labels = outputs.clip(-1.0, 1.0) * ((self.high - self.low) / 2) + (self.low + self.high) / 2
        elif self.rule == "direction":
            length = np.linalg.norm(outputs, axis=-1, keepdims=True)
            # Half way between a unit vector and the zero vector, as which null pixels are learned.
            labels = np.where(length > 0.5, outputs / length.clip(min=0.5), 0.0)
        else:
            labels = outputs
        if np.issubdtype(np.dtype(self.dtype), np.integer):
            labels = np.rint(labels)
        labels = labels.astype(self.dtype)
        return labels if self.channel_axis else labels[..., 0]

    def _with_channels(self, labels: np.ndarray) -> np.ndarray:
        return labels if self.channel_axis else labels[..., None]


def coding_of(modality: Modality) -> Coding:
    """The coding that a modality's facts ask for; `classes` is still 0 where the rule is `classes`.

    `classes` is for integer maps that are cropped by the rule `nearest` and whose unit is "class index"; `direction` for those
    that are cropped by the rule `normals`; `range` for those with a finite range; all others are standardized. Raises
    ConfigError for a modality that is no image.
    """
    if modality.axes not in ("h w", "h w c"):
        raise ConfigError(
            f"modality {modality.name!r} has axes {modality.axes!r}; the grid tokenizer takes 'h w' or 'h w c': "
            "name another tokenizer for it"
        )
    rule: Rule = "standardize"
    if modality.crop_rule == "nearest" and modality.unit == "class index":
        rule = "classes"
    elif modality.crop_rule == "normals":
        rule = "direction"
    elif modality.range is not None and all(isfinite(bound) for bound in modality.range):
        rule = "range"
    low, high = modality.range if rule == "range" and modality.range is not None else (0.0, 0.0)
    if rule == "range" and not low < high:
        raise ConfigError(f"modality {modality.name!r} has the range {modality.range}; expected low < high")
    return Coding(
        rule=rule,
        dtype=modality.dtype,
        channels=modality.channels,
        channel_axis=modality.axes == "h w c",
        low=float(low),
        high=float(high),
        null=float(modality.null) if modality.null is not None and isfinite(modality.null) else None,
        mirror_x=rule == "direction",
    )


def trimmed_statistics(values: Float[np.ndarray, "N"]) -> tuple[float, float]:
    """Mean and deviation of `values` without the lowest and the highest tenth; (0, 1) of nothing.

    4M's robust standardization of depth (fourm/data/modality_transforms.py): the deviation is sqrt(variance + 1e-6).
    """
    cut = len(values) // 10
    if len(values) == 0:
        return 0.0, 1.0
    ordered = np.partition(values, (cut, len(values) - 1 - cut)) if cut else values
    middle = ordered[cut : len(values) - cut].astype(np.float64)
    return float(middle.mean()), float(np.sqrt(middle.var() + 1e-6))


class GridTokenizer:
    """A fitted grid tokenizer. On a CPU equal labels in a batch of equal shape give equal tokens."""

    def __init__(self, network: GridNetwork, coding: Coding, *, modality: str, size: int, device: str = "cpu") -> None:
        self.network = network.to(device).eval()
        self.coding = coding
        self.device = device
        self.side = size // network.patch
        self.shape = (size, size, coding.channels) if coding.channel_axis else (size, size)
        self.spec = TokenizerSpec(
            family=FAMILY,
            version=VERSION,
            modality=modality,
            vocabulary=len(network.codebook.codes),
            tokens=self.side**2,
        )

    @classmethod
    def load(cls, folder: Path, modality: str, *, device: str = "cpu") -> Self:
        """The tokenizer in `folder`, for the modality it was fitted on or one with the same coding.

        So the tokenizer of `edges` serves `sam_edges`, and that of `rgb` serves `rgb@448`, with more tokens. Raises
        ConfigError for another modality and for files that are not those of a grid tokenizer.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text())
            coding, size = Coding(**config["coding"]), int(config["size"])
            network = empty(**config["network"])
            network.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ConfigError(f"{folder}: no grid tokenizer of version {VERSION} ({error}); fit it again") from error
        if modality != config["modality"]:
            facts = modalities.get(modality)
            if {**asdict(coding_of(facts)), "classes": coding.classes} != asdict(coding):
                raise ConfigError(
                    f"{path}: fitted on {config['modality']!r}, whose labels are of another form than {modality!r}; "
                    "fit a tokenizer on that"
                )
            size = facts.size
        return cls(network, coding, modality=modality, size=size, device=device)

    def prepare(self, labels: np.ndarray) -> Tensor:
        """The network's input for labels (B, *shape). Raises TokenizeError on another shape or dtype."""
        if labels.shape[1:] != self.shape or labels.dtype != self.coding.dtype:
            raise TokenizeError(
                f"{self.spec.modality}: labels are {labels.dtype} {labels.shape[1:]}, expected {self.coding.dtype} "
                f"{self.shape}: label them at the tokenizer's size, or fit a tokenizer on these"
            )
        inputs, _ = self.coding.prepare(labels, self.coding.scaling(labels))
        return torch.from_numpy(inputs).to(self.device)

    def encode(self, labels: Sequence[Any] | np.ndarray) -> list[Int64[np.ndarray, "tokens"]]:
        """Tokens of labels (B, *shape), each row's in row-major order of the grid."""
        with torch.inference_mode():
            codes = self.network.encode(self.prepare(np.asarray(labels)))
        return list(codes.flatten(1).cpu().numpy())

    def decode(self, tokens: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Labels (B, *shape) of rows of tokens, in the form that `Coding.rule` says.

        Raises TokenizeError on a row of another length and on tokens outside the vocabulary.
        """
        for row in tokens:
            if np.shape(row) != (self.spec.tokens,):
                raise TokenizeError(f"{self.spec.modality}: a row has shape {np.shape(row)}, not ({self.spec.tokens},)")
            if np.min(row) < 0 or np.max(row) >= self.spec.vocabulary:
                raise TokenizeError(
                    f"{self.spec.modality}: tokens from {np.min(row)} to {np.max(row)}, expected 0 to "
                    f"{self.spec.vocabulary - 1}: another tokenizer made them"
                )
        codes = np.asarray(tokens, dtype=np.int64).reshape(-1, self.side, self.side)
        with torch.inference_mode():
            outputs = self.network.decode(torch.from_numpy(codes).to(self.device))
        return self.coding.finish(outputs.cpu().numpy())


def write(
    folder: Path,
    network: GridNetwork,
    coding: Coding,
    *,
    modality: Modality,
    shape: Mapping[str, int],
    fit: Mapping[str, Any],
) -> None:
    """Write config.json and model.safetensors; `shape` built the network, `fit` says how it was fitted.

    Equal arguments give equal bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "family": FAMILY,
        "version": VERSION,
        "modality": modality.name,
        "size": modality.size,
        "coding": asdict(coding),
        "network": dict(shape),
        "fit": dict(fit),
    }
    (folder / "config.json").write_bytes(canonical_json(config) + b"\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def chunks(labels: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of rows of an array that may be too large for memory."""
    for start in range(0, len(labels), _ROWS):
        yield np.asarray(labels[start : start + _ROWS])


TOKENIZER = GridTokenizer
