"""Reads what a contact sheet shows: some samples of a corpus, their labels, and what their tokens decode to.

All of it is read from the shards of one part and the tokenizers of the workspace; crop 0, the centre, stands for the
photograph.
"""

import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from engine.plan.missing import fit_order, is_judged
from engine.show import pictures
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, DecodeError, ShardError, TokenizeError
from manifests.formats import codecs, shards
from manifests.log.actions import TokenizerAdded
from manifests.modality import MODALITIES, Modality, get
from manifests.pixels import crops
from manifests.store import parquet

_ALL = crops.Crop(0.0, 0.0, 1.0, 1.0, flip=False)

Cell = np.ndarray | str | Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Card:
    """Holds one modality of one sample, as it is shown: a picture, a text, a record, or None if there is nothing to show.

    `tokens` is how many tokens the row has, None if it has no tokens.
    """

    modality: str
    label: Cell
    decoded: Cell
    tokens: int | None


@dataclass(frozen=True, kw_only=True)
class SheetSample:
    """Holds one sample with its cards, in the order of the table of modalities. `columns` are its source columns."""

    corpus: str
    key: str
    source: str
    is_judged: bool
    columns: Mapping[str, Any]
    cards: Sequence[Card]


@dataclass(frozen=True, kw_only=True)
class _Values:
    """Holds labels, tokens and decoded tokens of one sample by modality."""

    label: dict[str, Any] = field(default_factory=dict)
    token: dict[str, np.ndarray] = field(default_factory=dict)
    decoded: dict[str, Any] = field(default_factory=dict)


def samples(catalog: Catalog, corpus: str, most: int, notes: list[str]) -> list[SheetSample]:
    """Returns up to `most` samples of the corpus's fullest part: judged ones first, without those that failed.

    What cannot be read or decoded is left out and told in `notes`.
    """
    query = "SELECT part FROM shards WHERE is_current AND corpus = ? GROUP BY part ORDER BY count(*) DESC, part LIMIT 1"
    parts = catalog.sql(query, [corpus]).to_pylist()
    if not parts:
        return []
    part = parts[0]["part"]
    rows = catalog.sql(
        "SELECT * FROM samples WHERE corpus = ? AND part = ? AND source IS NOT NULL "
        "AND key NOT IN (SELECT key FROM failures WHERE corpus = ? AND key IS NOT NULL)",
        [corpus, part, corpus],
    ).to_pylist()
    chosen = sorted(rows, key=lambda row: (not is_judged(row["key"]), fit_order(row["key"])))[:most]
    rows = sorted(chosen, key=lambda row: (not is_judged(row["key"]), row["source"]))
    values = {row["key"]: _Values() for row in rows}
    _read(catalog, corpus, part, values, notes)
    return [
        SheetSample(
            corpus=corpus,
            key=row["key"],
            source=row["source"],
            is_judged=is_judged(row["key"]),
            columns={name: value for name, value in row.items() if name not in shards.RESERVED_COLUMNS},
            cards=_cards(values[row["key"]], row["key"]),
        )
        for row in rows
    ]


def modality_of(name: str) -> Modality | None:
    """Returns the modality of this name in the manifest; None if only its module knows it."""
    try:
        return get(name)
    except ConfigError:
        return None


def order_of(name: str) -> tuple[int, int, str]:
    """Returns a modality's place on the sheet: pictures, lists, records, texts, as in the table; others after those."""
    names, modality = list(MODALITIES), modality_of(name)
    base = name.partition("@")[0]
    rank = 0
    if modality is not None and modality.is_structured:
        rank = 3 if modality.kind == "text" else 1 if modality.many else 2
    return rank, names.index(base) if base in names else len(names), name


# ---- reading


def _read(catalog: Catalog, corpus: str, part: int, values: Mapping[str, _Values], notes: list[str]) -> None:
    """Fills `values` from the current shards of a part."""
    fitted = {known.digest: known for known in catalog.tokenizers()}
    current = catalog.sql(
        "SELECT s.path, s.format, s.modality, s.form, r.weights FROM shards s "
        "JOIN recipes r ON r.recipe = s.recipe AND r.modality = s.modality AND r.form = s.form "
        "WHERE s.is_current AND s.corpus = ? AND s.part = ? AND coalesce(s.crop, 0) = 0 ORDER BY s.modality, s.form",
        [corpus, part],
    )
    for shard in current.to_pylist():
        name = shard["modality"]
        try:
            rows = shard_rows(catalog, shard["path"], shard["format"], values)
            if shard["form"] == "label":
                for key, value in rows.items():
                    values[key].label[name] = codecs.decode(value) if isinstance(value, bytes) else value
            else:
                tokens = {key: _integers(value) for key, value in rows.items()}
                for key, row in tokens.items():
                    values[key].token[name] = row
                for key, label in _decode(catalog, fitted.get(shard["weights"]), name, tokens).items():
                    values[key].decoded[name] = label
        except (ConfigError, DecodeError, ShardError, TokenizeError, ImportError, OSError) as error:
            notes.append(f"{corpus}, {name} ({shard['form']}): {error}")


