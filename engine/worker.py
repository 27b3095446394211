"""One work item: a part's missing shards, made and written. The same worker runs in this process and in Ray's actors.

Nothing of pixels leaves it: it is given a `WorkItem`, writes shards, and returns their records, which the driver commits.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.corpus_plan import CorpusPlan, LabelerUse
from engine.decode import load_rows
from engine.label import Labeling
from engine.shard_output import ShardOutput
from engine.work import Target, WorkItem
from labelers import protocol as labelers
from manifests import shards
from manifests.actions import ShardAdded, TokenizerAdded
from manifests.errors import ShardError
from manifests.recipe import canonical_json
from manifests.storage import Storage, open_storage
from tokenize_jobs import protocol as tokenizers


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """How a worker works; none of it but `batch` and `threads` can show in its output, and those are in the run."""

    threads: int
    batch: int
    decode_threads: int
    queue_bytes: int
    device: str


class Worker:
    """Does work items and fits, one at a time, keeping the models it loaded."""

    def __init__(self, workspace: str, settings: WorkerSettings) -> None:
        self.storage = open_storage(workspace)
        self.settings = replace(settings, device=_device(settings.device))
        self._labelers: dict[str, labelers.Labeler] = {}
        self._tokenizers: dict[tuple[str, str], tokenizers.Tokenizer] = {}
        _limit_threads(settings.threads)

    def work(self, item: WorkItem, on_rows: Callable[[int], None] = lambda rows: None) -> list[ShardAdded]:
        """Makes the item's shards; their records, in the order of its targets. `on_rows` is told how many rows are done."""
        samples = shards.read_samples(self.storage.read(item.part.path))
        if len(samples) != item.part.rows:
            raise ShardError(f"{item.part.path} holds {len(samples)} rows, the log says {item.part.rows}")
        keys = [sample["key"] for sample in samples]
        outputs = [self._output(item, target, keys) for target in item.targets]
        done = 0
        for batch in self.labels(item.plan, samples, item.targets):
            for output in outputs:
                output.add(batch)
            done += len(batch)
            on_rows(done)
        return [output.write() for output in outputs]

    def _output(self, item: WorkItem, target: Target, keys: Sequence[str]) -> ShardOutput:
        tokenizer = None
        if target.form == "token":
            known = item.tokenizers[item.plan.modalities[target.modality].tokenizer]
            tokenizer = self.tokenizer(known, target.modality)
        return ShardOutput(
            item, target, keys, tokenizer, self.storage, batch=self.settings.batch, device=self.settings.device
        )

    def labels(self, plan: CorpusPlan, samples: Sequence[Mapping[str, Any]], targets: Sequence[Target]):
        """Labels of these samples, in batches, from only those labelers that the targets need."""
        uses = _needed_labelers(plan, {target.modality for target in targets})
        crops = sorted({target.crop for target in targets if target.crop is not None})
        loaded = [(use, self._labeler(use)) for use in uses]
        labeling = Labeling(plan, loaded, crops, self.settings.batch)
        rows = load_rows(
            plan,
            samples,
            needs_image=labeling.needs_image,
            threads=self.settings.decode_threads,
            queue_bytes=self.settings.queue_bytes,
        )
        return labeling.run(rows)

    def tokenizer(self, known: TokenizerAdded, modality: str) -> tokenizers.Tokenizer:
        """A tokenizer of the workspace, loaded once and checked against its digest."""
        identity = (known.digest, modality)
        if identity not in self._tokenizers:
            folder = fetch_tokenizer(self.storage, known)
            self._tokenizers[identity] = tokenizers.load(folder, modality)
        return self._tokenizers[identity]

    def _labeler(self, use: LabelerUse) -> labelers.Labeler:
        identity = f"{use.name} {canonical_json(dict(use.parameters)).decode()}"
        if identity not in self._labelers:
            self._labelers[identity] = labelers.build(labelers.find(use.name), use.parameters, self.settings.device)
        return self._labelers[identity]


def fetch_tokenizer(storage: Storage, known: TokenizerAdded) -> Path:
    """A local folder with a tokenizer of the workspace. Raises ShardError where its files are not the committed ones."""
    folder, found = tokenizers.fetch(storage, known.path)
    if found != known.digest:
        raise ShardError(
            f"{storage.location(known.path)}: the tokenizer's digest is {found[:12]}, the log says "
            f"{known.digest[:12]}; restore the folder from a copy, or fit anew with --refit"
        )
    return folder


def _needed_labelers(plan: CorpusPlan, names: set[str]) -> list[LabelerUse]:
    """The labelers that make these modalities, and those that they need, in the plan's order."""
    needed = set(names)
    chosen = []
    for use in reversed(plan.labelers):
        if any(output.name in needed for output in use.outputs):
            chosen.append(use)
            needed |= set(labelers.find(use.name).spec.inputs)
    return chosen[::-1]


def _device(wanted: str) -> str:
    """The device itself where `auto` was asked for."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _limit_threads(threads: int) -> None:
    """The arithmetic of every process has the same number of threads, so that it has the same result."""
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
