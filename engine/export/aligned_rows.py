"""The rows of an export: the columns that a corpus has, the rows of each part that are asked for, and their values."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from manifests import modality as modality_table
from manifests.catalog.catalog import Catalog
from manifests.errors import ShardError
from manifests.formats import shards
from manifests.formats.shards import Status
from manifests.modality import Form, Modality
from manifests.pixels.crops import CropRule
from manifests.queries import recipe_choice
from manifests.snapshots.snapshot import Snapshot
from manifests.store import parquet
from manifests.store.storage import Storage, read_same

_CURRENT = (
    "SELECT modality, form, recipe, max(crop) + 1 AS crops, any_value(vocabulary) AS vocabulary, "
    "max(tokens // ok) FILTER (ok > 0) AS tokens FROM shards WHERE is_current AND corpus = ? "
    "GROUP BY modality, form, recipe ORDER BY modality, form"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportColumn:
    """One modality in one form, by one recipe (its first 12 digits).

    `crops` is None if the grain is sample; `rule` says how crops were drawn, where the recipe depends on it; `tokens`
    is how many a row has, for a sequence any number of them.
    """

    modality: Modality
    form: Form
    recipe: str
    crops: int | None
    rule: CropRule | None
    vocabulary: int | None
    tokens: int | None


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One shard to read; `is_whole` where the record says that every row is ok."""

    path: str
    format: str
    sha256: str
    is_whole: bool


class CorpusRows:
    """The rows of one corpus that an export is asked for, and its columns: current ones, tokens of the snapshot if given."""

    def __init__(
        self, catalog: Catalog, corpus: str, snapshot: Snapshot | None, picked: Mapping[int, np.ndarray]
    ) -> None:
        self.catalog = catalog
        self.corpus = corpus
        self._picked = picked
        self._frozen: dict[int, dict[tuple[str, str, int | None], ShardFile]] | None = None
        if snapshot is not None:
            self._frozen = {}
            for shard in snapshot.shards:
                if shard.corpus == corpus:
                    file = ShardFile(path=shard.path, format=shard.format, sha256=shard.sha256, is_whole=False)
                    self._frozen.setdefault(shard.part, {})[shard.modality, "token", shard.crop] = file
        self.columns = _columns(catalog, corpus, snapshot)
        self.rows = sum(int(np.count_nonzero(picked[part])) for part in picked)

    def parts(self) -> Iterator["PartRows"]:
        """Yields the parts with rows asked for, in order."""
        for part in self.catalog.parts(self.corpus):
            picked = self._picked.get(part.part)
            if picked is not None and picked.any():
                keys = _keys(self.catalog.storage, part.path, part.sha256)
                yield PartRows(self.catalog.storage, part.part, keys, picked, self._files(part.part))

    def _files(self, part: int) -> dict[tuple[str, str, int | None], ShardFile]:
        found = self.catalog.sql(
            "SELECT modality, form, crop, path, format, sha256, ok = rows AS is_whole FROM shards "
            "WHERE is_current AND corpus = ? AND part = ?",
            [self.corpus, part],
        ).to_pylist()
        files = {
            (row["modality"], row["form"], row["crop"]): ShardFile(
                path=row["path"], format=row["format"], sha256=row["sha256"], is_whole=row["is_whole"]
            )
            for row in found
        }
        if self._frozen is None:
            return files
        labels = {identity: file for identity, file in files.items() if identity[1] == "label"}
        return {**labels, **self._frozen.get(part, {})}


