"""The table of modalities: every row agrees with itself, and names are found or refused in words."""

import sys
import types
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from labelers.protocol import check_label
from manifests import modality
from manifests.errors import ConfigError
from manifests.formats import shards
from manifests.modality import MODALITIES, Modality
from manifests.pixels import crops

ROWS = pytest.mark.parametrize("row", MODALITIES.values(), ids=list(MODALITIES))


@ROWS
def test_a_row_agrees_with_itself(row: Modality) -> None:
    assert MODALITIES[row.name] is row
    assert row.name.isidentifier()
    assert row.name == row.base_name
    assert row.labeler
    assert row.tokens is None or row.tokens > 0
    if row.crop_rule != "whole":
        assert row.token_grain == "crop"
    if row.range is not None:
        assert row.range[0] < row.range[1]


@ROWS
def test_the_crop_of_a_label_is_a_label(row: Modality) -> None:
    """By the crop rule of the row, from a label of a whole photograph at another resolution."""
    label: Any = "a text"
    if row.kind == "structured":
        mask = np.ones((30, 40), bool)
        values = {"class": "person", "score": 1.0, "x0": 0.1, "y0": 0.1, "x1": 0.9, "y1": 0.9}
        values |= {"rle_height": 30, "rle_width": 40, "rle_counts": crops.rle_encode(mask)}
        record = {name: values.get(name, [0.5] if kind.startswith("list") else 1) for name, kind in row.fields.items()}
        label = [record] if row.many else record
    elif row.kind != "text":
        sizes = {"h": 30, "w": 40, "c": row.channels}
        label = np.ones([sizes[axis] for axis in row.axes.split()], row.dtype)
    crop = crops.plan_crop(crops.CropRule(), "key", 1, 400, 300)
    cropped = crops.crop_label(row, label, crop, row.size // row.stride)
    check_label(row, cropped)
    assert len(cropped) == len(label) or "h" in row.axes


@ROWS
def test_arrays_have_axes_and_a_dtype_that_holds_their_range(row: Modality) -> None:
    if row.is_structured:
        assert (row.axes, row.dtype, row.null) == ("", "", None)
        return
    dtype = np.dtype(row.dtype)
    assert dtype.kind in "uif"
    assert set(row.axes.split()) <= {"h", "w", "c"}
    assert ("c" in row.axes.split()) == (row.channels > 1)
    assert len(row.shape()) == len(row.axes.split())
    assert row.fields == {}
    assert not row.many
    if dtype.kind in "ui":
        limits = np.iinfo(dtype)
        for value in (*(row.range or ()), *(() if row.null is None else (row.null,))):
            assert limits.min <= value <= limits.max


@ROWS
def test_fields_are_of_types_that_shards_and_views_know(row: Modality) -> None:
    if row.kind != "structured":
        assert row.fields == {}
        return
    assert row.fields
    assert all(name.isidentifier() and name.islower() for name in row.fields)
    # Raises KeyError for a type that shards do not know.
    assert shards.label_type(row) is not None
    from manifests.catalog.content import _SQL_TYPES

    assert set(row.fields.values()) <= set(_SQL_TYPES)


@ROWS
def test_structured_labels_are_kept_unless_they_are_the_source_itself(row: Modality) -> None:
    assert row.keep == (row.is_structured and row.name != "text")


def test_rgb() -> None:
    rgb = modality.get("rgb")
    assert rgb.shape() == (224, 224, 3)
    assert (rgb.dtype, rgb.size, rgb.tokens, rgb.range) == ("uint8", 224, 196, (0, 255))
    assert not rgb.is_structured


def test_rgb_at_another_size() -> None:
    rgb = modality.get("rgb@448")
    assert (rgb.name, rgb.base_name, rgb.size, rgb.tokens) == ("rgb@448", "rgb", 448, 784)
    assert rgb.shape() == (448, 448, 3)
    assert replace(rgb, name="rgb", size=224, tokens=196) == modality.get("rgb")
    assert modality.get("depth@16").tokens == 1
    assert modality.get("edges@4096").shape() == (4096, 4096)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dept", "unknown modality 'dept'; did you mean 'depth'?"),
        ("captions", "unknown modality 'captions'; did you mean 'caption'?"),
        ("RGB", "unknown modality 'RGB'; known: .*rgb"),
        ("zzz", "unknown modality 'zzz'; known: boxes, caption"),
        ("", "unknown modality ''"),
        ("dept@448", "did you mean 'depth'?"),
        ("rgb@", "multiple of 16 from 16 to 4096"),
        ("rgb@0", "multiple of 16"),
        ("rgb@100", "multiple of 16"),
        ("rgb@-16", "multiple of 16"),
        ("rgb@4112", "multiple of 16"),
        ("rgb@big", "multiple of 16"),
        ("rgb@448@448", "multiple of 16"),
        ("rgb@²²⁴", "multiple of 16"),
        ("rgb@٤٤٨", "multiple of 16"),
        ("rgb@0448", "multiple of 16"),
        ("rgb@ 448", "multiple of 16"),
        ("rgb@224", "224 is the default size, write 'rgb'"),
        ("caption@448", "caption has no size in pixels, write 'caption'"),
        ("boxes@448", "boxes has no size in pixels"),
        ("no_such_module:MODALITY", "cannot be imported: No module named 'no_such_module'"),
        (":MODALITY", "cannot be imported"),
        (".relative:MODALITY", "cannot be imported"),
        ("manifests.modality:NOTHING", "cannot be imported: .*NOTHING"),
        ("manifests.modality:DEFAULT_SIZE", "is a int, expected a manifests.modality.Modality"),
    ],
)
def test_a_name_that_is_not_right_is_refused_in_words(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        modality.get(name)


def test_a_modality_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bands = Modality(
        name="bands",
        kind="image",
        label_grain="crop",
        token_grain="crop",
        crop_rule="linear",
        labeler="my_module:Bands",
        tokenizer="grid",
        axes="h w c",
        channels=12,
        dtype="uint16",
    )
    module = types.ModuleType("my_module")
    module.MODALITY = bands  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_module", module)
    assert modality.get("my_module:MODALITY") is bands
    assert bands.shape() == (224, 224, 12)


def test_a_modality_is_a_frozen_value() -> None:
    with pytest.raises(FrozenInstanceError):
        modality.get("rgb").size = 448  # type: ignore[misc]
