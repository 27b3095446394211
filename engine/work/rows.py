"""Defines what passes between the stages of an item: a loaded sample, its labels, and the rows of its shards."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.plan.items import Failure, Target
from manifests.formats.shards import Status
from manifests.pixels.crops import Crop

_MESSAGE_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Outcome:
    """Says what became of one label or token row: it has a value if its status is OK, a failure if FAILED.

    As a row of a shard its `value` is the member's bytes in a tar, or what stands in Parquet.
    """

    status: Status
    value: Any = None
    failure: Failure | None = None


ABSENT = Outcome(Status.ABSENT)
NOT_SELECTED = Outcome(Status.NOT_SELECTED)
FORGOTTEN = Outcome(Status.FORGOTTEN)


def failed(stage: str, error: Exception) -> Outcome:
    """Returns the outcome of a row that raised."""
    message = str(error)[:_MESSAGE_CHARACTERS]
    return Outcome(Status.FAILED, failure=Failure(stage, type(error).__name__, message))


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Says what the labelers of a work item need of each row.

    decode  whether photographs are decoded at all
    photo   whether the whole photograph is needed, and not its crops alone
    crops   the crop numbers
    sizes   the sizes in px of each crop's pixels
    """

    decode: bool
    photo: bool
    crops: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadedRow:
    """Holds one sample, ready to be labeled.

    image     the whole photograph, if it is needed and could be decoded
    size      its width and height in px, true even if the decode was scaled; None if it could not be decoded
    cuts      crops by their numbers, if it could be decoded
    pixels    pixels of crops by crop number and size
    problem   why nothing was decoded, if so
    readable  False of a document that cannot be read, and of a row that is forgotten: these have no columns; those of a
              photograph that cannot be decoded are good
    """

    row: int
    key: str
    uri: str
    columns: Mapping[str, Any]
    problem: Outcome | None = None
    image: np.ndarray | None = None
    size: tuple[int, int] | None = None
    cuts: Mapping[int, Crop] = field(default_factory=dict)
    pixels: Mapping[tuple[int, int], np.ndarray] = field(default_factory=dict)
    readable: bool = True


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Holds all labels of one row: of the sample (whole photograph), and of each crop, by modality.

    `place` is the row's place in its batch. Arrays that a labeler of crops left on its device are torch tensors.
    """

    row: int
    key: str
    place: int = 0
    sample: dict[str, Outcome] = field(default_factory=dict)
    crop: dict[int, dict[str, Outcome]] = field(default_factory=dict)

    def of(self, target: Target) -> Outcome:
        """Returns the label that a target is made of."""
        return (self.sample if target.crop is None else self.crop[target.crop]).get(target.modality, ABSENT)
