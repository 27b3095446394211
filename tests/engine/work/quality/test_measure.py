"""Figures of shards are what plain NumPy says, whatever the batches; nothing that is measured raises."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engine.work.quality.figures import SAMPLED
from engine.work.quality.measure import CAPTION_EMBEDDING, CrossModal, ShardQuality, cosine, depth_normal_agreement
from engine.work.rows import ABSENT, Outcome
from manifests.formats.shards import Status
from manifests.modality import MODALITIES, Modality, get

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FLOATS = st.floats(-1e4, 1e4, width=32)


def measured(
    modality: Modality | str, form: Any, values: list[Any], *, batch: int = 5, **options: Any
) -> dict[str, float]:
    quality = ShardQuality(get(modality) if isinstance(modality, str) else modality, form, options.get("vocabulary"))
    for first in range(0, len(values), batch):
        quality.add(values[first : first + batch])
    return quality.finish()


def near(value: Any) -> Any:
    return pytest.approx(value, rel=2e-5, abs=1e-9)


# -- tokens -----------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=6), max_size=20), st.integers(1, 7))
def test_tokens_are_measured_as_numpy_would(rows: list[list[int] | None], batch: int) -> None:
    found = measured("caption", "token", rows, batch=batch, vocabulary=10)
    present = [row for row in rows if row is not None]
    if not present:
        assert found == {}
        return
    counts = np.bincount(np.concatenate(present), minlength=10)
    shares = counts[counts > 0] / counts.sum()
    assert found == {
        "entropy_bits": near(-(shares * np.log2(shares)).sum()),
        "codebook_use": near((counts > 0).sum() / 10),
        "out_of_range": 0,
        "duplicates": near(1 - len({tuple(row) for row in present}) / len(present)),
        "at_limit": 0,
    }
    assert found == measured("caption", "token", rows, batch=100, vocabulary=10)


def test_tokens_beyond_the_vocabulary_and_at_the_limit_are_counted() -> None:
    full = [1] * int(get("caption").tokens or 0)
    found = measured("caption", "token", [full, [0, 4, -1, 3]], vocabulary=4)
    assert found["out_of_range"] == near(2 / (len(full) + 4))
    assert found["at_limit"] == 0.5
    grid = measured("rgb", "token", [np.arange(4, dtype=np.uint16), np.zeros(4, np.uint16)], vocabulary=8)
    assert grid["codebook_use"] == 0.5
    assert "at_limit" not in grid


# -- arrays -----------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(arrays.arrays(np.float32, (6, 5), elements=FLOATS | st.just(np.nan)), min_size=1, max_size=9))
def test_maps_are_measured_as_numpy_would(maps: list[np.ndarray]) -> None:
    found = measured("depth", "label", [*maps, None])
    stack = np.stack(maps).astype(np.float64)
    good = stack[~np.isnan(stack)]
    assert found["null_values"] == near(np.isnan(stack).mean())
    assert found["not_finite"] == 0
    assert found["flat"] == near(np.mean([(each == each.flat[0]).all() for each in maps]))
    assert found["duplicates"] == near(1 - len({each.tobytes() for each in maps}) / len(maps))
    if good.size:
        assert found["min"] == near(good.min())
        assert found["max"] == near(good.max())
        assert found["mean"] == pytest.approx(good.mean(), rel=1e-5, abs=1e-5 * np.abs(good).max() + 1e-12)
        assert found["std"] == pytest.approx(good.std(), rel=1e-4, abs=1e-6 * np.abs(good).max() + 1e-12)
        assert found["out_of_range"] == near((good < 0).mean())
    assert found == measured("depth", "label", maps, batch=1)


@quick
@given(st.lists(arrays.arrays(np.uint8, (4, 5, 3)), min_size=1, max_size=6))
def test_pixels_are_measured_as_numpy_would(pictures: list[np.ndarray]) -> None:
    found = measured("rgb", "label", pictures)
    stack = np.stack(pictures)
    counts = Counter(stack.ravel().tolist())
    shares = np.array([*counts.values()]) / stack.size
    assert found == {
        "flat": near(np.mean([(each == each[0, 0]).all() for each in pictures])),
        "duplicates": near(1 - len({each.tobytes() for each in pictures}) / len(pictures)),
        "min": stack.min(),
        "max": stack.max(),
        "mean": near(stack.mean()),
        "std": near(stack.std()),
        "entropy_bits": near(abs((shares * np.log2(shares)).sum())),
    }


def test_a_null_normal_is_null_in_all_its_channels() -> None:
    normals = np.zeros((4, 4, 3), np.float32)
    normals[:2] = (0, 0, -1)
    found = measured("normals", "label", [normals])
    assert found["null_values"] == 0.5
    assert found["mean"] == near(-1 / 3)
    classes = np.full((4, 4), 255, np.uint8)
    classes[0] = 7
    found = measured("segmentation", "label", [classes])
    assert (found["null_values"], found["min"], found["max"], found["mean"]) == (0.75, 7, 7, 7)
    assert found["entropy_bits"] == 0


def test_what_is_not_finite_is_told_and_kept_out_of_the_rest() -> None:
    depth = np.ones((4, 4), np.float32)
    depth[0, 0], depth[0, 1], depth[0, 2] = np.inf, -1, np.nan
    found = measured("depth", "label", [depth])
    assert found["not_finite"] == found["null_values"] == 1 / 16
    assert found["out_of_range"] == near(1 / 14)
    assert (found["min"], found["max"]) == (-1, 1)
    vector = np.full(512, np.nan, np.float32)
    assert measured("clip_global", "label", [vector]) == {"flat": 0, "duplicates": 0, "not_finite": 1}
    assert measured("depth", "label", [np.full((4, 4), np.nan, np.float32)])["null_values"] == 1


def test_numbers_far_from_zero_keep_their_spread() -> None:
    values = [np.float32(1e6) + np.arange(16, dtype=np.float32).reshape(4, 4) for _ in range(9)]
    assert measured("depth", "label", values)["std"] == near(np.arange(16).std())


def test_large_arrays_are_looked_at_through_a_fixed_sample_of_all_columns() -> None:
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(64)]
    found = measured("rgb", "label", pictures)
    stack = np.stack(pictures)
    assert found["mean"] == pytest.approx(stack.mean(), rel=0.01)
    assert found["std"] == pytest.approx(stack.std(), rel=0.01)
    stripes = np.tile(np.arange(224, dtype=np.float32), (224, 1))
    found = measured("depth", "label", [stripes] * 2)
    assert found["mean"] == pytest.approx(stripes.mean(), rel=0.02)
    assert found["duplicates"] == 0.5
    # One value for each of some thousand columns: each is seen.
    assert SAMPLED / 2 < 224 * 224 / (224 * 224 // SAMPLED) < 2 * SAMPLED
    maps = [generator.standard_normal((768, 16, 16)).astype(np.float32) for _ in range(20)]
    of_features = Modality(
        **{**vars(get("depth")), "kind": "feature_map", "axes": "c h w", "channels": 768, "null": None}
    )
    assert measured(of_features, "label", maps)["std"] == pytest.approx(1, rel=0.03)


def test_maps_of_many_sizes_are_measured_one_by_one() -> None:
    maps = [np.full((side, 3), side, np.float32) for side in (2, 4, 2, 5)]
    assert measured("depth", "label", maps)["mean"] == near((2 * 6 * 2 + 4 * 12 + 5 * 15) / (12 + 12 + 15))


def test_labels_behind_tokens_are_measured_on_whatever_device() -> None:
    tokens = [np.arange(4) for _ in range(3)]
    maps = np.arange(3 * 16, dtype=np.float32).reshape(3, 4, 4)
    expected = {f"label_{name}": value for name, value in measured("depth", "label", list(maps)).items()}
    for labels in ([*maps, None], list(torch.from_numpy(maps)), list(torch.from_numpy(maps).to(torch.bfloat16))):
        quality = ShardQuality(get("depth"), "token", 8)
        quality.add([*tokens, None], labels=labels)
        found = quality.finish()
        assert {name: value for name, value in found.items() if name.startswith("label_")} == expected
        assert found["codebook_use"] == 0.5


# -- records and texts ------------------------------------------------------------------------------------------------


def box(score: float = 0.5, name: str = "cat", **corners: float) -> dict[str, Any]:
    return {"class": name, "score": score, "x0": 0.25, "y0": 0.25, "x1": 0.75, "y1": 0.5, **corners}


@quick
@given(st.lists(st.lists(st.tuples(st.floats(0, 1), st.sampled_from("abc")), max_size=5), min_size=1, max_size=9))
def test_boxes_are_counted_by_score_and_class(rows: list[list[tuple[float, str]]]) -> None:
    found = measured("boxes", "label", [[box(score, name) for score, name in row] for row in rows], batch=2)
    scores = np.array([score for row in rows for score, _ in row])
    names = Counter(name for row in rows for _, name in row)
    assert found["records"] == near(len(scores) / len(rows))
    assert found["empty"] == near(sum(not row for row in rows) / len(rows))
    assert found["classes"] == len(names)
    bins = np.bincount((scores * 10).astype(int).clip(0, 9), minlength=10) if len(scores) else np.zeros(10)
    assert [found.get(f"score_hist_{place}", 0) for place in range(10)] == bins.tolist()
    if len(scores):
        shares = np.array([*names.values()]) / len(scores)
        assert found["class_entropy_bits"] == near(abs((shares * np.log2(shares)).sum()))
        assert found["score_mean"] == near(scores.mean())
        assert found["box_area"] == near(0.125)
        assert found["out_of_range"] == 0


def test_boxes_outside_or_without_area_are_counted() -> None:
    rows = [[box(), box(x1=1.5), box(x0=0.75), box(y0=math.nan)], [box(score=math.nan)]]
    found = measured("boxes", "label", rows)
    assert found["out_of_range"] == near(3 / 5)
    assert found["not_finite"] == near(2 / 10)
    assert found["score_mean"] == 0.5


def test_a_record_alone_has_a_mean_of_each_number() -> None:
    fields = MODALITIES["metadata"].fields
    rows = [dict.fromkeys(fields, 2), {**dict.fromkeys(fields, 4.5), "caption_n_chars": None}]
    found = measured("metadata", "label", rows)
    assert found["mean_brightness"] == 3.25
    assert found["mean_caption_n_chars"] == 2
    assert found["not_finite"] == 0
    palette = [
        {"k": 2, "rank": rank, "r": 9, "g": 9, "b": 9, "share": share} for rank, share in enumerate((0.75, 0.25))
    ]
    assert measured("palette", "label", [palette, []]) == {
        **{"mean_share": 0.5, "records": 1, "empty": 0.5, "not_finite": 0}
    }


def test_texts_are_measured_by_length() -> None:
    found = measured("caption", "label", ["a cat", "a cat", "", " ", None, "four words are here"])
    assert found == {"chars": near(30 / 5), "words": near(8 / 5), "empty": 0.4, "duplicates": near(0.2)}


# -- what is not right ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modality", "form", "values"),
    [
        ("rgb", "token", ["no tokens"]),
        ("rgb", "label", [7, "x"]),
        ("boxes", "label", [[{"class": "cat"}], 3]),
        ("metadata", "label", [[]]),
        ("caption", "label", [b"bytes", 3]),
    ],
)
def test_what_cannot_be_measured_has_no_figures(modality: str, form: Any, values: list[Any]) -> None:
    assert measured(modality, form, values, vocabulary=8) == {}
    quality = ShardQuality(get(modality), form, 8)
    quality.add(values)
    quality.add([])
    assert quality.finish() == {}


# -- across modalities ------------------------------------------------------------------------------------------------


def rows_of(*crops: dict[str, Any], sample: dict[str, Any] | None = None) -> list[Any]:
    """Rows as labels are: one crop each, None where a label is absent."""

    def outcomes(found: dict[str, Any]) -> dict[str, Outcome]:
        return {name: ABSENT if value is None else Outcome(Status.OK, value) for name, value in found.items()}

    return [
        SimpleNamespace(row=row, key=str(row), sample=outcomes(sample or {}), crop={0: outcomes(crop)})
        for row, crop in enumerate(crops)
    ]


def agreement(*batches: list[Any]) -> dict[str, dict[str, float]]:
    cross = CrossModal()
    for batch in batches:
        cross.add(batch)
    return cross.finish()


def sphere(size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """Depth (m) and normals of a ball in front of a camera with a focal length of `size` px, null beside it."""
    u, v = np.meshgrid(np.arange(size) - (size - 1) / 2, np.arange(size) - (size - 1) / 2)
    rays = np.stack([u / size, v / size, np.ones_like(u)], -1)
    center, radius = np.array([0.2, -0.1, 4.0]), 1.2
    a, b, c = (rays**2).sum(-1), rays @ center, center @ center - radius**2
    inside = b**2 - a * c
    depth = np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, np.nan)
    normals = (rays * depth[..., None] - center) / radius
    return depth.astype(np.float32), np.nan_to_num(normals).astype(np.float32)


def test_normals_agree_with_the_depth_of_the_same_surface() -> None:
    depth, normals = sphere()
    crop = {"depth": depth, "normals": normals}
    assert agreement(rows_of(crop))["normals"]["agreement_with_depth"] > 0.99
    # Whatever the scale of depth, and from tensors.
    tensors = {"depth": torch.from_numpy(depth * 7), "normals": torch.from_numpy(normals)}
    assert agreement(rows_of(tensors))["normals"]["agreement_with_depth"] > 0.99
    turned = {**crop, "normals": normals * (-1, 1, 1)}
    assert agreement(rows_of(turned))["normals"]["agreement_with_depth"] < 0.95
    assert agreement(rows_of({**crop, "normals": -normals}))["normals"]["agreement_with_depth"] < -0.99
    # A mirrored crop is the same surface.
    mirrored = {"depth": depth[:, ::-1], "normals": normals[:, ::-1] * (-1, 1, 1)}
    assert agreement(rows_of(mirrored))["normals"]["agreement_with_depth"] > 0.99
    assert agreement(rows_of(crop, turned)) == agreement(rows_of(crop), rows_of(turned))
    at_size = {"depth@448": depth, "normals@448": normals}
    assert agreement(rows_of(at_size))["normals@448"]["agreement_with_depth"] > 0.99


def test_what_is_not_there_is_not_compared() -> None:
    depth, normals = sphere(32)
    assert agreement(rows_of({"depth": depth}, {"normals": normals}, {"depth": None, "normals": normals})) == {}
    assert agreement(rows_of({"depth": np.full_like(depth, np.nan), "normals": normals})) == {}
    assert agreement(rows_of({"depth": depth, "normals": "no array"})) == {}
    assert np.isnan(depth_normal_agreement([(np.ones((32, 32)), np.zeros((32, 32, 3)))])).all()


def test_boxes_agree_with_a_segmentation_that_has_their_class_where_they_are() -> None:
    classes = np.zeros((100, 100), np.uint8)
    classes[10:40, 10:40], classes[50:90, 50:90] = 3, 7
    cat = box(name="cat", x0=0.1, y0=0.1, x1=0.4, y1=0.4)
    half_dog = box(name="dog", x0=0.5, y0=0.5, x1=1.0, y1=0.9)
    found = agreement(rows_of({"boxes": [cat, half_dog], "segmentation": classes}))
    assert found["segmentation"]["agreement_with_boxes"] == pytest.approx((1 + 0.8) / 2, abs=0.03)
    # A name that is a number is that class, whatever else there is.
    numbered = [{**cat, "class": "7"}]
    assert agreement(rows_of({"boxes": numbered, "segmentation": classes})) == {
        "segmentation": {"agreement_with_boxes": 0}
    }
    # The background is in every box, and is nobody's class.
    loose = [box(name="cat", x0=0.0, y0=0.0, x1=0.45, y1=0.45)]
    found = agreement(rows_of({"boxes": loose, "segmentation": classes}))["segmentation"]["agreement_with_boxes"]
    assert found == pytest.approx(30 * 30 / 45 / 45, abs=0.05)
    assert agreement(rows_of({"boxes": [], "segmentation": classes})) == {}


def test_captions_agree_with_pictures_where_both_have_embeddings() -> None:
    one, other = np.array([3.0, 4.0, 0.0], np.float32), np.array([0.0, 1.0, 0.0], np.float32)
    assert cosine(one[None], other[None]) == pytest.approx([0.8])
    assert np.isnan(cosine(one[None], np.zeros((1, 3)))).all()
    found = agreement(rows_of({"clip_global": one}, {"clip_global": other}, sample={CAPTION_EMBEDDING: other}))
    assert found == {CAPTION_EMBEDDING: {"agreement_with_clip_global": near(0.9)}}
