"""Compares the values of a shard with the shape, dtype and range of its modality (`modmill verify --deep`)."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.upkeep.verify_shard import ReadShard
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, ModmillError, ShardError
from manifests.formats import codecs
from manifests.formats.shards import Status
from manifests.log.actions import TokenizerAdded
from manifests.modality import Modality, get
from manifests.queries import audit
from tokenize_jobs import protocol

_SLACK = 1e-3  # how far rounded numbers may be over their range
_CORNERS = ("x0", "y0", "x1", "y1")


class DeepCheck:
    """Checks values of shards, shard by shard from any thread; `notes` says what could not be checked."""

    def __init__(self, catalog: Catalog) -> None:
        self.notes: set[str] = set()
        self._storage = catalog.storage
        by_digest = {tokenizer.digest: tokenizer for tokenizer in audit.tokenizers(catalog)}
        # By the fingerprint of the recipe of the tokens.
        self._tokenizers = {
            fingerprint: by_digest[recipe["weights"]]
            for fingerprint, recipe in catalog.recipes().items()
            if recipe.get("weights") in by_digest
        }
        self._loaded: dict[tuple[str, str], protocol.Tokenizer | None] = {}
        self._lock = threading.Lock()

    def check(self, read: ReadShard) -> None:
        """Raises ShardError if a value is not one of its modality."""
        shard = read.shard
        try:
            modality = get(shard.modality)
        except ConfigError:
            self.notes.add(f"{shard.modality} is no modality of this modmill: its values were not looked at")
            return
        if shard.form == "token":
            self._check_tokens(read)
        elif read.values is not None:
            _check_table(modality, read.values)
        else:
            for row, data in enumerate(read.rows.values or []):
                if data is not None:
                    _check_member(modality, row, data)

    def _check_tokens(self, read: ReadShard) -> None:
        """Decodes the first, the middle and the last row of tokens; those of a tar are all checked against the vocabulary."""
        vocabulary = read.shard.vocabulary
        decoded: dict[int, np.ndarray] = {}
        for row, data in enumerate(read.rows.values or []):
            if data is not None:
                tokens = decoded[row] = _decoded(row, data)
                is_over = bool(vocabulary) and tokens.max(initial=0) >= vocabulary
                if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or is_over:
                    raise ShardError(f"row {row} holds no tokens under its vocabulary of {vocabulary}")
        ok = [row for row, status in enumerate(read.rows.statuses) if status == Status.OK]
        tokenizer = self._tokenizer(read) if ok else None
        if tokenizer is None:
            return
        for row in sorted({ok[0], ok[len(ok) // 2], ok[-1]}):
            value = decoded[row] if read.values is None else np.array(read.values[row].as_py())
            try:
                with self._lock:
                    tokenizer.decode([value.astype(np.int64)])
            except (ModmillError, ValueError, IndexError) as error:
                raise ShardError(f"the tokens of row {row} cannot be decoded: {error}") from error

    def _tokenizer(self, read: ReadShard) -> protocol.Tokenizer | None:
        modality = read.shard.modality
        known = self._tokenizers.get(read.shard.fingerprint)
        if known is None:
            self.notes.add(f"the log names no tokenizer of some tokens of {modality}: they were not decoded")
            return None
        with self._lock:
            if (known.digest, modality) not in self._loaded:
                self._loaded[known.digest, modality] = self._load(known, modality)
            return self._loaded[known.digest, modality]

    def _load(self, known: TokenizerAdded, modality: str) -> protocol.Tokenizer | None:
        try:
            return protocol.load(protocol.fetch_tokenizer(self._storage, known), modality)
        except ImportError as error:
            self.notes.add(f"tokens of {modality} were not decoded: {error}; install modmill[label]")
        except (ModmillError, OSError, ValueError, KeyError) as error:
            self.notes.add(f"tokens of {modality} were not decoded: {known.path} cannot be loaded ({error})")
        return None


def _decoded(row: int, data: bytes) -> np.ndarray:
    try:
        return codecs.decode(data)
    except ModmillError as error:
        raise ShardError(f"the value of row {row} cannot be decoded: {error}") from error


def _check_member(modality: Modality, row: int, data: bytes) -> None:
    array = _decoded(row, data)
    if modality.dtype and array.dtype != np.dtype(modality.dtype):
        raise ShardError(f"row {row} is {array.dtype}, {modality.name} is {modality.dtype}")
    _check_array(modality, f"row {row}", array)


def _check_array(modality: Modality, where: str, array: np.ndarray) -> None:
    """Raises ShardError if an array of labels of one row has not the shape (if that is fixed) or the range of its modality."""
    shape = modality.shape()
    is_fixed = modality.label_grain == "crop" or "h" not in modality.axes.split()
    if array.shape != shape if is_fixed else array.ndim != len(shape):
        raise ShardError(f"{where} has shape {array.shape}, {modality.name} has ({modality.axes}) = {shape}")
    _check_range(modality, where, array)


def _check_range(modality: Modality, where: str, array: np.ndarray) -> None:
    present = array
    if modality.null is not None:
        present = array[~np.isnan(array)] if np.isnan(modality.null) else array[array != modality.null]
    lowest, highest = modality.range or (-np.inf, np.inf)
    slack = _SLACK if array.dtype.kind == "f" else 0
    # Written so that NaN is out of range too.
    if present.size and not (present.min() >= lowest - slack and present.max() <= highest + slack):
        raise ShardError(
            f"{where} holds numbers from {present.min()} to {present.max()}, {modality.name} has {lowest} to {highest}"
        )


def _check_table(modality: Modality, values: pa.Array) -> None:
    """Raises ShardError if a column of labels is not of its modality: records and vectors in range, valid text."""
    if modality.kind == "text":
        values.validate(full=True)
        return
    if not modality.is_structured:
        for row, value in enumerate(values):
            if value.is_valid:
                _check_array(modality, f"row {row}", np.asarray(value.as_py(), np.float32))
        return
    records = values.drop_null()
    if modality.many:
        records = records.flatten()
    _check_records(modality, records)


def _check_records(modality: Modality, records: pa.Array) -> None:
    fields = {name: records.field(name) for name in modality.fields} if len(records) else {}
    if set(_CORNERS) <= fields.keys():
        x0, y0, x1, y1 = (np.asarray(fields[name].to_numpy(zero_copy_only=False), np.float64) for name in _CORNERS)
        _check_range(modality, "a box", np.concatenate([x0, y0, x1, y1]))
        if (x0 > x1).any() or (y0 > y1).any():
            raise ShardError("a box ends before it begins: x0 > x1 or y0 > y1")
    if "share" in fields:
        share = pc.call_function("min_max", [fields["share"]]).as_py()
        if not (share["min"] >= 0 and share["max"] <= 1 + _SLACK):
            raise ShardError(f"a share is {share['min']} or {share['max']}, expected 0 to 1")
    if "rle_counts" in fields:
        _check_masks(records)


def _check_masks(records: pa.Array) -> None:
    for record in records.to_pylist():
        if sum(record["rle_counts"]) != record["rle_height"] * record["rle_width"]:
            raise ShardError("the run lengths of a mask do not add up to its height x width")
