"""Defines what is scheduled and what comes back: work items, the attempts at them, results, and signs of life between."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.plan.corpus import CorpusPlan
from manifests.log.actions import PartAdded, ShardAdded, TokenizerAdded
from manifests.modality import Form, Modality


@dataclass(frozen=True, slots=True)
class Failure:
    """Holds why a row failed: the stage (source, decode, label, tokenize), the exception's class and message."""

    stage: str
    class_name: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """Names one shard that is to be made."""

    modality: str
    form: Form
    fingerprint: str
    crop: int | None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Holds what earlier attempts at an item taught; the driver counts, the worker obeys.

    strikes      workers that died at the item (a node that left the cluster is no strike)
    suspects     rows that were at work when the last one died, as its mark said: they go through one by one
    killers      rows that killed a worker, each with its failure: they become failed rows without being touched
    batch        rows of a call, if memory ran out before; None: as configured
    resumes      an earlier one, perhaps of an earlier run, may have left rows aside (`engine/work/spill.py`): looking costs
                 an object store two requests a shard
    """

    strikes: int = 0
    suspects: tuple[int, ...] = ()
    killers: Mapping[int, Failure] = field(default_factory=dict)
    batch: int | None = None
    resumes: bool = True

    @property
    def marks(self) -> bool:
        """Tells whether the worker must say in `runs/<run>/marks/` which rows it has at hand: from the first strike on."""
        return self.strikes > 0

    @property
    def alone(self) -> bool:
        """Tells whether the worker may have no other item under way, so that it is plain which item the next death is of."""
        return self.marks or self.batch is not None


@dataclass(frozen=True, kw_only=True)
class WorkItem:
    """Holds one part, and the shards of it that are made together. An item that is done twice gives the same files.

    `group` names the labelers that share the decode, `pool` the workers that serve them. `selected` are the rows to be
    labeled as a bitmap (`numpy.packbits`, one bit a row; None: all); the others keep what `base`, the live shard of a
    target, has for them, or are null with status 3. A selected row of a base is made again only if it
    was not selected there before, or if its failure has a class of `retry` (empty: of any class).
    """

    plan: CorpusPlan
    part: PartAdded
    targets: tuple[Target, ...]
    tokenizers: Mapping[str, TokenizerAdded]
    group: str = ""
    pool: str = ""
    selected: bytes | None = None
    base: Mapping[Target, ShardAdded] = field(default_factory=dict)
    retry: frozenset[str] = frozenset()
    attempt: Attempt = field(default_factory=Attempt)

    @property
    def name(self) -> str:
        """Returns the name in messages, events and marks: an item keeps it for a whole run."""
        return f"{self.plan.corpus}/{self.part.part:07d}{f'/{self.group}' if self.group else ''}"

    @property
    def alike(self) -> tuple[str, ...]:
        """Returns what items have in common that one pool does with the same models."""
        return self.pool, self.plan.corpus, self.group


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Holds a worker's sign of life. `busy` is the share of the last seconds that the device (or the labelers) worked."""

    item: str
    rows: int
    stage: str
    stage_s: float
    busy: float
    queue_fill: float
    rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """Holds what a worker made of an item: the records to be committed, and what it took.

    `seconds` is wall time by stage (`wait` for decoded rows, `label`, `tokenize`, `write`) and `total`, which ends when
    another item begins in the worker while this one is written;
    `seconds_by_labeler` that of the calls of each labeler. `busy` is the share of the total in which the device worked
    (on a CPU: labelers and tokenizers).
    """

    records: tuple[ShardAdded, ...]
    rows: int
    seconds: Mapping[str, float]
    seconds_by_labeler: Mapping[str, float]
    busy: float
    rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class FitRows:
    """Holds the rows of one corpus that a tokenizer is fitted on, and those it is judged on, by part."""

    plan: CorpusPlan
    parts: tuple[PartAdded, ...]
    fit_rows: int


@dataclass(frozen=True, kw_only=True)
class FitItem:
    """Holds a tokenizer to be fitted, for the stated number of steps. `modalities` are those it serves.

    `pool` names the workers that can label what it is fitted on; rows of its `attempt` are numbers of samples, as
    `engine/work/fit.py` counts them.
    """

    name: str
    family: str
    modalities: tuple[Modality, ...]
    options: Mapping[str, Any]
    rows: tuple[FitRows, ...]
    pool: str = ""
    attempt: Attempt = field(default_factory=Attempt)

    @property
    def alike(self) -> tuple[str, ...]:
        """Returns what tells its models from those of other fits."""
        return self.pool, self.name
