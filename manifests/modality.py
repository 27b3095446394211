"""Defines the table of modalities: facts only, no arrays, no models.

A modality is one kind of content. It comes in two forms, `label` and `token`, each with a grain: `sample` (one value
a photograph) or `crop` (one value a crop of it). To add one, add a row to `MODALITIES`, or declare it in a module of
your own and name it `my_module:MODALITY` in the pipeline file.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from manifests.errors import ConfigError, nearest

Kind = Literal["image", "feature_map", "vector", "structured", "text"]
Grain = Literal["sample", "crop"]
Form = Literal["label", "token"]
# How a label of a whole photograph becomes the label of a crop (`manifests/pixels/crops.py` holds the code):
# `pixels` area resampling, `linear`, `nearest` maps, `normals` nearest and x mirrored under a flip,
# `boxes` clipped, `instances` clipped and re-rasterized, `whole` the crop changes nothing.
CropLabelRule = Literal["pixels", "linear", "nearest", "normals", "boxes", "instances", "whole"]

DEFAULT_SIZE = 224


@dataclass(frozen=True, kw_only=True)
class Modality:
    """Describes one kind of content.

    `axes` and `dtype` describe one row's label array ("h w c", "uint8"). `fields` are the columns of a structured label,
    name to Arrow type; `many` says that a row holds a list of such records. `null` is the marker inside a label
    array that means "no value here" (a pixel without depth). A row without any label has a null and a `status`.
    `tokenizer` is the family that encodes it (empty: none), `labeler` the one that makes it if the pipeline file names none.
    `tokens` is how many tokens a row has at the default size, for a sequence the most it may have (None: no limit).
    `stride` is how many pixels of a crop, across, one cell of a feature map stands for.
    """

    name: str
    kind: Kind
    label_grain: Grain
    token_grain: Grain
    crop_rule: CropLabelRule
    labeler: str
    tokenizer: str = ""
    axes: str = ""
    channels: int = 1
    dtype: str = ""
    unit: str = ""
    range: tuple[float, float] | None = None
    null: float | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    many: bool = False
    tokens: int | None = None
    keep: bool = False
    size: int = DEFAULT_SIZE
    stride: int = 1

    @property
    def base_name(self) -> str:
        """Returns the name without its `@size`."""
        return self.name.partition("@")[0]

    @property
    def is_structured(self) -> bool:
        """Tells whether labels are records or text, not arrays."""
        return self.kind in ("structured", "text")

    @property
    def in_parquet(self) -> bool:
        """Tells whether kept labels are Parquet, which SQL reads (records, text, vectors), not a tar of pixels and maps."""
        return self.is_structured or self.kind == "vector"

    def shape(self) -> tuple[int, ...]:
        """Returns the shape of one row's crop label array; axes h and w are the modality's size, in cells of its stride."""
        side = self.size // self.stride
        sizes = {"h": side, "w": side, "c": self.channels}
        return tuple(sizes[axis] for axis in self.axes.split())


_BOX_FIELDS = {
    "class": "string",
    "score": "float32",
    "x0": "float32",
    "y0": "float32",
    "x1": "float32",
    "y1": "float32",
}

# What 4D-Humans (HMR2) says of a person, 4M-21's `human_poses`: SMPL's rotations as 3x3 matrices, row by row, of the whole
# body (9 numbers) and of its 23 joints (207), its 10 shape coefficients, and the camera: scale, x, y.
_POSE_FIELDS = {
    "global_orient": "list<float32>",
    "body_pose": "list<float32>",
    "betas": "list<float32>",
    "camera": "list<float32>",
}

# 4M-21's metadata that needs no model, in the order of its type ids (the ids are in tokenize_jobs/sequences/words.py).
_METADATA_FIELDS = {
    "original_width": "int32",
    "original_height": "int32",
    "caption_n_chars": "int32",
    "caption_n_words": "int32",
    "caption_n_sentences": "int32",
    "colorfulness": "float32",
    "brightness": "float32",
    "contrast": "float32",
    "saturation": "float32",
    "entropy": "float32",
}

# What most rows of a sort have in common; a row's own facts go before them.
_image = partial(
    Modality, kind="image", label_grain="crop", token_grain="crop", labeler="files", tokenizer="grid", tokens=196
)
_objects = partial(
    Modality, kind="structured", label_grain="sample", token_grain="crop", range=(0, 1), many=True, keep=True
)
_whole = partial(Modality, label_grain="sample", token_grain="sample", crop_rule="whole", tokenizer="text", keep=True)

MODALITIES: dict[str, Modality] = {
    modality.name: modality
    for modality in (
        _image(
            name="rgb",
            crop_rule="pixels",
            labeler="rgb",
            axes="h w c",
            channels=3,
            dtype="uint8",
            unit="sRGB code value",
            range=(0, 255),
        ),
        _image(
            name="edges",
            crop_rule="nearest",
            labeler="edges",
            axes="h w",
            dtype="uint8",
            unit="255 on an edge, else 0",
            range=(0, 255),
        ),
        _image(
            name="depth",
            crop_rule="nearest",
            axes="h w",
            dtype="float32",
            unit="m, or any scale; larger is farther: tokens hold relative depth",
            range=(0, float("inf")),
            null=float("nan"),
        ),
        _image(
            name="normals",
            crop_rule="normals",
            axes="h w c",
            channels=3,
            dtype="float32",
            unit="unit vector: x right, y down, z away from the camera",
            range=(-1, 1),
            null=0.0,
        ),
        _image(
            name="segmentation",
            crop_rule="nearest",
            axes="h w",
            dtype="uint8",
            unit="class index",
            range=(0, 255),
            null=255,
        ),
        _image(
            name="dinov2",
            kind="feature_map",
            crop_rule="linear",
            labeler="dinov2",
            axes="h w c",
            channels=768,
            dtype="float32",
            unit="DINOv2 ViT-B/14's normalized patch tokens",
            tokens=256,
            stride=14,
        ),
        _objects(
            name="boxes",
            crop_rule="boxes",
            labeler="segments",
            tokenizer="text",
            unit="fractions of the photograph, origin top left",
            fields=_BOX_FIELDS,
            tokens=256,
        ),
        _objects(
            name="instances",
            crop_rule="instances",
            labeler="segments",
            unit="fractions of the photograph; COCO run lengths (column-major, first run is background)",
            fields={**_BOX_FIELDS, "rle_height": "int32", "rle_width": "int32", "rle_counts": "list<uint32>"},
        ),
        _objects(
            name="poses",
            crop_rule="boxes",
            labeler="files",
            unit="fractions of the photograph; rotation matrices; SMPL shape; scale and shift of HMR2's camera in the box",
            fields={**_BOX_FIELDS, **_POSE_FIELDS},
            tokens=275,
        ),
        *(
            Modality(
                name=name,
                kind="vector",
                label_grain="crop",
                token_grain="crop",
                crop_rule="whole",
                labeler=labeler,
                axes="c",
                channels=channels,
                dtype="float32",
                unit=unit,
                tokens=16,
            )
            # 4M-21 has no global CLIP; its ImageBind is the class token before the projection to 1024.
            for name, labeler, channels, unit in (
                ("clip_global", "files", 512, "CLIP ViT-B/16's image embedding, of any length"),
                ("dinov2_global", "dinov2", 768, "DINOv2 ViT-B/14's normalized class token"),
                ("imagebind_global", "files", 1280, "ImageBind ViT-H/14's class token"),
            )
        ),
        _whole(
            name="metadata",
            kind="structured",
            labeler="metadata",
            unit="px, counts, and image statistics on 8-bit scales; entropy in bits",
            fields=_METADATA_FIELDS,
            tokens=43,
        ),
        _whole(
            name="palette",
            kind="structured",
            labeler="palette",
            unit="sRGB code values; share is the fraction of the photograph",
            fields={"k": "uint8", "rank": "uint8", "r": "uint8", "g": "uint8", "b": "uint8", "share": "float32"},
            many=True,
            tokens=23,
        ),
        _whole(name="caption", kind="text", labeler="caption", tokens=256),
        _whole(name="text", kind="text", labeler="text", keep=False),
    )
}


def get(name: str) -> Modality:
    """Returns the modality called `name`: `rgb`, `rgb@448`, or `my_module:MODALITY` for one of your own.

    Raises ConfigError with the nearest known name if there is no such modality.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"modality {name!r} cannot be imported: {error}") from error
        if not isinstance(found, Modality):
            raise ConfigError(f"modality {name!r} is a {type(found).__name__}, expected a manifests.modality.Modality")
        return found
    base, at, size_text = name.partition("@")
    if base not in MODALITIES:
        raise ConfigError(f"unknown modality {base!r}; {nearest(base, MODALITIES)}")
    modality = MODALITIES[base]
    if not at:
        return modality
    # One spelling a size: the name is part of recipes and paths.
    if not re.fullmatch("[1-9][0-9]{1,3}", size_text) or int(size_text) > 4096 or int(size_text) % 16:
        raise ConfigError(f"modality {name!r}: the size after @ must be a multiple of 16 from 16 to 4096")
    size = int(size_text)
    if size == DEFAULT_SIZE:
        raise ConfigError(f"modality {name!r}: {DEFAULT_SIZE} is the default size, write {base!r}")
    if "h" not in modality.axes.split():
        raise ConfigError(f"modality {name!r}: {base} has no size in pixels, write {base!r}")
    if size % modality.stride:
        raise ConfigError(f"modality {name!r}: the size after @ must be a multiple of {modality.stride}, its stride")
    tokens = None if modality.tokens is None else modality.tokens * size**2 // DEFAULT_SIZE**2
    return replace(modality, name=name, size=size, tokens=tokens)
