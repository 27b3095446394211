"""One shard of a work item on its way: rows arrive in order, then it is written, read back and recorded."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

from engine.failures import ABSENT, Outcome, isolate
from engine.label import Labels
from engine.work import Target, WorkItem
from manifests import images, shards, sidecars
from manifests.actions import ShardAdded
from manifests.errors import ShardError
from manifests.modality import Modality
from manifests.recipe import sha256_hex
from manifests.shards import Status
from manifests.storage import Storage, put_same
from tokenize_jobs.protocol import Tokenizer


class ShardOutput:
    """One shard on its way: rows arrive in order, then it is written whole."""

    def __init__(
        self,
        item: WorkItem,
        target: Target,
        keys: Sequence[str],
        tokenizer: Tokenizer | None,
        storage: Storage,
        *,
        batch: int,
        device: str,
    ) -> None:
        self._item = item
        self._target = target
        self._keys = keys
        self._tokenizer = tokenizer
        self._storage = storage
        self._batch = batch
        self._device = device
        self._plan = item.plan.modalities[target.modality]
        self._statuses: list[int] = []
        self._values: list[Any] = []
        self._failures: list[dict[str, Any]] = []
        self._tokens = 0
        modality = self._plan.modality
        if tokenizer is not None:
            self._tar = shards.TarWriter("npy") if self._plan.token_format == "webdataset" else None
        else:
            self._tar = None if modality.in_parquet else shards.TarWriter(_extension(modality))

    def add(self, batch: Sequence[Labels]) -> None:
        """The next rows."""
        outcomes = [self._label_of(labels) for labels in batch]
        if self._tokenizer is not None:
            outcomes = self._encode(self._tokenizer, outcomes)
        for labels, outcome in zip(batch, outcomes, strict=True):
            self._add_row(labels, outcome)

    def _label_of(self, labels: Labels) -> Outcome:
        found = labels.sample if self._target.crop is None else labels.crop[self._target.crop]
        return found.get(self._target.modality, ABSENT)

    def _encode(self, tokenizer: Tokenizer, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Tokens of a batch of labels; arrays go in with one fixed shape, blank where there is none."""
        modality = self._plan.modality
        ready = [place for place, outcome in enumerate(outcomes) if outcome.status is Status.OK]

        def call(places: Sequence[int]) -> Sequence[Any]:
            if modality.is_structured:
                encoded = tokenizer.encode([outcomes[place].value for place in places])
                return list(encoded)
            stacked = np.zeros((self._batch, *modality.shape()), modality.dtype)
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
        if len(self._statuses) != self._item.part.rows:
            raise ShardError(
                f"{self._item.name}: {len(self._statuses)} rows for {self._target}, the part has {self._item.part.rows}"
            )
        facts = {
            "corpus": self._item.plan.corpus,
            "part": self._item.part.part,
            "crop": self._target.crop,
            "modality": self._target.modality,
            "form": self._target.form,
            "fingerprint": self._target.fingerprint,
            "vocabulary": None if self._tokenizer is None else self._tokenizer.spec.vocabulary,
        }
        data = self._bytes(facts)
        self._read_back(data)
        sha256 = _sha256_of(data)
        stem = self._stem(sha256)
        path = f"{stem}.{'parquet' if self._tar is None else 'tar'}"
        put_same(self._storage, path, data, sha256)
        record = self._record(facts, path, sha256, self._write_failures(f"{stem}.failed.parquet"))
        recipe = self._plan.written()[self._target.form]
        self._storage.put(sidecars.path_of(record), sidecars.of_shard(record, recipe.document()))
        return record

    def _stem(self, sha256: str) -> str:
        """The shard's path without its extension."""
        crop = "" if self._target.crop is None else f".c{self._target.crop:02d}"
        folder = f"data/{self._item.plan.corpus}/{self._target.modality}/{self._target.fingerprint[:12]}"
        return f"{folder}/part-{self._item.part.part:07d}{crop}-{sha256[:8]}"

    def _write_failures(self, path: str) -> tuple[str, str] | None:
        """Writes the failed file; its path and sha256, None where no row failed."""
        if not self._failures:
            return None
        data = shards.write_failures(self._failures)
        sha256 = sha256_hex(data)
        put_same(self._storage, path, data, sha256)
        return path, sha256

    def _record(self, facts: Mapping[str, Any], path: str, sha256: str, failed: tuple[str, str] | None) -> ShardAdded:
        count = self._statuses.count
        return ShardAdded(
            **facts,
            path=path,
            format="parquet" if self._tar is None else "webdataset",
            sha256=sha256,
            size_bytes=self._storage.size(path),
            rows=len(self._statuses),
            ok=count(Status.OK),
            failed=count(Status.FAILED),
            absent=count(Status.ABSENT),
            not_selected=count(Status.NOT_SELECTED),
            forgotten=count(Status.FORGOTTEN),
            keys_sha256=shards.keys_digest(self._keys),
            failed_path=failed[0] if failed else None,
            failed_sha256=failed[1] if failed else None,
            tokens=None if self._tokenizer is None else self._tokens,
            device=self._device,
            micro_batch=self._batch,
        )

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


def _extension(modality: Modality) -> str:
    return "png" if modality.dtype in ("uint8", "uint16") and modality.channels in (1, 3) else "npy"


def _sha256_of(data: bytes | IO[bytes]) -> str:
    if isinstance(data, bytes):
        return sha256_hex(data)
    data.seek(0)
    digest = hashlib.sha256()
    while chunk := data.read(1 << 20):
        digest.update(chunk)
    data.seek(0)
    return digest.hexdigest()
