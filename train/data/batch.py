"""Defines what the loader hands to the model: a batch of rows, and the same batch masked."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Column:
    """Holds the tokens of one modality in a batch of B rows, ragged: row b has `values[offsets[b]:offsets[b + 1]]`.

    A row without the modality is empty. `values` has the narrow unsigned type of the shards.
    """

    values: np.ndarray
    offsets: Int64[np.ndarray, "B+1"]

    def lengths(self) -> Int64[np.ndarray, "B"]:
        """Returns the number of tokens of each row."""
        return np.diff(self.offsets)


@dataclass(frozen=True, kw_only=True, repr=False)
class Batch:
    """Holds B rows of a mixture, as they are in the snapshots.

    slots    the places in the global order that the rows fill
    sources  which entry of the mixture each row came from
    parts    its part; `corpora` names the corpora, `corpus` says which one it is of
    rows     its row in the part
    crops    which crop the tokens of crop grain are of (0 if the row has no crops)
    epochs   how many complete passes over its source came before
    keys     the hash of (seed, epoch, corpus, part, row) that masks are drawn with
    columns  tokens by modality; every modality of the mixture is there
    """

    slots: Int64[np.ndarray, "B"]
    sources: Int64[np.ndarray, "B"]
    corpora: tuple[str, ...]
    corpus: Int64[np.ndarray, "B"]
    parts: Int64[np.ndarray, "B"]
    rows: Int64[np.ndarray, "B"]
    crops: Int64[np.ndarray, "B"]
    epochs: Int64[np.ndarray, "B"]
    keys: Int64[np.ndarray, "B"]
    columns: Mapping[str, Column]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        tokens = ", ".join(f"{len(column.values):,} tokens of {name}" for name, column in self.columns.items())
        return f"<Batch of {len(self)} rows from slot {self.slots[0] if len(self) else 0:,}: {tokens}>"


@dataclass(frozen=True, kw_only=True)
class MaskedBatch:
    """Holds the tokens that the mask chose from B samples, packed: T inputs, U targets, sorted by sample, modality, position.

    *_modality  index in the vocabulary's modalities
    *_position  cell of the grid in row-major order; for a sequence its place in what is left of it
    *_sample    0..B-1
    input_ids   rows of the token table (offset of the modality included)
    target_ids  what is to be predicted, 0..vocabulary-1 of its modality
    previous_ids  rows of the token table: the token before in the target sequence; -1 in grids, whose decoder sees a
                mask token
    """

    samples: int
    input_ids: Int64[Tensor, "T"]
    input_modality: Int64[Tensor, "T"]
    input_position: Int64[Tensor, "T"]
    input_sample: Int64[Tensor, "T"]
    target_ids: Int64[Tensor, "U"]
    previous_ids: Int64[Tensor, "U"]
    target_modality: Int64[Tensor, "U"]
    target_position: Int64[Tensor, "U"]
    target_sample: Int64[Tensor, "U"]

    def counts(self, modalities: int) -> Int64[Tensor, "M"]:
        """Returns the number of targets of each modality."""
        return torch.bincount(self.target_modality, minlength=modalities)
