"""Lays rows out as the loader of 4M reads them (apple/ml-4m, fourm/data/unified_datasets.py and modality_transforms.py).

    TARGET/tok_rgb@224/shard-00000.tar     <stem>.npy     int16 (crops, N): tokens
    TARGET/crop_settings/...               <stem>.npy     int64 (crops, 5): top, left, height, width, flip, in pixels
    TARGET/caption/...                     <stem>.txt
    TARGET/det/...                         <stem>.json    {"instances": [{"boxes": [x0, y0, x1, y1], "class_name", "score"}]}
    TARGET/metadata/...                    <stem>.json    {field: number}, fields without a value left out
    TARGET/color_palette/...               <stem>.json    [{"1": [[r, g, b]], ..., "7": [...]}]
    TARGET/rgb/...                         <stem>.png     only if asked for as rgb@224

Folders are aligned by shard number, order and stem. Tokens are made by the workspace's own tokenizers: a model of 4M that
is trained on them needs the vocabulary sizes that export.json lists.

Pixels are kept as crops, not whole. So with rgb@224 a sample is its crop 0 alone: tokens have one row, boxes are cropped,
and crop_settings covers the whole crop. 4M's loader takes the size of a photograph from its pixels, and needs it for det.

If nulls are kept, a null row has tokens and settings of -1, empty text and pixels, {"instances": []}, {} or [{}], so that
every folder has every row, and a folder `row` says in <stem>.json what is null. That is for loaders of your own; for 4M's
loader nulls must be dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from engine.export.aligned_rows import CorpusRows, ExportColumn
from engine.export.picked_rows import Nulls
from engine.export.tar_writer import CorpusExport, TarFolder, TarRow
from manifests.errors import ConfigError, ShardError, nearest
from manifests.formats import codecs
from manifests.modality import DEFAULT_SIZE
from manifests.pixels.crops import Crop, CropRule, crop_label, plan_crop
from manifests.pixels.images import encode_npy
from manifests.recipe import canonical_json
from tokenize_jobs.sequences.words import METADATA, PALETTE_MOST

PIXELS = f"rgb@{DEFAULT_SIZE}"
_INT16 = 1 << 15
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


def fourm_folders(rows: CorpusRows, asked: Sequence[str] | None, nulls: Nulls) -> CorpusExport:
    """Returns the folders of a corpus in 4M's layout; `asked` are our names of modalities, or 4M's.

    Without `asked` these are the tokens of every modality of images, maps and vectors, and every kept label that 4M stores.
    Raises ConfigError for a modality that is missing, that 4M does not store, or whose tokens int16 cannot hold; if crops
    were drawn by different rules; and if the sizes of the photographs are needed but not known.
    """
    there = {name: column for column in rows.columns if (name := fourm_name(column)) is not None}
    pixels = next((c for c in rows.columns if (c.modality.name, c.form) == ("rgb", "label")), None)
    names = list(there) if asked is None else _resolve(rows, asked, there, has_pixels=pixels is not None)
    chosen = {name: there[name] for name in names if name != PIXELS}
    tokens = [column for column in chosen.values() if column.form == "token"]
    for column in tokens:
        if (column.vocabulary or 0) > _INT16:
            raise ConfigError(f"{column.modality.name} has {column.vocabulary:,} tokens; 4M's int16 holds {_INT16:,}")
    if pixels is not None and PIXELS in names:
        chosen["rgb"] = pixels
    plan = _CropPlan(rows, chosen)
    columns = {name: plan.cut(column) for name, column in chosen.items()}
    sizes = () if plan.sizes is None else (plan.sizes,)
    folders = []
    for name, column in columns.items():
        if column.form == "token":
            folders.append(TarFolder(path=name, columns=(column,), encode=partial(_tokens, column, plan.crops)))
        elif name == "rgb":
            folders.append(TarFolder(path=name, columns=(column,), encode=_pixels))
        elif name == "det" and plan.with_pixels:
            folders.append(TarFolder(path=name, columns=(column, *sizes), encode=partial(_cropped_boxes, column, plan)))
        else:
            folders.append(TarFolder(path=name, columns=(column,), encode=_ENCODERS[name]))
    if tokens or plan.with_pixels:
        folders.append(TarFolder(path="crop_settings", columns=sizes, encode=plan.settings))
    if plan.sizes is not None:
        columns["crop_settings"] = plan.sizes
    if nulls == "keep":
        folders.append(TarFolder(path="row", columns=(), encode=_row))
    return CorpusExport(rows=rows, folders=folders, columns=columns)


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
    rows: CorpusRows, asked: Sequence[str], there: Mapping[str, ExportColumn], *, has_pixels: bool
) -> list[str]:
    """Returns the folders asked for, in the order of `there`, pixels first."""
    ours = {column.modality.name: name for name, column in there.items()}
    known = {**{name: name for name in there}, **ours, **({PIXELS: PIXELS} if has_pixels else {})}
    found: set[str] = set()
    for name in asked:
        if name in known:
            found.add(known[name])
            continue
        where = f"{rows.corpus} of {rows.catalog.storage.uri}"
        if name in _NOT_STORED:
            raise ConfigError(f"modality {name!r} has no place in the 4M layout: {_NOT_STORED[name]}; leave it out")
        if name == PIXELS:
            raise ConfigError(f"the pixels of {where} are not kept; set `keep: true` on its rgb and run it again")
        forms = [column.form for column in rows.columns if column.modality.name == name]
        if forms:
            wanted = "token" if forms == ["label"] else "label"
            raise ConfigError(f"modality {name!r} of {where} has {forms[0]}s only, the 4M layout stores its {wanted}s")
        raise ConfigError(f"no modality {name!r} in {where}; {nearest(name, known)}")
    return [name for name in (PIXELS, *there) if name in found]


class _CropPlan:
    """Holds how many crops a row has, and where they are; `sizes` is the column with the photographs' sizes if needed.

    If only captions or texts are exported, each row counts as one crop with settings of zeros.
    """

    def __init__(self, rows: CorpusRows, chosen: Mapping[str, ExportColumn]) -> None:
        self.with_pixels = "rgb" in chosen
        cropped = [column for column in chosen.values() if column.crops is not None]
        self.crops = 1 if self.with_pixels else min((column.crops or 1 for column in cropped), default=1)
        rules = {column.rule: column.modality.name for column in cropped}
        if len(rules) > 1:
            raise ConfigError(
                f"the crops of {' and '.join(list(rules.values())[:2])} were drawn by different rules, and the 4M layout has "
                "one for all; leave one out with --modalities, or run the corpus again"
            )
        self._rule = next(iter(rules), None) or CropRule()
        self.sizes: ExportColumn | None = None
        if "det" in chosen if self.with_pixels else cropped:
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
        if self.with_pixels:
            settings = np.array([[0, 0, DEFAULT_SIZE, DEFAULT_SIZE, 0]], np.int64)
        elif self.sizes is None:
            settings = np.zeros((self.crops, 5), np.int64)
        elif row.value is None:
            settings = np.full((self.crops, 5), -1, np.int64)
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


def _tokens(column: ExportColumn, crops: int, row: TarRow) -> dict[str, bytes]:
    values = row.values[0]
    if values is None:
        tokens = np.full((crops, column.tokens or column.modality.tokens or 0), -1, np.int16)
    else:
        # A modality without crops has the same tokens in each.
        each = [values[0]] * crops if column.crops is None else values[:crops]
        tokens = np.stack(each).astype(np.int16)
    return {"npy": encode_npy(tokens)}


def _pixels(row: TarRow) -> dict[str, bytes]:
    data = row.value or b""
    return {codecs.of_bytes(data).extension if data else "png": data}


def _boxes(row: TarRow) -> dict[str, bytes]:
    return _instances(row.value or [])


def _cropped_boxes(column: ExportColumn, plan: _CropPlan, row: TarRow) -> dict[str, bytes]:
    boxes, metadata = row.values
    if boxes is None or metadata is None:
        return _instances([])
    crop = plan.crop(row.key, 0, metadata[0])
    return _instances(crop_label(column.modality, boxes[0], crop, DEFAULT_SIZE))


def _instances(boxes: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Returns boxes as 4M's loader takes them. It drops those with a score below 0.6, so an unknown score becomes 1."""
    instances = [
        {
            "boxes": [box["x0"], box["y0"], box["x1"], box["y1"]],
            "class_name": box["class"],
            "score": 1.0 if box["score"] is None else box["score"],
        }
        for box in boxes
    ]
    return {"json": canonical_json({"instances": instances})}


