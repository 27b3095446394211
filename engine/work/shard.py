"""One shard of a work item on its way: rows arrive in order, then it is written, read back and recorded."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import IO, Any

import numpy as np

from engine.plan.items import Target, WorkItem
from engine.work import spill
from engine.work.isolate import MicroBatch, isolate
from engine.work.machine import host, is_tensor
from engine.work.quality.measure import ShardQuality
from engine.work.rows import ABSENT, Labels, Outcome, ShardRow, failed
from manifests.errors import ShardError
from manifests.formats import shards, sidecars
from manifests.formats.shards import Status
from manifests.log.actions import ShardAdded
from manifests.modality import Modality
from manifests.pixels import images
from manifests.recipe import sha256_hex
from manifests.store.storage import Storage, put_same
from tokenize_jobs.protocol import Tokenizer


class ShardOutput:
    """One shard on its way.

    `outcomes` and `rows` may go on beside each other for several batches; `add` is given the rows in their order.
    """

    def __init__(
        self,
        item: WorkItem,
        target: Target,
        keys: Sequence[str],
        known: Mapping[int, ShardRow],
        tokenizer: Tokenizer | None,
        storage: Storage,
        *,
        batch: int,
        micro: MicroBatch,
    ) -> None:
        """`known` are the rows that are not to be made, by number; `micro` bounds the rows a call of the tokenizer."""
        self.target = target
        self._item = item
        self._keys = keys
        self._known = dict(known)
        self._tokenizer = tokenizer
        self._storage = storage
        self._batch = batch
        self._micro = micro
        self._plan = item.plan.modalities[target.modality]
        self._statuses: list[int] = []
        self._values: list[Any] = []
        self._failures: list[dict[str, Any]] = []
        self._tokens = 0
        vocabulary = None if tokenizer is None else tokenizer.spec.vocabulary
        self._quality = ShardQuality(self._plan.modality, target.form, vocabulary)
        self._measures_labels = tokenizer is not None and not self._plan.keep
        modality = self._plan.modality
        if tokenizer is not None:
            self._tar = shards.TarWriter("npy") if self._plan.token_format == "webdataset" else None
        else:
            self._tar = None if modality.in_parquet else shards.TarWriter(_extension(modality))

    @property
    def has_tokenizer(self) -> bool:
        """Whether `outcomes` computes, and does not only fetch from a device."""
        return self._tokenizer is not None

    def outcomes(self, labels: Sequence[Labels]) -> dict[int, Outcome]:
        """What becomes of some rows of a batch, by row number: tokens, or labels on the host. Known rows stay out."""
        mine = [made for made in labels if made.row not in self._known]
        found = {made.row: self._label_of(made) for made in mine}
        if self._measures_labels:
            values = [outcome.value for outcome in found.values() if outcome.status is Status.OK]
            self._quality.add([], values)
        if self._tokenizer is not None:
            return self._encoded(self._tokenizer, mine, found)
        tensors = {row: outcome for row, outcome in found.items() if is_tensor(outcome.value)}
        if tensors:
            arrays = host([outcome.value for outcome in tensors.values()])
            found |= {
                row: replace(outcome, value=array)
                for (row, outcome), array in zip(tensors.items(), arrays, strict=True)
            }
        return found

    def _label_of(self, labels: Labels) -> Outcome:
        found = labels.sample if self.target.crop is None else labels.crop[self.target.crop]
        return found.get(self.target.modality, ABSENT)

    def _encoded(self, tokenizer: Tokenizer, labels: Sequence[Labels], found: dict[int, Outcome]) -> dict[int, Outcome]:
        """Tokens of labels; arrays go in with one fixed shape, blank where there is none."""
        modality = self._plan.modality
        at_place = {made.place: found[made.row] for made in labels if found[made.row].status is Status.OK}

        def call(places: Sequence[int]) -> list[Any]:
            tokens: list[Any] = []
            size = self._micro.size
            for first in range(0, self._batch, size):
                some = [place for place in places if first <= place < first + size]
                if not some:
                    continue
                values = [at_place[place].value for place in some]
                if modality.is_structured:
                    tokens += list(tokenizer.encode(values))
                else:
                    encoded = tokenizer.encode(_stacked(values, [place - first for place in some], size, modality))
                    tokens += [encoded[place - first] for place in some]
            return tokens

        tokens = isolate(call, list(at_place), "tokenize", self._micro)
        return {made.row: tokens.get(made.place, found[made.row]) for made in labels}

    def rows(self, outcomes: Mapping[int, Outcome]) -> dict[int, ShardRow]:
        """Outcomes as they are written, by row number; of no state, so that several threads may do it."""
        return {row: self._row(outcome) for row, outcome in outcomes.items()}

    def _row(self, outcome: Outcome) -> ShardRow:
        if outcome.status is not Status.OK:
            return ShardRow(outcome.status, None, outcome.failure)
        try:
            return ShardRow(Status.OK, self._member(outcome.value) if self._tar is not None else outcome.value)
        except Exception as error:
            return ShardRow(Status.FAILED, None, failed("label", error).failure)

    def add(self, until: int, outcomes: Mapping[int, Outcome], rows: Mapping[int, ShardRow]) -> None:
        """The next rows, up to `until`: those that were made, and those that were known."""
        values = []
        for number in range(len(self._statuses), until):
            row = self._known.pop(number, None) if number not in rows else rows[number]
            if row is None:
                raise ShardError(f"{self._item.name}: row {number} of {self.target} was not made")
            self._add_row(number, row)
            if row.status is not Status.OK:
                values.append(None)
            else:
                values.append(outcomes[number].value if number in outcomes else self._plain(row.value))
        self._quality.add(values)

    def _add_row(self, number: int, row: ShardRow) -> None:
        self._statuses.append(int(row.status))
        if row.failure is not None:
            self._failures.append(
                {
                    "corpus": self._item.plan.corpus,
                    "part": self._item.part.part,
                    "row": number,
                    "key": self._keys[number],
                    "modality": self.target.modality,
                    "form": self.target.form,
                    "crop": self.target.crop,
                    "stage": row.failure.stage,
                    "class": row.failure.class_name,
                    "message": row.failure.message,
                }
            )
        if row.value is not None and self._tokenizer is not None:
            self._tokens += len(self._plain(row.value))
        if self._tar is not None:
            self._tar.add(self._keys[number], int(row.status), row.value)
        else:
            self._values.append(row.value)

    def _member(self, value: Any) -> bytes:
        """A value as a member of a tar: 8- and 16-bit pixels as PNG, all else as .npy."""
        if self._tokenizer is not None:
            width = shards.token_type(self._tokenizer.spec.vocabulary).to_pandas_dtype()
            return images.encode_npy(np.asarray(value, dtype=width))
        if _extension(self._plan.modality) == "png":
            return images.encode_png(value)
        return images.encode_npy(value)

    def _plain(self, value: Any) -> Any:
        """A value as it was before it became a member of a tar."""
        if not isinstance(value, bytes):
            return value
        return images.decode_npy(value) if value.startswith(images.NPY_START) else images.decode_map(value)

    def spill(self) -> None:
        """Writes the rows so far aside, for whoever does the item again."""
        data: Any = self._tar.so_far() if self._tar is not None else self._bytes(self._facts())
        spill.write(
            self._storage,
            spill.path_of(self._item, self.target),
            len(self._statuses),
            data,
            is_tar=self._tar is not None,
            failures=shards.write_failures(self._failures),
        )

    def write(self, *, device: str, micro_batch: int, metrics: Mapping[str, float]) -> ShardAdded:
        """Writes the shard, its failed file and its sidecar; the shard's record, with what is told of its making."""
        if len(self._statuses) != self._item.part.rows:
            raise ShardError(
                f"{self._item.name}: {len(self._statuses)} rows for {self.target}, the part has {self._item.part.rows}"
            )
        facts = self._facts()
        data = self._bytes(facts)
        self._read_back(data)
        sha256 = _sha256_of(data)
        failures = shards.write_failures(self._failures) if self._failures else None
        failed_sha256 = None if failures is None else sha256_hex(failures)
        stem = self._stem(shards.named_by(sha256, failed_sha256))
        path = f"{stem}.{'parquet' if self._tar is None else 'tar'}"
        put_same(self._storage, path, data, sha256)
        failed_file = None
        if failures is not None and failed_sha256 is not None:
            failed_file = f"{stem}.failed.parquet", failed_sha256
            put_same(self._storage, failed_file[0], failures, failed_sha256)
        record = replace(
            self._record(facts, path, sha256, failed_file),
            device=device,
            micro_batch=micro_batch,
            metrics={**self._quality.finish(), **metrics},
        )
        recipe = self._plan.written()[self.target.form]
        self._storage.put(sidecars.path_of(record), sidecars.of_shard(record, recipe.document()))
        return record

    def _facts(self) -> dict[str, Any]:
        return {
            "corpus": self._item.plan.corpus,
            "part": self._item.part.part,
            "crop": self.target.crop,
            "modality": self.target.modality,
            "form": self.target.form,
            "fingerprint": self.target.fingerprint,
            "vocabulary": None if self._tokenizer is None else self._tokenizer.spec.vocabulary,
        }

    def _stem(self, sha256: str) -> str:
        """The shard's path without its extension."""
        folder = f"data/{self._item.plan.corpus}/{self.target.modality}/{self.target.fingerprint[:12]}"
        return f"{folder}/{shards.file_stem(self._item.part.part, self.target.crop, sha256)}"

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
        )

    def _bytes(self, facts: Mapping[str, Any]) -> bytes | IO[bytes]:
        if self._tar is not None:
            return self._tar.finish()
        keys = self._keys[: len(self._statuses)]
        if self._tokenizer is not None:
            return shards.write_tokens(keys, self._statuses, self._values, facts["vocabulary"], facts)
        return shards.write_labels(keys, self._statuses, self._values, self._plan.modality, facts)

    def _read_back(self, data: bytes | IO[bytes]) -> None:
        """Reads the shard as a stranger would, before anyone is told of it."""
        found = (
            shards.read_parquet(data, values=False, whole=True)
            if isinstance(data, bytes)
            else shards.read_tar(data, values=False)
        )
        if found.keys != list(self._keys) or found.statuses != self._statuses:
            raise ShardError(f"{self._item.name}: {self.target.modality} does not read back as it was written")
        if not isinstance(data, bytes):
            data.seek(0)


def _stacked(values: Sequence[Any], places: Sequence[int], size: int, modality: Modality) -> Any:
    """Arrays or tensors at their places of one (size, ...), on the device where they are."""
    if is_tensor(values[0]):
        first = values[0]
        stacked = first.new_zeros((size, *first.shape))
        for value, place in zip(values, places, strict=True):
            stacked[place] = value
        return stacked
    stacked = np.zeros((size, *modality.shape()), modality.dtype)
    for value, place in zip(values, places, strict=True):
        stacked[place] = value
    return stacked


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
