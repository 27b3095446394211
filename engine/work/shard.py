"""Writes shards: encodes rows as they are made, then writes each shard, reads it back and records it."""

import io
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import IO, Any

import numpy as np

from engine.plan.items import Target, WorkItem
from engine.work import spill
from engine.work.inputs import Inputs
from engine.work.marks import Stopwatch
from engine.work.quality.measure import ShardQuality
from engine.work.rows import Outcome, failed
from manifests.errors import ShardError
from manifests.formats import codecs, shards, sidecars
from manifests.formats.shards import Status
from manifests.log.actions import ShardAdded
from manifests.recipe import sha256_hex, sha256_of_stream
from manifests.store import paths
from manifests.store.storage import put_same

_BATCHES_BEHIND = 2
_ROWS_AN_ENCODER = 8


class ShardOutput:
    """Holds one shard on its way. `rows` may go on beside each other for several batches; `add` is given them in order."""

    def __init__(
        self, item: WorkItem, target: Target, inputs: Inputs, known: Mapping[int, Outcome], vocabulary: int | None
    ) -> None:
        """Takes the rows that are not to be made by number (`known`), and of a shard of tokens their vocabulary."""
        self.target = target
        self._item = item
        self._keys = [sample.key for sample in inputs.samples]
        self._known = dict(known)
        self._vocabulary = vocabulary
        self._storage = inputs.storage
        self._plan = item.plan.modalities[target.modality]
        self._place: dict[str, Any] = {
            "corpus": item.plan.corpus,
            "part": item.part.part,
            "crop": target.crop,
            "modality": target.modality,
            "form": target.form,
        }
        self._facts = {**self._place, "fingerprint": target.fingerprint, "vocabulary": vocabulary}
        self._statuses: list[int] = []
        self._values: list[Any] = []
        self._failures: list[dict[str, Any]] = []
        self._tokens = 0
        self._quality = ShardQuality(self._plan.modality, target.form, vocabulary)
        if vocabulary is None:
            self._codec = codecs.of_modality(self._plan.modality)
        else:
            self._codec = codecs.NPY if self._plan.token_format == "webdataset" else None
        self._tar = None if self._codec is None else shards.TarWriter(self._codec.extension)

    def is_known(self, row: int) -> bool:
        """Tells whether a row of a batch that was not added yet is not to be made."""
        return row in self._known

    def measure(self, labels: Mapping[int, Outcome]) -> None:
        """Measures the labels that tokens are made of, unless a shard of its own keeps them."""
        if not self._plan.keep:
            self._quality.add([], [outcome.value for outcome in labels.values() if outcome.status is Status.OK])

    def rows(self, outcomes: Mapping[int, Outcome]) -> dict[int, Outcome]:
        """Returns outcomes as they are written, by row number. Has no state, so that several threads may call it."""
        return {row: self._row(outcome) for row, outcome in outcomes.items()}

    def _row(self, outcome: Outcome) -> Outcome:
        if outcome.status is not Status.OK or self._codec is None:
            return outcome
        try:
            return Outcome(Status.OK, self._member(self._codec, outcome.value))
        except Exception as error:
            return failed("label", error)

    def add(self, until: int, outcomes: Mapping[int, Outcome], rows: Mapping[int, Outcome]) -> None:
        """Adds the next rows, up to `until`: those that were made, and those that were known."""
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

    def _add_row(self, number: int, row: Outcome) -> None:
        self._statuses.append(int(row.status))
        if row.failure is not None:
            reason = {
                "stage": row.failure.stage,
                "class": row.failure.class_name,
                "message": row.failure.message,
            }
            self._failures.append({**self._place, "row": number, "key": self._keys[number], **reason})
        if row.value is not None and self._vocabulary is not None:
            self._tokens += len(self._plain(row.value))
        if self._tar is not None:
            self._tar.add(self._keys[number], int(row.status), row.value)
        else:
            self._values.append(row.value)

    def _member(self, codec: codecs.Codec, value: Any) -> bytes:
        if self._vocabulary is not None:
            value = np.asarray(value, dtype=shards.token_type(self._vocabulary).to_pandas_dtype())
        return codec.encode(value)

    def _plain(self, value: Any) -> Any:
        """Returns a value as it was before it became a member of a tar."""
        return codecs.decode(value) if isinstance(value, bytes) else value

    def spill(self) -> None:
        """Writes the rows so far aside, for whoever does the item again."""
        data: Any = self._tar.so_far() if self._tar is not None else self._bytes()
        spill.write(
            self._storage,
            spill.path_of(self._item, self.target),
            len(self._statuses),
            data,
            is_tar=self._tar is not None,
            failures=shards.write_failures(self._failures),
        )

    def write(self, *, device: str, micro_batch: int, metrics: Mapping[str, float]) -> ShardAdded:
        """Writes the shard, its failed file and its sidecar; returns its record, with what is told of its making."""
        if len(self._statuses) != self._item.part.rows:
            raise ShardError(
                f"{self._item.name}: {len(self._statuses)} rows for {self.target}, the part has {self._item.part.rows}"
            )
        data = self._bytes()
        self._read_back(data)
        sha256, size_bytes = _sha256_of(data), len(data) if isinstance(data, bytes) else data.seek(0, io.SEEK_END)
        failures = shards.write_failures(self._failures) if self._failures else None
        failed_sha256 = None if failures is None else sha256_hex(failures)
        path = paths.shard(
            self._item.plan.corpus,
            self.target.modality,
            self.target.fingerprint,
            self._item.part.part,
            self.target.crop,
            shards.named_by(sha256, failed_sha256),
            is_tar=self._tar is not None,
        )
        put_same(self._storage, path, data, sha256)
        failed_file = None
        if failures is not None and failed_sha256 is not None:
            failed_file = paths.failed(path), failed_sha256
            put_same(self._storage, failed_file[0], failures, failed_sha256)
        record = replace(
            self._record(path, sha256, size_bytes, failed_file),
            device=device,
            micro_batch=micro_batch,
            metrics={**self._quality.finish(), **metrics},
        )
        recipe = self._plan.written()[self.target.form]
        self._storage.put(sidecars.path_of(record), sidecars.of_shard(record, recipe.document()))
        return record

    def _record(self, path: str, sha256: str, size_bytes: int, failed: tuple[str, str] | None) -> ShardAdded:
        count = self._statuses.count
        return ShardAdded(
            **self._facts,
            path=path,
            format="parquet" if self._tar is None else "webdataset",
            sha256=sha256,
            size_bytes=size_bytes,
            rows=len(self._statuses),
            ok=count(Status.OK),
            failed=count(Status.FAILED),
            absent=count(Status.ABSENT),
            not_selected=count(Status.NOT_SELECTED),
            forgotten=count(Status.FORGOTTEN),
            keys_sha256=shards.keys_digest(self._keys),
            failed_path=failed[0] if failed else None,
            failed_sha256=failed[1] if failed else None,
            tokens=None if self._vocabulary is None else self._tokens,
        )

    def _bytes(self) -> bytes | IO[bytes]:
        if self._tar is not None:
            return self._tar.finish()
        keys = self._keys[: len(self._statuses)]
        if self._vocabulary is not None:
            return shards.write_tokens(keys, self._statuses, self._values, self._vocabulary, self._facts)
        return shards.write_labels(keys, self._statuses, self._values, self._plan.modality, self._facts)

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


