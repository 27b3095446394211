"""Reads the rows of an export: the columns of a corpus, the rows of each part that are asked for, and their values."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from engine.export.photographs import Photographs
from engine.export.tokenizers import TokenizerFolder
from manifests import modality as modality_table
from manifests.catalog.catalog import Catalog
from manifests.errors import ShardError
from manifests.formats import codecs, shards
from manifests.formats.shards import Status
from manifests.log.actions import PartAdded
from manifests.modality import Form, Modality
from manifests.pixels.crops import CropRule
from manifests.queries import audit, recipe_choice
from manifests.snapshots.snapshot import Snapshot
from manifests.store import parquet, paths
from manifests.store.storage import Storage, read_same

_CURRENT = (
    "SELECT modality, form, recipe, max(crop) + 1 AS crops, any_value(vocabulary) AS vocabulary, "
    "max(tokens // ok) FILTER (ok > 0) AS tokens FROM shards WHERE is_current AND corpus = ? "
    "GROUP BY modality, form, recipe ORDER BY modality, form"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportColumn:
    """Describes one modality in one form, by one recipe (the first 12 digits of its fingerprint).

    `crops` is None if the grain is sample. `rule` says how crops were drawn, None if the recipe does not depend on it.
    `tokens` is how many a row has; for a sequence it says nothing of a single row. `tokenizer` made the corpus's tokens of
    this modality, of labels too; None if there are none. The form `photograph` is the whole photographs of the source.
    """

    modality: Modality
    form: Form | Literal["photograph"]
    recipe: str
    crops: int | None = None
    rule: CropRule | None = None
    vocabulary: int | None = None
    tokens: int | None = None
    tokenizer: TokenizerFolder | None = None


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """Names a shard to read; `is_whole` if its record says that every row is ok."""

    path: str
    format: str
    sha256: str
    is_whole: bool


class CorpusRows:
    """Holds the rows of a corpus that an export is asked for, and its columns.

    These are by the current recipes; if a snapshot is given, the tokens are the snapshot's.
    """

    def __init__(
        self, catalog: Catalog, corpus: str, snapshot: Snapshot | None, picked: Mapping[int, np.ndarray]
    ) -> None:
        self.catalog = catalog
        self.corpus = corpus
        self._picked = picked
        self._has_snapshot = snapshot is not None
        self._frozen: dict[int, dict[tuple[str, str, int | None], ShardFile]] = {}
        for shard in () if snapshot is None else snapshot.shards:
            if shard.corpus == corpus:
                file = ShardFile(path=shard.path, format=shard.format, sha256=shard.sha256, is_whole=False)
                self._frozen.setdefault(shard.part, {})[shard.modality, "token", shard.crop] = file
        self.columns = _columns(catalog, corpus, snapshot)
        # A log that was rebuilt from files without sidecars does not know its corpora.
        added = audit.corpora(catalog).get(corpus)
        self._added = added if added is not None and added.kind == "image" else None
        self.rows = sum(int(np.count_nonzero(picked[part])) for part in picked)

    @property
    def has_photographs(self) -> bool:
        """Tells whether the corpus is one of photographs, whose source is known."""
        return self._added is not None

    def parts(self) -> Iterator["PartRows"]:
        """Yields the parts with rows asked for, in order."""
        for part in self.catalog.parts(self.corpus):
            picked = self._picked.get(part.part)
            if picked is not None and picked.any():
                storage = self.catalog.storage
                keys = parquet.read(read_same(storage, part.path, part.sha256), ["key"])["key"].to_pylist()
                yield PartRows(
                    storage=storage,
                    number=part.part,
                    keys=keys,
                    picked=picked,
                    files=self._files(part.part),
                    open_photographs=partial(self._photographs, part, picked),
                )

    def _photographs(self, part: PartAdded, picked: np.ndarray) -> Photographs:
        if self._added is None:
            raise ValueError(f"{self.corpus} has no photographs")
        samples = shards.read_samples(read_same(self.catalog.storage, part.path, part.sha256))
        return Photographs(self.catalog.storage, self._added, samples, picked)

    def _files(self, part: int) -> dict[tuple[str, str, int | None], ShardFile]:
        found = self.catalog.sql(
            "SELECT modality, form, crop, path, format, sha256, ok = rows AS is_whole FROM shards "
            "WHERE is_current AND corpus = ? AND part = ? AND (form = 'label' OR NOT ?)",
            [self.corpus, part, self._has_snapshot],
        ).to_pylist()
        files = {(row.pop("modality"), row.pop("form"), row.pop("crop")): ShardFile(**row) for row in found}
        return files | self._frozen.get(part, {})


@dataclass(frozen=True, kw_only=True, eq=False)
class PartRows:
    """Holds a part: `keys` of its n rows, `picked` bool (n,), and its shards by modality, form and crop.

    Files are checked against the log when they are read.
    """

    storage: Storage
    number: int
    keys: list[str]
    picked: np.ndarray
    files: Mapping[tuple[str, str, int | None], ShardFile]
    open_photographs: Callable[[], Photographs]

    @cached_property
    def _photographs(self) -> Photographs:
        return self.open_photographs()

    @property
    def problems(self) -> list[str]:
        """Returns what is wrong with photographs that were asked for and cannot be had."""
        return self._photographs.problems if "_photographs" in self.__dict__ else []

    def statuses(self, column: ExportColumn) -> np.ndarray:
        """Returns uint8 (n,): the status of the first crop of each row that is not ok, or 0 if every crop is ok.

        If the shard of a part was never made, every row is NOT_SELECTED.
        """
        if column.form == "photograph":
            return self._photographs.statuses
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

    def values(self, column: ExportColumn) -> Sequence[list[Any] | None] | Photographs:
        """Returns for each row the values of its crops (one if the grain is sample), None if any of them is not ok.

        Tokens are unsigned arrays, structured labels and text are as labelers make them, pixels and maps are the bytes of a
        PNG or .npy, photographs their suffix and bytes. Besides the values, one shard is in memory at a time.
        """
        if column.form == "photograph":
            return self._photographs
        crops = [None if file is None else self._read(file, column.form) for file in self._of(column)]
        if any(crop is None for crop in crops):
            return [None] * len(self.keys)
        rows = zip(*(crop for crop in crops if crop is not None), strict=True)
        return [None if any(value is None for value in row) else list(row) for row in rows]

    def _of(self, column: ExportColumn) -> list[ShardFile | None]:
        numbers = [None] if column.crops is None else range(column.crops)
        return [self.files.get((column.modality.name, column.form, number)) for number in numbers]

    def _statuses(self, file: ShardFile) -> np.ndarray:
        try:
            with self.storage.open(file.path) as opened:
                found = shards.read_rows(file.format, opened, values=False)
        except (OSError, ShardError) as error:
            location = self.storage.location(file.path)
            raise ShardError(f"{location} cannot be read ({error}); see `modmill verify`") from error
        self._check_keys(file, found.keys)
        return np.array(found.statuses, np.uint8)

    def _read(self, file: ShardFile, form: str) -> list[Any]:
        data = read_same(self.storage, file.path, file.sha256)
        if form == "token":
            keys, values = codecs.read_tokens(file.format, data)
        else:
            found = shards.read_rows(file.format, data)
            keys, values = found.keys, found.values or []
        self._check_keys(file, keys)
        return values

    def _check_keys(self, file: ShardFile, keys: Sequence[str]) -> None:
        if keys != self.keys:
            location = self.storage.location(file.path)
            raise ShardError(f"{location}: its rows are not those of its part; see `modmill verify`")


def _columns(catalog: Catalog, corpus: str, snapshot: Snapshot | None) -> list[ExportColumn]:
    rows = catalog.sql(_CURRENT, [corpus]).to_pylist()
    tokens = [row for row in rows if row["form"] == "token"]
    if snapshot is not None:
        rows = [row for row in rows if row["form"] == "label"] + _frozen_columns(corpus, snapshot)
    declared = recipe_choice.declared(catalog)
    recipes = {fingerprint[:12]: recipe for fingerprint, recipe in catalog.recipes().items()}
    # Those of the snapshot come last, and so first of all.
    tokens += [row for row in rows if row["form"] == "token"]
    tokenizers = {row["modality"]: _tokenizer(recipes.get(row["recipe"])) for row in tokens}
    columns = []
    for row in rows:
        name = row.pop("modality")
        modality = declared.get(name) or modality_table.get(name)
        rule = _rule(recipes.get(row["recipe"], {}).get("crop"))
        columns.append(ExportColumn(modality=modality, rule=rule, tokenizer=tokenizers.get(name), **row))
    return columns


def _tokenizer(recipe: Mapping[str, Any] | None) -> TokenizerFolder | None:
    """Returns the tokenizer that a recipe of tokens tells of."""
    name, digest = (None, None) if recipe is None else (recipe["parameters"].get("tokenizer"), recipe.get("weights"))
    if name is None or digest is None:
        return None
    path = paths.tokenizer(name, digest)
    paths.check(path, paths.TOKENIZER, where="a recipe of tokens")
    return TokenizerFolder(path=path, digest=digest)


def _frozen_columns(corpus: str, snapshot: Snapshot) -> list[dict[str, Any]]:
    found = []
    for known in snapshot.modalities:
        mine = [shard for shard in snapshot.shards if (shard.corpus, shard.modality) == (corpus, known.modality)]
        if mine:
            found.append(
                {
                    "modality": known.modality,
                    "form": "token",
                    "recipe": mine[0].fingerprint[:12],
                    "crops": max((shard.crop + 1 for shard in mine if shard.crop is not None), default=None),
                    "vocabulary": known.vocabulary,
                    "tokens": known.tokens,
                }
            )
    return found


def _rule(document: Mapping[str, Any] | None) -> CropRule | None:
    """Returns the rule that a recipe's document tells of, beside the size of the crops."""
    if document is None:
        return None
    (least, most), (narrowest, widest) = document["scale"], document["ratio"]
    return CropRule(seed=document["seed"], scale=(least, most), ratio=(narrowest, widest), flip=document["flip"])
