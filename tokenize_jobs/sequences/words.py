"""Writes boxes, metadata and palettes as strings of words that a text tokenizer holds, and parses them.

The formats are 4M's (apple/ml-4m, fourm/data/modality_transforms.py), so that its models read our sequences. Values are
written `v0=5`: four families `v0=` to `v3=` of 1,000 values each.

    boxes     v0=<x0> v1=<y0> v2=<x1> v3=<y1> <class>    a record for each box, nearest to the top left corner first
    metadata  v1=<type id> v0=<bin>                      a record for each field that has a value, by ascending type id
    palette   v1=<k> v0=<r> v0=<g> v0=<b> ...            one record of k colors

A writer returns the list of records (a sequence is cut between records, never inside one); joined by single spaces they
are the sequence. A parser takes any string, keeps what is well formed, skips the rest and never raises, since models emit
anything. Facts that a sequence does not hold (scores, shares, missing fields) come back as None.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from manifests.errors import TokenizeError, nearest
from manifests.recipe import canonical_json, sha256_hex

VALUE_FAMILIES = 4
BINS = 1000

# The ordinary words in 4M's formats (persons, SAM instances, "no person"), and the class of boxes from a segmenter without
# classes. A tokenizer that is fitted here holds each of them as one piece.
FORMAT_WORDS = ("human", "global", "pose", "shape", "camera", "none", "point", "polygon", "region")

# COCO's 80 things in the order of 4M's token ids.
# fmt: off
COCO_CLASSES: tuple[str, ...] = (
    "airplane", "apple", "backpack", "banana", "baseball bat", "baseball glove", "bear", "bed", "bench", "bicycle",
    "bird", "boat", "book", "bottle", "bowl", "broccoli", "bus", "cake", "car", "carrot", "cat", "cell phone", "chair",
    "clock", "couch", "cow", "cup", "dining table", "dog", "donut", "elephant", "fire hydrant", "fork", "frisbee",
    "giraffe", "hair drier", "handbag", "horse", "hot dog", "keyboard", "kite", "knife", "laptop", "microwave",
    "motorcycle", "mouse", "orange", "oven", "parking meter", "person", "pizza", "potted plant", "refrigerator",
    "remote", "sandwich", "scissors", "sheep", "sink", "skateboard", "skis", "snowboard", "spoon", "sports ball",
    "stop sign", "suitcase", "surfboard", "teddy bear", "tennis racket", "tie", "toaster", "toilet", "toothbrush",
    "traffic light", "train", "truck", "tv", "umbrella", "vase", "wine glass", "zebra",
)
# fmt: on

# Boxes with a lower score are not written. 4M drops detections below 0.6. A score means something else for every labeler
# (for `segments` it is the share of the box that the region fills), so the default drops nothing.
MINIMUM_SCORE = 0.0
FOURM_MINIMUM_SCORE = 0.6

PALETTE_MOST = 7
# The most tokens of metadata, with [EOS], that 4M's models have places for. All fields are two tokens each, and would be 43.
FOURM_METADATA_TOKENS = 40

_MARK = re.compile(r"\[(?=(?:PAD|UNK|SOS|EOS|S_[0-9]+)\])|v[0-3](?==[0-9])")
_BOX = re.compile(
    r"(?<!\S)v0=([0-9]{1,3}) v1=([0-9]{1,3}) v2=([0-9]{1,3}) v3=([0-9]{1,3}) (?!v[0-3]=)(.+?)(?= v[0-3]=|\Z)", re.DOTALL
)
_METADATA = re.compile(r"(?<!\S)v1=([0-9]{1,3}) v0=([0-9]{1,3})(?!\S)")
_PALETTE = re.compile(r"(?<!\S)v1=([1-7])((?: v0=[0-9]{1,3})+)(?!\S)")


def plain(text: str) -> str:
    """Breaks every mark of a format (`[EOS]`, `[S_3]`, `v0=5`) in `text` by a space.

    Text comes from strangers: a caption must not be able to end its own sequence or to pose as a coordinate. BERT's
    pre-tokenizer splits at these places anyway, so the pieces are those of the ordinary characters.
    """
    return _MARK.sub(r"\g<0> ", text)


# ---- boxes


def box_records(boxes: Iterable[Mapping[str, Any]], *, minimum_score: float = MINIMUM_SCORE) -> list[str]:
    """Returns the records of one crop's boxes, ordered by the squared distance of their top left corner to the crop's.

    A box is a mapping with `class`, `score` (None if unknown: such a box is kept) and `x0 y0 x1 y1` as fractions of the
    crop, clamped to 0..1 and written as round(999 x). Equal distances are ordered by y0, x0, y1, x1 and class.
    Raises TokenizeError if a class is empty, or if a corner is NaN or on the wrong side of the other.
    """
    kept = [_corners(box) for box in written_boxes(boxes, minimum_score=minimum_score)]
    kept.sort(key=lambda box: (box[0] ** 2 + box[1] ** 2, box[1], box[0], box[3], box[2], box[4]))
    return [
        " ".join([*(f"v{i}={round(coordinate * (BINS - 1))}" for i, coordinate in enumerate(corners)), name])
        for *corners, name in kept
    ]


def _is_below(score: float | None, minimum: float) -> bool:
    return score is not None and _as_stored(score) < _as_stored(minimum)


def _corners(box: Mapping[str, Any]) -> tuple[float, float, float, float, str]:
    x0, y0, x1, y1 = (min(max(_as_stored(box[side]), 0.0), 1.0) for side in ("x0", "y0", "x1", "y1"))
    if not (x0 <= x1 and y0 <= y1):
        sides = {side: box[side] for side in ("x0", "y0", "x1", "y1")}
        raise TokenizeError(f"box {sides}: expected numbers with x0 <= x1 and y0 <= y1; see its labeler")
    name = class_name(box["class"])
    if not name:
        raise TokenizeError(f"box with class {box['class']!r}: expected a name; see its labeler")
    return x0, y0, x1, y1, name


def class_name(name: str | None) -> str:
    """Returns a class as its record has it: marks broken, single spaces."""
    return " ".join(plain(name or "").split())


def written_boxes(boxes: Iterable[Mapping[str, Any]], *, minimum_score: float) -> list[Mapping[str, Any]]:
    """Returns the boxes that records are written of."""
    return [box for box in boxes if not _is_below(box.get("score"), minimum_score)]


def parse_boxes(text: str) -> list[dict[str, Any]]:
    """Returns the boxes of a sequence: `class`, `score` None, and corners within 0.5/999 of the written ones.

    Skips a box without four coordinates in order, without a class, or with a corner on the wrong side of the other.
    """
    boxes = []
    for *values, name in _BOX.findall(text):
        x0, y0, x1, y1 = (int(value) / (BINS - 1) for value in values)
        if x0 <= x1 and y0 <= y1 and name.strip():
            boxes.append({"class": name.strip(), "score": None, "x0": x0, "y0": y0, "x1": x1, "y1": y1})
    return boxes


# ---- metadata


@dataclass(frozen=True, kw_only=True)
class MetadataField:
    """Turns one field of the metadata into a bin and back.

    type_id  4M's number of the field, never reused
    rule     `count`: the integer itself, up to 999; `pixels`: 32 px a bin; `scale`: 50 bins over low..high, the last
             for `high` alone; `edges`: the number of edges that the value reaches
    low, high, edges  in the field's own unit
    """

    type_id: int
    rule: Literal["count", "pixels", "scale", "edges"]
    low: float = 0.0
    high: float = 0.0
    edges: tuple[float, ...] = ()

    @property
    def bins(self) -> int:
        """Returns the number of bins."""
        return {"count": BINS, "pixels": BINS, "scale": _SCALE_BINS, "edges": len(self.edges) + 1}[self.rule]

    def to_bin(self, value: float) -> int:
        """Returns the bin of a value, which is clamped to the field's range and must not be NaN."""
        if self.rule == "count":
            return int(min(max(value, 0), BINS - 1))
        if self.rule == "pixels":
            return int(min(max(value, 0), BINS * _PIXELS_A_BIN - 1)) // _PIXELS_A_BIN
        if self.rule == "edges":
            return sum(_as_stored(value) >= edge for edge in self.edges)
        clamped = min(max(_as_stored(value), self.low), self.high)
        return int((clamped - self.low) / (self.high - self.low) * (_SCALE_BINS - 1))

    def to_value(self, index: int) -> float | int:
        """Returns the middle of a bin (for a count the count itself), which `to_bin` maps to that bin again.

        4M's decoder takes the lower edge of 32 px bins, and divides scales by 50 although its encoder multiplies by 49:
        its values are low by up to two bins. The middle has no bias.
        """
        if self.rule == "count":
            return index
        if self.rule == "pixels":
            return index * _PIXELS_A_BIN + _PIXELS_A_BIN // 2
        if self.rule == "edges":
            sides = (self.low, *self.edges, self.high)
            return (sides[index] + sides[index + 1]) / 2
        return self.low + min((index + 0.5) / (_SCALE_BINS - 1), 1.0) * (self.high - self.low)


