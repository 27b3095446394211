"""Turns label arrays into the input of the grid tokenizer's network, and its outputs into labels.

A `Coding` follows from the facts of the modality alone. It is kept in the tokenizer's config.json, so that a fitted
tokenizer does not depend on the table of modalities. A modality of your own (any number of bands, integer or float) needs
no code here.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifests.errors import ConfigError
from manifests.modality import Modality

Rule = Literal["range", "standardize", "direction", "classes", "plain"]

# From this many channels on, numpy reduces them all at once faster than one by one.
_MANY_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class Coding:
    """Holds how a label array becomes the input of the network, and its output a label.

    rule          `range`: low..high to -1..1, clipped (pixels, edges, bands of a known range)
                  `standardize`: each crop and channel minus its trimmed mean, divided by its trimmed deviation (depth);
                  decoded labels stay standardized, since tokens hold no scale
                  `direction`: unit vectors, unchanged; decoded vectors have length 1, or are zero for null pixels
                  `classes`: class indices, embedded; decoded to the likeliest class
                  `plain`: features, unchanged in both directions
    dtype         of the label
    channels      of the label; 1 if it has no channel axis
    channel_axis  whether the label has a channel axis
    low, high     the range, for `range`
    null          the marker of a pixel without a value, if finite; a pixel with NaN or infinity in it is always null. A
                  null pixel becomes 0 after scaling; for `classes` it has an index of its own
    mirror_x      whether channel 0 changes sign when the picture is mirrored
    classes       how many classes are known, for `classes`; a class with this index or a higher one is encoded as null
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
        """Tells which pixels have a value."""
        pixels = self._with_channels(labels)
        if self.rule == "plain" and self.null is None and self.channels >= _MANY_CHANNELS:
            return np.logical_and.reduce(np.isfinite(pixels), axis=-1)
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
        """Returns shift and divisor of each row, float32; a window of a row is prepared with those of the whole row."""
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
        """Returns the network's input, float32 (B, H, W, C) or int64 (B, H, W) for `classes`, and which pixels are valid."""
        pixels, valid = self._with_channels(labels), self.valid(labels)
        if self.rule == "classes":
            return np.where(valid, pixels[..., 0], self.classes).astype(np.int64), valid
        # In place, because this takes a tenth of a step of fitting.
        scaled = pixels.astype(np.float32)
        if self.rule != "plain":
            scaled -= scaling[:, 0, None, None]
            scaled *= 1 / scaling[:, 1, None, None]
        if self.rule == "range":
            scaled.clip(-1.0, 1.0, out=scaled)
        if not valid.all():
            scaled[~valid] = 0.0
        return scaled, valid

    def prepare_tensor(self, labels: Tensor) -> Tensor:
        """Returns what `prepare` gives as input, for labels (B, *shape) on any device and on that device."""
        pixels = labels if self.channel_axis else labels[..., None]
        valid = pixels.isfinite().all(dim=-1)
        if self.null is not None:
            valid &= (pixels != self.null).any(dim=-1)
        if self.rule == "classes":
            valid &= pixels[..., 0] < self.classes
            return torch.where(valid, pixels[..., 0].long(), self.classes)
        scaled = pixels.float()
        if self.rule == "range":
            scaled = (scaled - (self.low + self.high) / 2) * (2 / (self.high - self.low))
            scaled = scaled.clamp(-1.0, 1.0)
        elif self.rule == "standardize":
            rows = [
                [_trimmed(row[..., channel][kept]) for channel in range(self.channels)]
                for row, kept in zip(scaled, valid, strict=True)
            ]
            shift, scale = torch.stack([torch.stack(row) for row in rows]).unbind(dim=-1)
            scaled = (scaled - shift[:, None, None]) / scale[:, None, None]
        return scaled.masked_fill(~valid[..., None], 0.0)

    def finish(self, outputs: Float[np.ndarray, "B H W outputs"]) -> np.ndarray:
        """Returns the labels (B, H, W[, C]) of the network's outputs."""
        if self.rule == "classes":
            labels = outputs.argmax(axis=-1)[..., None]
        elif self.rule == "range":
            labels = outputs.clip(-1.0, 1.0) * ((self.high - self.low) / 2) + (self.low + self.high) / 2
        elif self.rule == "direction":
            length = np.linalg.norm(outputs, axis=-1, keepdims=True)
            # Null pixels are learned as zero vectors: 0.5 is half way between these and unit vectors.
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
    """Returns the coding that follows from a modality's facts; if its rule is `classes`, their number is still 0.

    `classes` is for integer maps that are cropped by the rule `nearest` and whose unit is "class index"; `direction` for
    maps cropped by the rule `normals`; `plain` for feature maps, whose scale has a meaning; `range` for maps with a
    finite range; all others are standardized. Raises ConfigError if the modality is no image or map.
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
    elif modality.kind == "feature_map":
        rule = "plain"
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
    """Returns mean and deviation of `values` without the lowest and the highest tenth; (0, 1) if they are empty.

    This is 4M's robust standardization of depth (fourm/data/modality_transforms.py): the deviation is
    sqrt(variance + 1e-6).
    """
    cut = len(values) // 10
    if len(values) == 0:
        return 0.0, 1.0
    ordered = np.partition(values, (cut, len(values) - 1 - cut)) if cut else values
    middle = ordered[cut : len(values) - cut].astype(np.float64)
    return float(middle.mean()), float(np.sqrt(middle.var() + 1e-6))


def _trimmed(values: Float[Tensor, "N"]) -> Float[Tensor, "2"]:
    """Returns `trimmed_statistics` of a tensor, on its device."""
    cut = len(values) // 10
    if len(values) == 0:
        return torch.tensor([0.0, 1.0], device=values.device)
    middle = values.sort().values[cut : len(values) - cut].double()
    return torch.stack([middle.mean(), (middle.var(correction=0) + 1e-6).sqrt()]).float()