def _caption(row: TarRow) -> dict[str, bytes]:
    return {"txt": (row.value or "").encode()}


def _metadata(row: TarRow) -> dict[str, bytes]:
    """Returns the fields that 4M has an id for and that have a value."""
    record = row.value or {}
    return {"json": canonical_json({name: record[name] for name in METADATA if record.get(name) is not None})}


def _palette(row: TarRow) -> dict[str, bytes]:
    if row.value is None:
        return {"json": b"[{}]"}
    palettes: dict[str, list[list[int]]] = {}
    for color in sorted(row.value, key=lambda color: (color["k"], color["rank"])):
        if color["k"] <= PALETTE_MOST:
            palettes.setdefault(str(color["k"]), []).append([color["r"], color["g"], color["b"]])
    if len(palettes) < PALETTE_MOST:
        raise ShardError(
            f"sample {row.key} of {row.corpus} has palettes of {', '.join(palettes) or 'no'} colors; 4M's loader draws from 1 "
            f"to {PALETTE_MOST}: label with colors of {PALETTE_MOST} or more, or leave palette out"
        )
    return {"json": canonical_json([palettes])}


def _row(row: TarRow) -> dict[str, bytes]:
    document = {"corpus": row.corpus, "part": row.part, "row": row.row, "key": row.key, "status": dict(row.statuses)}
    return {"json": canonical_json(document)}


_ENCODERS: dict[str, Callable[[TarRow], dict[str, bytes]]] = {
    "det": _boxes,
    "caption": _caption,
    "metadata": _metadata,
    "color_palette": _palette,
}