_SCALE_BINS = 50
_PIXELS_A_BIN = 32

# All of 4M-21's fields; the modality `metadata` has those that need no model. For the last two 4M states edges only; their
# low and high are the range of the scores themselves, and are used for the middle of a bin only.
METADATA: dict[str, MetadataField] = {
    "original_width": MetadataField(type_id=0, rule="pixels"),
    "original_height": MetadataField(type_id=1, rule="pixels"),
    "caption_n_chars": MetadataField(type_id=2, rule="count"),
    "caption_n_words": MetadataField(type_id=3, rule="count"),
    "caption_n_sentences": MetadataField(type_id=4, rule="count"),
    "n_humans": MetadataField(type_id=5, rule="count"),
    "n_sam_instances": MetadataField(type_id=6, rule="count"),
    "n_coco_instances": MetadataField(type_id=7, rule="count"),
    "coco_instance_diversity": MetadataField(type_id=8, rule="count"),
    "colorfulness": MetadataField(type_id=9, rule="scale", high=150),
    "brightness": MetadataField(type_id=10, rule="scale", high=255),
    "contrast": MetadataField(type_id=11, rule="scale", high=127),
    "saturation": MetadataField(type_id=12, rule="scale", high=255),
    "entropy": MetadataField(type_id=13, rule="scale", high=10),
    "walkability": MetadataField(type_id=14, rule="scale", high=1),
    "objectness": MetadataField(type_id=15, rule="scale", high=1),
    "semantic_diversity": MetadataField(type_id=16, rule="count"),
    "geometric_complexity": MetadataField(type_id=17, rule="scale", high=0.75),
    "occlusion_score": MetadataField(type_id=18, rule="scale", high=0.25),
    "watermark_score": MetadataField(type_id=19, rule="edges", high=1, edges=(0.5,)),
    "aesthetic_score": MetadataField(type_id=20, rule="edges", low=1, high=10, edges=(4.5, 5.5)),
}
_METADATA_NAMES = {field.type_id: name for name, field in METADATA.items()}