class PartRows:
    """One part: `keys` of its n rows, `picked` bool (n,), and what its shards hold. Files are checked against the log."""

    def __init__(
        self,
        storage: Storage,
        number: int,
        keys: list[str],
        picked: np.ndarray,
        files: Mapping[tuple[str, str, int | None], ShardFile],
    ) -> None:
        self.number, self.keys, self.picked = number, keys, picked
        self._storage = storage
        self._files = files

    def statuses(self, column: ExportColumn) -> np.ndarray:
        """uint8 (n,): 0 where the row is ok in every crop, else the status of the first crop that is not.

        A part whose shard was never made has NOT_SELECTED in every row.
        """
        found = np.zeros(len(self.keys), np.uint8)
        for file in self._of(column):
            if file is None:
                statuses = np.full(len(self.keys), Status.NOT_SELECTED, np.uint8)
            elif file.is_whole:
                continue
            else:
                statuses = self._statuses(file)
            found = np.where(found == Status.OK, statuses, found)
        return found

    def values(self, column: ExportColumn) -> list[list[Any] | None]:
        """For each row the values of its crops (one, where the grain is sample), None if any of them is not ok.

        Tokens are unsigned arrays, structured labels and text what labelers made, pixels and maps the bytes of a PNG or
        .npy. One shard is in memory at a time, besides the values.
        """
        crops = [None if file is None else self._read(file, column.form) for file in self._of(column)]
        if any(crop is None for crop in crops):
            return [None] * len(self.keys)
        rows = zip(*(crop for crop in crops if crop is not None), strict=True)
        return [None if any(value is None for value in row) else list(row) for row in rows]

    def _of(self, column: ExportColumn) -> list[ShardFile | None]:
        numbers = [None] if column.crops is None else range(column.crops)
        return [self._files.get((column.modality.name, column.form, number)) for number in numbers]

    def _statuses(self, file: ShardFile) -> np.ndarray:
        try:
            with self._storage.open(file.path) as opened:
                found = (
                    shards.read_parquet(opened, values=False) if file.format == "parquet" else shards.read_tar(opened)
                )
        except (OSError, ShardError) as error:
            raise ShardError(
                f"{self._storage.location(file.path)} cannot be read ({error}); see `modmill verify`"
            ) from error
        self._check_keys(file, found.keys)
        return np.array(found.statuses, np.uint8)

    def _read(self, file: ShardFile, form: Form) -> list[Any]:
        data = read_same(self._storage, file.path, file.sha256)
        if form == "token" and file.format == "parquet":
            keys, values = _token_arrays(data)
        else:
            read = shards.read_parquet if file.format == "parquet" else shards.read_tar
            found = read(io.BytesIO(data))
            keys, values = found.keys, found.values or []
            if form == "token":
                from manifests.formats import codecs

                values = [None if value is None else codecs.decode(value) for value in values]
        self._check_keys(file, keys)
        return values

    def _check_keys(self, file: ShardFile, keys: Sequence[str]) -> None:
        if keys != self.keys:
            raise ShardError(
                f"{self._storage.location(file.path)}: its rows are not those of its part; see `modmill verify`"
            )


def _columns(catalog: Catalog, corpus: str, snapshot: Snapshot | None) -> list[ExportColumn]:
    rows = catalog.sql(_CURRENT, [corpus]).to_pylist()
    if snapshot is not None:
        rows = [row for row in rows if row["form"] == "label"] + _frozen_columns(corpus, snapshot)
    declared = recipe_choice.declared(catalog)
    rules = {
        (row["modality"], row["form"], row["recipe"]): _rule(row["crop"])
        for row in catalog.sql("SELECT modality, form, recipe, crop FROM recipes").to_pylist()
    }
    return [
        ExportColumn(
            modality=declared.get(row["modality"]) or modality_table.get(row["modality"]),
            form=row["form"],
            recipe=row["recipe"],
            crops=row["crops"],
            rule=rules.get((row["modality"], row["form"], row["recipe"])),
            vocabulary=row["vocabulary"],
            tokens=row["tokens"],
        )
        for row in rows
    ]


def _frozen_columns(corpus: str, snapshot: Snapshot) -> list[dict[str, Any]]:
    found = []
    for known in snapshot.modalities:
        mine = [shard for shard in snapshot.shards if (shard.corpus, shard.modality) == (corpus, known.modality)]
        if mine:
            crops = [shard.crop + 1 for shard in mine if shard.crop is not None]
            found.append(
                {
                    "modality": known.modality,
                    "form": "token",
                    "recipe": mine[0].fingerprint[:12],
                    "crops": max(crops) if crops else None,
                    "vocabulary": known.vocabulary,
                    "tokens": known.tokens,
                }
            )
    return found


def _rule(text: str | None) -> CropRule | None:
    """Returns the crop rule in a recipe's document."""
    document = json.loads(text) if text else None
    if document is None:
        return None
    return CropRule(
        seed=document["seed"],
        scale=(document["scale"][0], document["scale"][1]),
        ratio=(document["ratio"][0], document["ratio"][1]),
        flip=document["flip"],
    )


def _keys(storage: Storage, path: str, sha256: str) -> list[str]:
    return parquet.read(read_same(storage, path, sha256), ["key"])["key"].to_pylist()


def _token_arrays(data: bytes) -> tuple[list[str], list[Any]]:
    """Keys and tokens of a Parquet shard, each row's as a view of one array."""
    try:
        table = parquet.read(data, ["key", "status", "tokens"]).combine_chunks()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ShardError(f"no Parquet shard of tokens: {error}") from error
    if not table.num_rows:
        return [], []
    lists = table["tokens"].chunk(0)
    offsets, flat = lists.offsets.to_numpy(), lists.values.to_numpy()
    is_ok = table["status"].to_numpy() == Status.OK
    values = [flat[offsets[row] : offsets[row + 1]] if is_ok[row] else None for row in range(table.num_rows)]
    return table["key"].to_pylist(), values
