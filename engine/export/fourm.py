"""Lays rows out as the loader of 4M reads them (apple/ml-4m, fourm/data/unified_datasets.py and modality_transforms.py).

    TARGET/tok_rgb@224/shard-00000.tar     <stem>.npy     int16 (crops, N): tokens
    TARGET/crop_settings/...               <stem>.npy     int64 (crops, 5): top, left, height, width, flip, in pixels
    TARGET/caption/...                     <stem>.txt
    TARGET/det/...                         <stem>.json    {"instances": [{"boxes": [x0, y0, x1, y1], "class_name", "score"}]}
    TARGET/metadata/...                    <stem>.json    {field: number}, fields without a value left out
    TARGET/color_palette/...               <stem>.json    [{"1": [[r, g, b]], ..., "7": [...]}]
    TARGET/rgb/...                         <stem>.jpg or .png     only if asked for

Folders are aligned by shard number, order and stem. 4M validates on plain files, TARGET/<folder>/all/<stem>.npy, which
held-out rows are written as; and it reads text alone from Parquet, TARGET/train-00000.parquet (of held-out rows
validation-00000.parquet) with the column `text`. Tokens are made by the workspace's own tokenizers, whose files go along:
a model of 4M that is trained on them needs the vocabulary sizes that export.json lists.

4M takes the size of a photograph from its pixels, and needs it for det. Whole photographs (`photographs`) are read from the
source again. The pixels that a workspace keeps (`rgb@224`) are crops: then a sample is its crop 0 alone, tokens have one
row, boxes are cropped, and crop_settings covers the whole crop. What differs from 4M is in docs/4m.md.

If nulls are kept, a null row is an empty member <stem>.null in every folder that has nothing of it, at which 4M's loader
stops, and a folder `row` says in <stem>.json what is null. That is for loaders of your own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from engine.export.aligned_rows import CorpusRows, ExportColumn
from engine.export.picked_rows import Nulls
from engine.export.series import FileSeries, TarSeries, TextSeries
from engine.export.tar_writer import CorpusExport, TarFolder, TarRow
from manifests.errors import ConfigError, ShardError, nearest
from manifests.formats import codecs
from manifests.modality import DEFAULT_SIZE, MODALITIES
from manifests.pixels.crops import Crop, CropRule, crop_label, plan_crop
from manifests.pixels.images import encode_npy
from manifests.recipe import canonical_json
from tokenize_jobs.sequences import words

PIXELS = f"rgb@{DEFAULT_SIZE}"
PHOTOGRAPHS = "photographs"
# What 4M's loader drops the boxes below; those that are exported have this score.
_SCORE = 1.0
# Two tokens a field, and [EOS].
_METADATA_FIELDS = (words.FOURM_METADATA_TOKENS - 1) // 2
_INT16 = 1 << 15
Encode = Callable[[TarRow], Mapping[str, bytes]]
# The names that 4M has for ours.
_TOKENS = {"normals": "normal", "segmentation": "semseg", "edges": "canny_edge", "sam_edges": "sam_edge"}
_LABELS = {
    "boxes": "det",
    "caption": "caption",
    "text": "caption",
    "metadata": "metadata",
    "palette": "color_palette",
}
_NOT_STORED = {
    "instances": "4M stores them as pickled polygons with tokens of its own tokenizer",
    "poses": "4M stores them with tokens of its own tokenizer",
}


def fourm_folders(
    rows: CorpusRows, asked: Sequence[str] | None, nulls: Nulls, *, held_out: bool = False
) -> CorpusExport:
    """Returns the folders of a corpus in 4M's layout; `asked` are our names of modalities, or 4M's.

    Without `asked` these are the tokens of every modality of images, maps and vectors, and every kept label that 4M stores.
    `held_out` rows become plain files. Raises ConfigError for a modality that is missing, that 4M does not store, or whose
    tokens int16 cannot hold; for what 4M's loader cannot read; if crops were drawn by different rules; and if the sizes of
    the photographs are needed but not known.
    """
    there = {name: column for column in rows.columns if (name := fourm_name(column)) is not None}
    pixels = _pixel_columns(rows)
    names = list(there) if asked is None else _resolve(rows, asked, there, pixels)
    chosen = {"rgb" if name in pixels else name: (pixels | there)[name] for name in names}
    for column in chosen.values():
        if column.form == "token" and (column.vocabulary or 0) > _INT16:
            raise ConfigError(f"{column.modality.name} has {column.vocabulary:,} tokens; 4M's int16 holds {_INT16:,}")
    is_text = list(chosen) == ["caption"]
    if not is_text and not any(column.form == "token" for column in chosen.values()):
        tokens = [name for name, column in there.items() if column.form == "token"]
        raise ConfigError(
            f"4M's loader reads {', '.join(chosen) or 'nothing'} only beside tokens of images, which it takes the crops from: "
            + (f"add {' or '.join(tokens)}" if tokens else f"{rows.corpus} has none")
            + (", or name caption alone for text" if "caption" in there else "")
        )
    if nulls == "keep" and (is_text or held_out):
        raise ConfigError("--nulls keep: only tars have a place for rows without a value; leave it out")
    tokenized = list(chosen.values())
    if is_text:
        folder = TarFolder(path="validation" if held_out else "train", columns=tokenized, encode=_caption)
        return CorpusExport(rows=rows, folders=[folder], columns=chosen, tokenized=tokenized, series=TextSeries)
    folders, columns = _folders(rows, chosen)
    if nulls == "keep":
        folders.append(TarFolder(path="row", columns=(), encode=_row))
    series = FileSeries if held_out else TarSeries
    return CorpusExport(rows=rows, folders=folders, columns=columns, tokenized=tokenized, series=series)


def _folders(rows: CorpusRows, chosen: Mapping[str, ExportColumn]) -> tuple[list[TarFolder], dict[str, ExportColumn]]:
    """Returns the folders of the chosen columns with that of the crops, and the columns that rows may be null in."""
    plan = _CropPlan(rows, chosen)
    columns = {name: plan.cut(column) for name, column in chosen.items()}
    sizes = () if plan.sizes is None else (plan.sizes,)
    encoders: dict[str, Encode] = {**_ENCODERS, "det": partial(_boxes, _minimum_score(rows))}
    folders = []
    for name, column in columns.items():
        beside: Sequence[ExportColumn] = ()
        if column.form == "token":
            encode: Encode = partial(_tokens, column, plan.crops)
        elif name == "det" and plan.is_cropped:
            encode, beside = partial(_cropped_boxes, column, plan, encoders["det"]), sizes
        else:
            encode = encoders.get(name, _pixels)
        folders.append(TarFolder(path=name, columns=(column, *beside), encode=_or_null(encode)))
    folders.append(TarFolder(path="crop_settings", columns=sizes, encode=_or_null(plan.settings)))
    if plan.sizes is not None:
        columns["crop_settings"] = plan.sizes
    return folders, columns


def _pixel_columns(rows: CorpusRows) -> dict[str, ExportColumn]:
    """Returns what 4M's folder `rgb` may be made of: the kept crops, and the photographs of the source."""
    columns = [column for column in rows.columns if (column.modality.name, column.form) == ("rgb", "label")]
    found = {PIXELS: columns[0]} if columns else {}
    if rows.has_photographs:
        found[PHOTOGRAPHS] = ExportColumn(modality=MODALITIES["rgb"], form="photograph", recipe="source")
    return found