class ShardWriter:
    """Encodes and writes the batches of an item's shards by threads of its own, beside the labeling; to be closed."""

    def __init__(self, outputs: Sequence[ShardOutput], threads: int, stopwatch: Stopwatch) -> None:
        self._outputs = outputs
        self._stopwatch = stopwatch
        self._encoders = ThreadPoolExecutor(threads, "encode")
        # One, so that each shard gets its rows in order.
        self._writer = ThreadPoolExecutor(1, "write")
        self._behind: deque[Future[None]] = deque()

    def close(self) -> None:
        """Waits for the threads to end."""
        self._writer.shutdown()
        self._encoders.shutdown()

    def add(self, outcomes: Sequence[Mapping[int, Outcome]], until: int) -> None:
        """Takes a batch: by shard, what became of the rows up to `until` that were not known. Raises what writing raised."""
        # Few batches wait, so that labels never pile up.
        self._wait(_BATCHES_BEHIND - 1)
        self._behind.append(self._writer.submit(self._encode, outcomes, until))

    def spill(self) -> None:
        """Writes the rows so far of every shard aside."""
        self._wait(0)
        with self._stopwatch.on("write"):
            list(self._encoders.map(ShardOutput.spill, self._outputs))

    def finish(self, *, metrics: Mapping[str, Mapping[str, float]], **made: Any) -> tuple[ShardAdded, ...]:
        """Writes the shards once all batches are in; returns their records. `metrics` are by modality."""
        self._wait(0)
        with self._stopwatch.on("write"):
            records = self._encoders.map(
                lambda shard: shard.write(metrics=metrics.get(shard.target.modality, {}), **made), self._outputs
            )
            return tuple(records)

    def _wait(self, most: int) -> None:
        with self._stopwatch.on("write"):
            while len(self._behind) > most:
                self._behind.popleft().result()

    def _encode(self, outcomes: Sequence[Mapping[int, Outcome]], until: int) -> None:
        """Encodes a batch by several threads, then gives each shard its rows."""
        pieces: list[list[Future[dict[int, Outcome]]]] = []
        for shard, found in zip(self._outputs, outcomes, strict=True):
            numbers = list(found)
            pieces.append(
                [
                    self._encoders.submit(
                        shard.rows, {row: found[row] for row in numbers[first : first + _ROWS_AN_ENCODER]}
                    )
                    for first in range(0, len(numbers), _ROWS_AN_ENCODER)
                ]
            )
        rows = [{row: made for piece in mine for row, made in piece.result().items()} for mine in pieces]
        for shard, found, encoded in zip(self._outputs, outcomes, rows, strict=True):
            shard.add(until, found, encoded)


def _sha256_of(data: bytes | IO[bytes]) -> str:
    if isinstance(data, bytes):
        return sha256_hex(data)
    digest = sha256_of_stream(data)
    data.seek(0)
    return digest