def shard_rows(catalog: Catalog, path: str, form: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values of a shard by key, as Parquet holds them or as the bytes of members, without rows that are not ok.

    A tar is passed over member by member, so that only these rows are in memory.
    """
    with catalog.storage.open(path) as file:
        if form == "parquet":
            table = parquet.read(file)
            chosen = [place for place, key in enumerate(table["key"].to_pylist()) if key in keys]
            found = {row.pop("key"): row for row in table.take(pa.array(chosen, pa.int64())).to_pylist()}
            value_name = "tokens" if "tokens" in table.column_names else "label"
            return {key: row[value_name] for key, row in found.items() if row["status"] == shards.Status.OK}
        members = {shards.member_name(key): key for key in keys}
        values = {}
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                stem, _, extension = info.name.partition(".")
                if stem in members and extension != "json" and (stream := tar.extractfile(info)):
                    values[members[stem]] = stream.read()
        return values


def _integers(value: Any) -> np.ndarray:
    return (codecs.decode(value) if isinstance(value, bytes) else np.asarray(value)).astype(np.int64)


def _decode(
    catalog: Catalog, known: TokenizerAdded | None, modality: str, tokens: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    if known is None:
        raise ConfigError("its tokenizer is no longer in use; `modmill run` makes new tokens")
    from tokenize_jobs import protocol

    if not tokens:
        return {}
    tokenizer = protocol.load(protocol.fetch_tokenizer(catalog.storage, known), modality)
    return dict(zip(tokens, tokenizer.decode(list(tokens.values())), strict=True))


# ---- cards


def _cards(values: _Values, key: str) -> list[Card]:
    names = sorted({*values.label, *values.token}, key=order_of)
    crop = _center(values.label, key)
    return [
        Card(
            modality=name,
            label=_cell(name, values.label, crop, like=values.decoded.get(name)),
            decoded=_cell(name, values.decoded, _ALL, like=values.label.get(name)),
            tokens=len(values.token[name]) if name in values.token else None,
        )
        for name in names
    ]


def _center(labels: Mapping[str, Any], key: str) -> crops.Crop | None:
    """Returns crop 0 of a photograph; None if no label tells the photograph's shape."""
    facts = labels.get("metadata") or {}
    width, height = facts.get("original_width"), facts.get("original_height")
    if not (width and height):
        masks = labels.get("instances") or [{}]
        width, height = masks[0].get("rle_width"), masks[0].get("rle_height")
    return crops.plan_crop(crops.CropRule(), key, 0, width, height) if width and height else None


def _cell(name: str, found: Mapping[str, Any], crop: crops.Crop | None, like: Any) -> Cell:
    """Returns a label as it is shown; `crop` is the place of the sheet's pictures in what the label is of, None if unknown."""
    value = found.get(name)
    if value is None:
        return None
    modality = modality_of(name)
    if modality is not None and modality.kind in ("feature_map", "vector"):
        return None
    if isinstance(value, np.ndarray):
        return pictures.picture(modality, value, like if isinstance(like, np.ndarray) else None)
    if isinstance(value, str):
        return value
    if modality is not None and modality.crop_rule in ("boxes", "instances"):
        return _drawn(modality, value, found, crop)
    if modality is not None and modality.base_name == "palette":
        return _palette(value, like)
    return value if isinstance(value, Mapping) else json.dumps(value, default=str, ensure_ascii=False)


def _drawn(
    modality: Modality, records: Sequence[Mapping[str, Any]], found: Mapping[str, Any], crop: crops.Crop | None
) -> np.ndarray | None:
    """Paints boxes or masks over the same form of the photograph's pixels, or over a blank if those are missing."""
    if crop is None:
        return None
    cut = records if crop is _ALL else crops.crop_label(modality, records, crop, pictures.TILE)
    pixels = found.get("rgb")
    base = pictures.fit(pixels) if isinstance(pixels, np.ndarray) else pictures.blank()
    return pictures.with_masks(base, cut) if modality.crop_rule == "instances" else pictures.with_boxes(base, cut)


def _palette(colors: Sequence[Mapping[str, Any]], like: Any) -> np.ndarray | None:
    """Returns a palette's colors; of a label, with one palette for each k, that which its tokens hold, else the largest."""
    sizes = {color["k"] for color in colors}
    wanted = like[0]["k"] if like and like[0]["k"] in sizes else max(sizes, default=0)
    chosen = sorted((color for color in colors if color["k"] == wanted), key=lambda color: color["rank"])
    return pictures.swatches(chosen) if chosen else None