def _minimum_score(rows: CorpusRows) -> float:
    """Returns the score below which the corpus's tokenizer of boxes writes none, if there is one that has such a score."""
    boxes = next((column for column in rows.columns if column.modality.name == "boxes" and column.tokenizer), None)
    if boxes is None or boxes.tokenizer is None:
        return words.MINIMUM_SCORE
    config = json.loads(boxes.tokenizer.read(rows.catalog.storage).get("config.json", b"{}"))
    return config.get("minimum_score", words.MINIMUM_SCORE)


def fourm_name(column: ExportColumn) -> str | None:
    """Returns the folder of a column, None if 4M has no place for it."""
    modality = column.modality
    if modality.is_structured:
        return _LABELS.get(modality.name) if column.form == "label" else None
    if column.form == "label":
        return None
    size = f"@{modality.size}" if "h" in modality.axes.split() else ""
    return f"tok_{_TOKENS.get(modality.base_name, modality.base_name)}{size}"


def _resolve(
    rows: CorpusRows, asked: Sequence[str], there: Mapping[str, ExportColumn], pixels: Mapping[str, ExportColumn]
) -> list[str]:
    """Returns the folders asked for, in the order of `there`, pixels first."""
    ours = {column.modality.name: name for name, column in there.items()}
    known = {**{name: name for name in (*there, *pixels)}, **ours}
    found: set[str] = set()
    for name in asked:
        if name in known:
            found.add(known[name])
            continue
        where = f"{rows.corpus} of {rows.catalog.storage.uri}"
        if name in _NOT_STORED:
            raise ConfigError(f"modality {name!r} has no place in the 4M layout: {_NOT_STORED[name]}; leave it out")
        if name == PIXELS:
            raise ConfigError(
                f"the pixels of {where} are not kept; set `keep: true` on its rgb and run it again, or name {PHOTOGRAPHS}, "
                "which are read from the source"
            )
        forms = [column.form for column in rows.columns if column.modality.name == name]
        if forms:
            wanted = "token" if forms == ["label"] else "label"
            raise ConfigError(f"modality {name!r} of {where} has {forms[0]}s only, the 4M layout stores its {wanted}s")
        raise ConfigError(f"no modality {name!r} in {where}; {nearest(name, known)}")
    if found.issuperset((PIXELS, PHOTOGRAPHS)):
        raise ConfigError(f"{PIXELS} and {PHOTOGRAPHS} are both the folder rgb: crops, or whole photographs; name one")
    return [name for name in (*pixels, *there) if name in found]