def metadata_records(fields: Mapping[str, float | int | None]) -> list[str]:
    """Returns the records of one sample's metadata, by ascending type id (4M shuffles them when it loads a sample).

    A field that is None is not written. Raises TokenizeError if a field is not in `METADATA`, or is NaN.
    """
    for name, value in fields.items():
        if value is not None and name not in METADATA:
            raise TokenizeError(f"metadata field {name!r} has no type id; {nearest(name, METADATA)}")
        if value is not None and math.isnan(value):
            raise TokenizeError(f"metadata field {name!r} is NaN; expected a number, or None if it is unknown")
    return [
        f"v1={field.type_id} v0={field.to_bin(value)}"
        for name, field in METADATA.items()
        if (value := fields.get(name)) is not None
    ]


def parse_metadata(text: str) -> dict[str, float | int]:
    """Returns the fields of a sequence, in its order, each as the middle of its bin; of equal fields the first.

    Skips pairs whose type id or bin does not exist.
    """
    found: dict[str, float | int] = {}
    for type_id, index in _METADATA.findall(text):
        name = _METADATA_NAMES.get(int(type_id))
        if name is not None and name not in found and int(index) < METADATA[name].bins:
            found[name] = METADATA[name].to_value(int(index))
    return found


# ---- palette


def palette_size(colors: Sequence[Mapping[str, Any]]) -> int:
    """Decides which of a sample's palettes is written: the k of one of them, 1..7 (larger ones have no format).

    4M draws k each time it loads a sample; a row of ours holds one. A hash of the colors draws it (the sha256 of all
    k, rank, r, g, b, as a number, modulo the number of palettes), so that it is the same in every run and evenly spread
    over a corpus. `share` is left out of the hash: a float may change in its last bits when it is stored. Raises
    TokenizeError if no palette has 1..7 colors.
    """
    canonical = sorted([int(color[name]) for name in ("k", "rank", "r", "g", "b")] for color in colors)
    sizes = sorted({k for k, *_ in canonical if 1 <= k <= PALETTE_MOST})
    if not sizes:
        raise TokenizeError(f"palettes of k={sorted({k for k, *_ in canonical})}; expected one of 1..{PALETTE_MOST}")
    return sizes[int(sha256_hex(canonical_json(canonical)), 16) % len(sizes)]


def palette_records(colors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the record of one sample's palette as a list (empty if it has no colors).

    `colors` are all its palettes, flat: mappings with `k` (how many colors the palette has), `rank` (the color's place in
    it) and `r g b`, 0..255. Raises TokenizeError if the chosen palette does not have k colors, or a value is out of range.
    """
    if not colors:
        return []
    k = palette_size(colors)
    chosen = sorted((color for color in colors if int(color["k"]) == k), key=lambda color: int(color["rank"]))
    values = [int(color[channel]) for color in chosen for channel in ("r", "g", "b")]
    if len(chosen) != k or not all(0 <= value <= 255 for value in values):
        raise TokenizeError(
            f"palette of k={k} has {len(chosen)} colors, values {values}; "
            "expected k colors and values of 0..255; see its labeler"
        )
    return [" ".join([f"v1={k}", *(f"v0={value}" for value in values)])]


def parse_palette(text: str) -> list[dict[str, Any]]:
    """Returns the first well-formed palette of a sequence: `k`, `rank` from 0, `r g b`, `share` None. Empty if none is."""
    for k, run in _PALETTE.findall(text):
        values = [int(word.removeprefix("v0=")) for word in run.split()]
        if len(values) == 3 * int(k) and max(values) <= 255:
            return [
                {"k": int(k), "rank": rank, "r": r, "g": g, "b": b, "share": None}
                for rank, (r, g, b) in enumerate(zip(values[0::3], values[1::3], values[2::3], strict=True))
            ]
    return []


def _as_stored(value: float) -> float:
    # Stored labels are float32: rounded here too, a label gives the same tokens whether or not it was stored before.
    return float(np.float32(value))
