"""Tokenizes image-like modalities and feature maps by a VQ-VAE whose tokens are the cells of a grid, row by row.

`grids/coding.py` says how labels become what the network sees; `train/fit/grid.py` makes the folder that `load` reads.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Int64
from safetensors.torch import load_file, save_file
from torch import Tensor

from manifests import modality as modalities
from manifests.errors import ConfigError, TokenizeError
from manifests.modality import Modality
from manifests.recipe import canonical_json
from tokenize_jobs.grids.coding import Coding, coding_of
from tokenize_jobs.grids.networks import GridNetwork, empty
from tokenize_jobs.protocol import TokenizerSpec

FAMILY = "grid"
VERSION = 1

# Rows that a pass over many labels holds in memory at a time.
_ROWS = 64


class GridTokenizer:
    """Encodes and decodes by a fitted network. On a CPU equal labels in batches of equal shape give equal tokens."""

    def __init__(self, network: GridNetwork, coding: Coding, *, modality: str, size: int, device: str = "cpu") -> None:
        """Takes a network and the side of a label: `size` pixels, or cells of a feature map."""
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
        """Loads the tokenizer in `folder`, for the modality it was fitted on or one with the same coding.

        So the tokenizer of `edges` serves `sam_edges`, and that of `rgb` serves `rgb@448`, with more tokens. Raises
        ConfigError for any other modality, and if the files are not those of a grid tokenizer.
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
            size = facts.shape()[0]
        return cls(network, coding, modality=modality, size=size, device=device)

    def prepare(self, labels: np.ndarray | Tensor) -> Tensor:
        """Returns the network's input for labels (B, *shape). Raises TokenizeError if their shape or dtype differs."""
        dtype = str(labels.dtype).removeprefix("torch.")
        if tuple(labels.shape[1:]) != self.shape or dtype != self.coding.dtype:
            raise TokenizeError(
                f"{self.spec.modality}: labels are {dtype} {tuple(labels.shape[1:])}, expected {self.coding.dtype} "
                f"{self.shape}: label them at the tokenizer's size, or fit a tokenizer on these"
            )
        if isinstance(labels, Tensor):
            if labels.device.type != "cpu":
                return self.coding.prepare_tensor(labels).to(self.device)
            # On a CPU a tensor goes the way of an array, so that both give the same tokens.
            labels = labels.numpy()
        inputs, _ = self.coding.prepare(labels, self.coding.scaling(labels))
        return torch.from_numpy(inputs).to(self.device)

    def encode(self, labels: Sequence[Any] | np.ndarray | Tensor) -> list[Int64[np.ndarray, "tokens"]]:
        """Returns tokens of labels (B, *shape), each row's in row-major order of the grid; in float32 under any autocast."""
        rows = labels if isinstance(labels, Tensor) else np.asarray(labels)
        with torch.inference_mode(), torch.autocast(torch.device(self.device).type, enabled=False):
            codes = self.network.encode(self.prepare(rows))
        return list(codes.flatten(1).cpu().numpy())

    def decode(self, tokens: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Returns labels (B, *shape) of rows of tokens, in the form that `Coding.rule` says.

        Raises TokenizeError if a row has another length, or a token is outside the vocabulary.
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
    """Writes config.json and model.safetensors; `shape` built the network, `fit` says how it was fitted.

    Equal arguments give equal bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "family": FAMILY,
        "version": VERSION,
        "modality": modality.name,
        "size": modality.shape()[0],
        "coding": asdict(coding),
        "network": dict(shape),
        "fit": dict(fit),
    }
    (folder / "config.json").write_bytes(canonical_json(config) + b"\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def chunks(labels: np.ndarray) -> Iterator[np.ndarray]:
    """Yields runs of rows of an array that may be too large for memory."""
    for start in range(0, len(labels), _ROWS):
        yield np.asarray(labels[start : start + _ROWS])


TOKENIZER = GridTokenizer