class _CropPlan:
    """Holds how many crops a row has, and where they are; `sizes` is the column with the photographs' sizes if needed.

    If no column has crops, each row counts as one crop with settings of zeros. `is_cropped` says that pixels are crops.
    """

    def __init__(self, rows: CorpusRows, chosen: Mapping[str, ExportColumn]) -> None:
        self.is_cropped = "rgb" in chosen and chosen["rgb"].form == "label"
        cropped = [column for column in chosen.values() if column.crops is not None]
        self.crops = 1 if self.is_cropped else min((column.crops or 1 for column in cropped), default=1)
        rules = {column.rule: column.modality.name for column in cropped}
        if len(rules) > 1:
            raise ConfigError(
                f"the crops of {' and '.join(list(rules.values())[:2])} were drawn by different rules, and the 4M layout has "
                "one for all; leave one out with --modalities, or run the corpus again"
            )
        self._rule = next(iter(rules), None) or CropRule()
        self.sizes: ExportColumn | None = None
        if "det" in chosen if self.is_cropped else cropped:
            self.sizes = next((c for c in rows.columns if (c.modality.name, c.form) == ("metadata", "label")), None)
            if self.sizes is None:
                raise ConfigError(
                    f"crop_settings need the width and height of each photograph of {rows.corpus}, which labels of metadata "
                    "hold, and none are kept; add metadata to its modalities and run it again"
                )

    def cut(self, column: ExportColumn) -> ExportColumn:
        """Returns the column, limited to the crops that are exported."""
        return column if column.crops is None else replace(column, crops=self.crops)

    def settings(self, row: TarRow) -> dict[str, bytes]:
        """Returns top, left, height, width and flip of each crop, int64 (crops, 5), as the member .npy."""
        if self.is_cropped:
            settings = np.array([[0, 0, DEFAULT_SIZE, DEFAULT_SIZE, 0]], np.int64)
        elif self.sizes is None:
            settings = np.zeros((self.crops, 5), np.int64)
        else:
            settings = np.array([self._in_pixels(row.key, crop, row.value) for crop in range(self.crops)], np.int64)
        return {"npy": encode_npy(settings)}

    def crop(self, key: str, number: int, metadata: Mapping[str, Any]) -> Crop:
        """Returns a crop of the sample that has this metadata."""
        return plan_crop(self._rule, key, number, metadata["original_width"], metadata["original_height"])

    def _in_pixels(self, key: str, number: int, metadata: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
        width, height = metadata["original_width"], metadata["original_height"]
        crop = self.crop(key, number, metadata)
        top, left, bottom, right = (
            round(edge) for edge in (crop.y0 * height, crop.x0 * width, crop.y1 * height, crop.x1 * width)
        )
        return top, left, bottom - top, right - left, int(crop.flip)


def _or_null(encode: Encode) -> Encode:
    """Returns an encoder that writes the empty member `null` for a row without a value.

    4M's loader takes no such member for tokens, text or JSON: it stops there. Numbers of -1 would be data to it.
    """
    return lambda row: {"null": b""} if any(value is None for value in row.values) else encode(row)


def _tokens(column: ExportColumn, crops: int, row: TarRow) -> dict[str, bytes]:
    values = row.values[0] or []
    # A modality without crops has the same tokens in each.
    each = [values[0]] * crops if column.crops is None else values[:crops]
    return {"npy": encode_npy(np.stack(each).astype(np.int16))}


def _pixels(row: TarRow) -> dict[str, bytes]:
    if isinstance(row.value, tuple):
        suffix, data = row.value
        return {suffix: data}
    return {codecs.of_bytes(row.value).extension: row.value}


def _boxes(minimum_score: float, row: TarRow) -> dict[str, bytes]:
    """Returns the boxes that the corpus's tokenizer writes, as 4M's loader takes them.

    It drops those with a score below 0.6, and asks for no score else: each has 1.
    """
    instances = [
        {
            "boxes": [box["x0"], box["y0"], box["x1"], box["y1"]],
            "class_name": words.class_name(box["class"]),
            "score": _SCORE,
        }
        for box in words.written_boxes(row.value, minimum_score=minimum_score)
    ]
    return {"json": canonical_json({"instances": instances})}


def _cropped_boxes(column: ExportColumn, plan: _CropPlan, encode: Encode, row: TarRow) -> Mapping[str, bytes]:
    boxes, metadata = row.values
    assert boxes is not None
    assert metadata is not None
    crop = plan.crop(row.key, 0, metadata[0])
    return encode(replace(row, values=[[crop_label(column.modality, boxes[0], crop, DEFAULT_SIZE)]]))


def _caption(row: TarRow) -> dict[str, bytes]:
    # With its marks broken, as tokens are made: 4M's tokenizer would take `[EOS]` in a caption for the end.
    return {"txt": words.plain(row.value).encode()}


def _metadata(row: TarRow) -> dict[str, bytes]:
    """Returns the fields that 4M has an id for and that have a value: the first of them that its 40 tokens hold."""
    fields = {name: row.value[name] for name in words.METADATA if row.value.get(name) is not None}
    return {"json": canonical_json(dict(islice(fields.items(), _METADATA_FIELDS)))}


def _palette(row: TarRow) -> dict[str, bytes]:
    palettes: dict[str, list[list[int]]] = {}
    for color in sorted(row.value, key=lambda color: (color["k"], color["rank"])):
        if color["k"] <= words.PALETTE_MOST:
            palettes.setdefault(str(color["k"]), []).append([color["r"], color["g"], color["b"]])
    if len(palettes) < words.PALETTE_MOST:
        raise ShardError(
            f"sample {row.key} of {row.corpus} has palettes of {', '.join(palettes) or 'no'} colors; 4M's loader draws from 1 "
            f"to {words.PALETTE_MOST}: label with colors of {words.PALETTE_MOST} or more, or leave palette out"
        )
    return {"json": canonical_json([palettes])}


def _row(row: TarRow) -> dict[str, bytes]:
    document = {"corpus": row.corpus, "part": row.part, "row": row.row, "key": row.key, "status": dict(row.statuses)}
    return {"json": canonical_json(document)}


_ENCODERS: dict[str, Encode] = {
    "caption": _caption,
    "metadata": _metadata,
    "color_palette": _palette,
}
