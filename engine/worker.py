"""One work item: a part's missing shards, made and written. The same worker runs in this process and in Ray's actors.

Nothing of pixels leaves it: it is given a `WorkItem`, writes shards, and returns their records, which the driver commits.
"""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from engine.decode import load_rows
from engine.failures import ABSENT, Outcome, isolate
from engine.label import Labeling, Labels
from engine.plan import CorpusPlan, LabelerUse, Target, WorkItem
from labelers import protocol as labelers
from manifests import images, shards
from manifests.actions import ShardAdded, TokenizerAdded
from manifests.catalog import cache_folder
from manifests.errors import ShardError
from manifests.modality import Modality
from manifests.recipe import canonical_json, sha256_hex
from manifests.shards import Status
from manifests.storage import Storage, open_storage, put_same
from tokenize_jobs import protocol as tokenizers

_TOKEN_FILES = ("config.json", "model.safetensors", "tokenizer.json")


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
        outputs = [_Output(item, target, keys, self) for target in item.targets]
        done = 0
        for batch in self.labels(item.plan, samples, item.targets):
            for output in outputs:
                output.add(batch)
            done += len(batch)
            on_rows(done)
        return [output.write() for output in outputs]

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


class _Output:
    """One shard on its way: rows arrive in order, then it is written whole."""

    def __init__(self, item: WorkItem, target: Target, keys: Sequence[str], worker: Worker) -> None:
        self._item = item
        self._target = target
        self._keys = keys
        self._worker = worker
        self._plan = item.plan.modalities[target.modality]
        self._statuses: list[int] = []
        self._values: list[Any] = []
        self._failures: list[dict[str, Any]] = []
        self._tokens = 0
        self._tokenizer: tokenizers.Tokenizer | None = None
        modality = self._plan.modality
        if target.form == "token":
            self._tokenizer = worker.tokenizer(item.tokenizers[self._plan.tokenizer], modality.name)
            self._tar = shards.TarWriter("npy") if self._plan.token_format == "webdataset" else None
        else:
            self._tar = None if modality.is_structured else shards.TarWriter(_extension(modality))

    def add(self, batch: Sequence[Labels]) -> None:
        """The next rows."""
        outcomes = [self._label_of(labels) for labels in batch]
        if self._tokenizer is not None:
            outcomes = self._encode(self._tokenizer, outcomes)
        for labels, outcome in zip(batch, outcomes, strict=True):
            self._add_row(labels, outcome)

    def _label_of(self, labels: Labels) -> Outcome:
        form_is_cropped = self._target.crop is not None
        found = labels.crop.get(self._target.crop or 0, {}) if form_is_cropped else labels.sample
        return found.get(self._target.modality, ABSENT)

    def _encode(self, tokenizer: tokenizers.Tokenizer, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Tokens of a batch of labels; arrays go in with one fixed shape, blank where there is none."""
        modality = self._plan.modality
        ready = [place for place, outcome in enumerate(outcomes) if outcome.status is Status.OK]
        size = self._worker.settings.batch

        def call(places: Sequence[int]) -> Sequence[Any]:
            if modality.is_structured:
                encoded = tokenizer.encode([outcomes[place].value for place in places])
                return list(encoded)
            stacked = np.zeros((size, *modality.shape()), modality.dtype)
            for place in places:
                stacked[place] = outcomes[place].value
            encoded = tokenizer.encode(stacked)
            return [encoded[place] for place in places]

        tokens = isolate(call, ready, "tokenize")
        return [tokens.get(place, outcome) for place, outcome in enumerate(outcomes)]

    def _add_row(self, labels: Labels, outcome: Outcome) -> None:
        value = outcome.value if outcome.status is Status.OK else None
        self._statuses.append(int(outcome.status))
        if outcome.failure is not None:
            self._failures.append(
                {
                    "corpus": self._item.plan.corpus,
                    "part": self._item.part.part,
                    "row": labels.row,
                    "key": labels.key,
                    "modality": self._target.modality,
                    "form": self._target.form,
                    "crop": self._target.crop,
                    "stage": outcome.failure.stage,
                    "class": outcome.failure.class_name,
                    "message": outcome.failure.message,
                }
            )
        if value is not None and self._tokenizer is not None:
            self._tokens += len(value)
        if self._tar is not None:
            self._tar.add(labels.key, int(outcome.status), None if value is None else self._member(value))
        else:
            self._values.append(value)

    def _member(self, value: Any) -> bytes:
        """A value as a member of a tar: 8- and 16-bit pixels as PNG, all else as .npy."""
        if self._tokenizer is not None:
            width = shards.token_type(self._tokenizer.spec.vocabulary).to_pandas_dtype()
            return images.encode_npy(np.asarray(value, dtype=width))
        if _extension(self._plan.modality) == "png":
            return images.encode_png(value)
        return images.encode_npy(value)

    def write(self) -> ShardAdded:
        """Writes the shard, its failed file and its sidecar; the shard's record."""
        item, target = self._item, self._target
        if len(self._statuses) != item.part.rows:
            raise ShardError(f"{item.name}: {len(self._statuses)} rows for {target}, the part has {item.part.rows}")
        facts = {
            "corpus": item.plan.corpus,
            "part": item.part.part,
            "crop": target.crop,
            "modality": target.modality,
            "form": target.form,
            "fingerprint": target.fingerprint,
            "vocabulary": None if self._tokenizer is None else self._tokenizer.spec.vocabulary,
        }
        extension = "parquet" if self._tar is None else "tar"
        data = self._bytes(facts)
        sha256 = _sha256_of(data)
        crop = "" if target.crop is None else f".c{target.crop:02d}"
        folder = f"data/{item.plan.corpus}/{target.modality}/{target.fingerprint[:12]}"
        stem = f"{folder}/part-{item.part.part:07d}{crop}-{sha256[:8]}"
        self._read_back(data)
        storage = self._worker.storage
        put_same(storage, f"{stem}.{extension}", data, sha256)
        failed_path = failed_sha256 = None
        if self._failures:
            failed = shards.write_failures(self._failures)
            failed_sha256 = sha256_hex(failed)
            failed_path = f"{stem}.failed.parquet"
            put_same(storage, failed_path, failed, failed_sha256)
        count = self._statuses.count
        record = ShardAdded(
            **facts,
            path=f"{stem}.{extension}",
            format="parquet" if self._tar is None else "webdataset",
            sha256=sha256,
            size_bytes=storage.size(f"{stem}.{extension}"),
            rows=len(self._statuses),
            ok=count(Status.OK),
            failed=count(Status.FAILED),
            absent=count(Status.ABSENT),
            not_selected=count(Status.NOT_SELECTED),
            forgotten=count(Status.FORGOTTEN),
            keys_sha256=shards.keys_digest(self._keys),
            failed_path=failed_path,
            failed_sha256=failed_sha256,
            tokens=None if self._tokenizer is None else self._tokens,
            device=self._worker.settings.device,
            micro_batch=self._worker.settings.batch,
        )
        recipe = self._plan.label if target.form == "label" else self._plan.token
        sidecar = {"format": 1, "shard": asdict(record), "recipe": recipe.document() if recipe else None}
        storage.put(f"{stem}.json", canonical_json(sidecar))
        return record

    def _bytes(self, facts: Mapping[str, Any]) -> bytes | IO[bytes]:
        if self._tar is not None:
            return self._tar.finish()
        if self._tokenizer is not None:
            return shards.write_tokens(self._keys, self._statuses, self._values, facts["vocabulary"], facts)
        return shards.write_labels(self._keys, self._statuses, self._values, self._plan.modality, facts)

    def _read_back(self, data: bytes | IO[bytes]) -> None:
        """Reads the shard as a stranger would, before anyone is told of it."""
        found = (
            shards.read_parquet(io.BytesIO(data)) if isinstance(data, bytes) else shards.read_tar(data, values=False)
        )
        if found.keys != list(self._keys) or found.statuses != self._statuses:
            raise ShardError(f"{self._item.name}: {self._target.modality} does not read back as it was written")
        if not isinstance(data, bytes):
            data.seek(0)


def fetch_tokenizer(storage: Storage, known: TokenizerAdded) -> Path:
    """A local folder with a tokenizer of the workspace. Raises ShardError where its files are not the committed ones."""
    if storage.is_local:
        folder = Path(storage.full(known.path))
    else:
        folder = cache_folder() / "tokenizers" / Path(known.path).name
        folder.mkdir(parents=True, exist_ok=True)
        for name in storage.names(known.path):
            (folder / name).write_bytes(storage.read(f"{known.path}/{name}"))
    try:
        found = tokenizers.digest(folder)
    except FileNotFoundError:
        found = ""
    if found != known.digest:
        raise ShardError(
            f"{storage.location(known.path)}: the tokenizer's digest is {found[:12] or 'missing'}, the log says "
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


def _extension(modality: Modality) -> str:
    return "png" if modality.dtype in ("uint8", "uint16") and modality.channels in (1, 3) else "npy"


def _sha256_of(data: bytes | IO[bytes]) -> str:
    if isinstance(data, bytes):
        return sha256_hex(data)
    import hashlib

    data.seek(0)
    digest = hashlib.sha256()
    while chunk := data.read(1 << 20):
        digest.update(chunk)
    data.seek(0)
    return digest.hexdigest()


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
