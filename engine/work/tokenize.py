"""Makes tokens of labels.

Arrays go into a tokenizer in batches of one fixed shape, blank for rows without a label, so that a row's tokens never
depend on what became of its neighbors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.work.isolate import MicroBatch, isolate, windows
from engine.work.machine import is_tensor
from engine.work.models import first_call
from engine.work.rows import Labels, Outcome
from manifests.formats.shards import Status
from manifests.modality import Modality
from tokenize_jobs.protocol import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """Holds a tokenizer at work on the labels of one modality, in batches of `batch` rows; a call has `micro` of them."""

    tokenizer: Tokenizer
    modality: Modality
    batch: int
    micro: MicroBatch

    @property
    def computes(self) -> bool:
        """Tells whether the tokenizer computes on a device: those of arrays do."""
        return bool(self.modality.axes)

    def tokens(self, labels: Sequence[Labels], found: Mapping[int, Outcome]) -> dict[int, Outcome]:
        """Returns tokens by row number. `found` are the rows' labels; a row without one keeps its outcome."""
        at_place = {made.place: found[made.row] for made in labels if found[made.row].status is Status.OK}

        def call(places: Sequence[int]) -> list[Any]:
            tokens: list[Any] = []
            size = self.micro.size
            for first, some in windows(places, self.batch, size):
                values = [at_place[place].value for place in some]
                if self.modality.is_structured:
                    tokens += list(self.tokenizer.encode(values))
                else:
                    stacked = _stacked(values, [place - first for place in some], size, self.modality)
                    encoded = self.tokenizer.encode(stacked)
                    tokens += [encoded[place - first] for place in some]
            return tokens

        with first_call(f"tokenizer {self.tokenizer.spec.family}"):
            tokens = isolate(call, list(at_place), "tokenize", self.micro)
        return {made.row: tokens.get(made.place, found[made.row]) for made in labels}


def _stacked(values: Sequence[Any], places: Sequence[int], size: int, modality: Modality) -> Any:
    """Returns arrays or tensors at their places of one (size, ...), on the device where they are."""
    if is_tensor(values[0]):
        first = values[0]
        stacked = first.new_zeros((size, *first.shape))
    else:
        stacked = np.zeros((size, *modality.shape()), modality.dtype)
    for value, place in zip(values, places, strict=True):
        stacked[place] = value
    return stacked
