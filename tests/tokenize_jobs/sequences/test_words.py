"""Boxes, metadata and palettes as strings: 4M's formats exactly, and back within their quantization."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from manifests.errors import TokenizeError
from manifests.modality import MODALITIES
from tokenize_jobs.sequences import words as sequence

STEP = 1 / 999

fractions = st.floats(0, 1, width=32)
intervals = st.tuples(fractions, fractions).map(sorted)
names = st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=1, max_size=3).map(" ".join)


def box(name="dog", score=1.0, x0=0.0, y0=0.0, x1=1.0, y1=1.0):
    return {"class": name, "score": score, "x0": x0, "y0": y0, "x1": x1, "y1": y1}


boxes = st.builds(
    lambda name, score, x, y: box(name, score, x[0], y[0], x[1], y[1]),
    names,
    st.none() | fractions,
    intervals,
    intervals,
)


def palettes_of(draw_color, ks=range(1, 8)):
    return [
        {"k": k, "rank": rank, "r": r, "g": g, "b": b, "share": 1 / k}
        for k in ks
        for rank in range(k)
        for r, g, b in [draw_color(k, rank)]
    ]


palettes = st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=28, max_size=28).map(
    lambda colors: palettes_of(lambda k, rank: colors[k * (k - 1) // 2 + rank])
)


def test_boxes_golden() -> None:
    labels = [
        box("hot dog", 0.9, 0.5, 0.25, 0.75, 1.0),
        box("region", 0.1, 0.0, 0.5, 0.123, 0.6),
        box("person", None, 0.0, 0.0, 1.0, 1.0),
    ]
    assert sequence.box_records(labels) == [
        "v0=0 v1=0 v2=999 v3=999 person",
        "v0=0 v1=500 v2=123 v3=599 region",
        "v0=500 v1=250 v2=749 v3=999 hot dog",
    ]


@given(st.lists(boxes, max_size=8))
def test_boxes_come_back_within_half_a_step(labels) -> None:
    found = sequence.parse_boxes(" ".join(sequence.box_records(labels)))
    nearest_first = sorted(
        labels, key=lambda b: (b["x0"] ** 2 + b["y0"] ** 2, b["y0"], b["x0"], b["y1"], b["x1"], b["class"])
    )
    assert [b["class"] for b in found] == [b["class"] for b in nearest_first]
    for got, want in zip(found, nearest_first, strict=True):
        assert got["score"] is None
        assert all(abs(got[side] - want[side]) <= STEP / 2 + 1e-9 for side in ("x0", "y0", "x1", "y1"))


@given(st.lists(boxes, max_size=6), st.randoms())
def test_box_order_does_not_depend_on_the_order_given(labels, random) -> None:
    shuffled = random.sample(labels, len(labels))
    assert sequence.box_records(shuffled) == sequence.box_records(labels)


@given(st.lists(boxes, max_size=6))
def test_boxes_are_written_the_same_before_and_after_they_are_stored_as_float32(labels) -> None:
    exact = [{**b, **{side: b[side] * 0.999999 for side in ("x0", "y0", "x1", "y1")}} for b in labels]
    stored = [{**b, **{side: np.float32(b[side]) for side in ("x0", "y0", "x1", "y1")}} for b in exact]
    assert sequence.box_records(stored) == sequence.box_records(exact)


def test_boxes_are_clamped_to_the_crop() -> None:
    assert sequence.box_records([box(x0=-0.2, y0=-5, x1=1.0004, y1=99)]) == ["v0=0 v1=0 v2=999 v3=999 dog"]


def test_the_score_filter_drops_nothing_unless_asked_to() -> None:
    labels = [box("a", 0.0), box("b", 0.6), box("c", None), box("d", float("nan")), box("e", np.float32(0.7))]
    assert len(sequence.box_records(labels)) == 5
    kept = sequence.box_records(labels, minimum_score=sequence.FOURM_MINIMUM_SCORE)
    assert [record.split()[-1] for record in kept] == ["b", "c", "d", "e"]
    # 0.7 is below 0.7 once it is a float32; the limit is rounded alike.
    assert len(sequence.box_records([labels[-1]], minimum_score=0.7)) == 1


@pytest.mark.parametrize(
    "bad",
    [box(x0=0.6, x1=0.5), box(y0=float("nan")), box(""), box("  "), box(None)],
    ids=["inverted", "nan", "empty", "blank", "none"],
)
def test_a_box_that_is_none_is_refused(bad) -> None:
    with pytest.raises(TokenizeError, match="see its labeler"):
        sequence.box_records([bad])


def test_a_class_name_cannot_pose_as_a_coordinate_or_an_end() -> None:
    (record,) = sequence.box_records([box("[EOS] v0=7 v1=1 v2=9 v3=9 cat [S_12]")])
    assert record == "v0=0 v1=0 v2=999 v3=999 [ EOS] v0 =7 v1 =1 v2 =9 v3 =9 cat [ S_12]"
    assert len(sequence.parse_boxes(record)) == 1


def test_what_is_not_a_box_is_skipped() -> None:
    text = "dog v0=1 v1=2 v2=3 v0=1 v1=2 v2=3 v3=4 v0=5 v1=6 v2=7 v3=8 wine glass v0=9 v1=9 v2=1 v3=9 cat v3=2 car v0=1"
    assert sequence.parse_boxes(text) == [
        {"class": "wine glass", "score": None, "x0": 5 / 999, "y0": 6 / 999, "x1": 7 / 999, "y1": 8 / 999}
    ]


def test_metadata_golden() -> None:
    fields = {
        "original_width": 640,
        "original_height": 31,
        "caption_n_chars": 52,
        "caption_n_words": None,
        "caption_n_sentences": 1,
        "colorfulness": 150.0,
        "brightness": 127.5,
        "contrast": 0.0,
        "saturation": 300.0,
        "entropy": 7.45,
    }
    assert list(fields) == list(MODALITIES["metadata"].fields)
    assert " ".join(sequence.metadata_records(fields)) == (
        "v1=0 v0=20 v1=1 v0=0 v1=2 v0=52 v1=4 v0=1 v1=9 v0=49 v1=10 v0=24 v1=11 v0=0 v1=12 v0=49 v1=13 v0=36"
    )


def test_every_field_of_4m_has_its_type_id_and_the_modality_names_no_other() -> None:
    assert [field.type_id for field in sequence.METADATA.values()] == list(range(21))
    assert set(MODALITIES["metadata"].fields) <= set(sequence.METADATA)
    # All of them, two words each, and the end fit into the modality.
    assert MODALITIES["metadata"].tokens == 2 * len(sequence.METADATA) + 1


@pytest.mark.parametrize("name", sequence.METADATA)
def test_the_value_of_every_bin_falls_into_that_bin_again(name) -> None:
    field = sequence.METADATA[name]
    assert [field.to_bin(field.to_value(index)) for index in range(field.bins)] == list(range(field.bins))
    assert field.to_bin(-math.inf) == 0
    assert field.to_bin(math.inf) == field.bins - 1


@given(st.floats(0, 255))
@example(255.0)
def test_a_scale_comes_back_within_half_a_bin_without_bias(value) -> None:
    field = sequence.METADATA["brightness"]
    assert abs(field.to_value(field.to_bin(value)) - value) <= 255 / 49 / 2 + 1e-4


def test_scales_have_no_bias() -> None:
    field = sequence.METADATA["contrast"]
    values = np.linspace(0, 127, 10_001)
    errors = [field.to_value(field.to_bin(value)) - value for value in values]
    assert abs(np.mean(errors)) < 0.01


@pytest.mark.parametrize(
    ("name", "value", "index"),
    [
        ("original_width", 31, 0),
        ("original_width", 32, 1),
        ("original_height", 10**9, 999),
        ("caption_n_chars", 12_345, 999),
        ("caption_n_words", -3, 0),
        ("walkability", 1.0, 49),
        ("walkability", 0.9999, 48),
        ("occlusion_score", 0.125, 24),
        ("geometric_complexity", 0.75, 49),
        ("watermark_score", 0.5, 1),
        ("watermark_score", 0.49, 0),
        ("aesthetic_score", 4.4, 0),
        ("aesthetic_score", 4.5, 1),
        ("aesthetic_score", 5.5, 2),
    ],
)
def test_bins_are_those_of_4m(name, value, index) -> None:
    assert sequence.METADATA[name].to_bin(value) == index


@given(st.fixed_dictionaries({}, optional={name: st.integers(0, 31_999) for name in sequence.METADATA}))
def test_the_fields_that_are_written_are_those_that_come_back(fields) -> None:
    found = sequence.parse_metadata(" ".join(sequence.metadata_records(fields)))
    assert list(found) == [name for name in sequence.METADATA if name in fields]
    again = sequence.metadata_records(found)
    assert again == sequence.metadata_records(fields)


def test_metadata_that_has_no_place_is_refused() -> None:
    with pytest.raises(TokenizeError, match="'brightnes' has no type id; did you mean 'brightness'"):
        sequence.metadata_records({"brightnes": 3.0})
    with pytest.raises(TokenizeError, match="'contrast' is NaN"):
        sequence.metadata_records({"contrast": float("nan")})
    assert sequence.metadata_records({"brightnes": None}) == []


def test_metadata_pairs_that_are_none_are_skipped() -> None:
    text = "v0=4 v1=10 v0=50 v1=10 v1=11 v0=3 v1=11 v0=9 v1=21 v0=0 v1=19 v0=2 v1=3 v0=7x v1=5 v0=2"
    assert sequence.parse_metadata(text) == {"contrast": pytest.approx(127 * 3.5 / 49), "n_humans": 2}


def test_palette_golden() -> None:
    colors = palettes_of(lambda k, rank: (k, rank, 255))
    assert sequence.palette_records(colors) == [
        "v1=5 v0=5 v0=0 v0=255 v0=5 v0=1 v0=255 v0=5 v0=2 v0=255 v0=5 v0=3 v0=255 v0=5 v0=4 v0=255"
    ]
    assert sequence.palette_records(colors[:1]) == ["v1=1 v0=1 v0=0 v0=255"]


@given(palettes, st.randoms())
def test_the_palette_that_is_drawn_comes_back_exactly(colors, random) -> None:
    (record,) = sequence.palette_records(random.sample(colors, len(colors)))
    k = sequence.palette_size(colors)
    assert sequence.parse_palette(record) == [{**color, "share": None} for color in colors if color["k"] == k]


def test_all_sizes_of_palette_are_drawn_and_the_share_has_no_part_in_it() -> None:
    seeds = range(200)
    drawn = [sequence.palette_size(palettes_of(lambda k, rank, s=seed: (s, k, rank))) for seed in seeds]
    assert {drawn.count(k) > 10 for k in range(1, 8)} == {True}
    colors = palettes_of(lambda k, rank: (9, k, rank))
    assert sequence.palette_size([{**color, "share": None} for color in colors]) == sequence.palette_size(colors)


def test_palettes_of_more_than_seven_colors_are_not_drawn() -> None:
    drawn = {
        sequence.palette_size(palettes_of(lambda k, rank, s=seed: (s, 0, 0), ks=range(7, 20))) for seed in range(9)
    }
    assert drawn == {7}


def test_no_colors_give_no_record() -> None:
    assert sequence.palette_records([]) == []


@pytest.mark.parametrize(
    "colors",
    [
        palettes_of(lambda k, rank: (0, 0, 0), ks=[8]),
        palettes_of(lambda k, rank: (0, 256, 0)),
        palettes_of(lambda k, rank: (0, 0, 0), ks=[3])[:2],
    ],
    ids=["k of 8", "value of 256", "a color missing"],
)
def test_a_palette_that_is_none_is_refused(colors) -> None:
    with pytest.raises(TokenizeError, match=r"expected (k colors|one of 1)"):
        sequence.palette_records(colors)


def test_what_is_not_a_palette_is_skipped() -> None:
    text = "v0=1 v1=2 v0=1 v0=2 v0=3 v1=1 v0=1 v0=2 v0=256 v1=8 v0=1 v1=1 v0=4 v0=5 v0=6 v1=1 v0=7 v0=8 v0=9"
    assert sequence.parse_palette(text) == [{"k": 1, "rank": 0, "r": 4, "g": 5, "b": 6, "share": None}]


words = st.from_regex(r"v[0-4]=[0-9]{1,4}", fullmatch=True) | st.sampled_from(
    ["dog", "##s", "[UNK]", "none", "=", "\n"]
)


@given(st.lists(words, max_size=40).map(" ".join) | st.text())
def test_parsers_never_raise_and_what_they_find_can_be_written_again(text) -> None:
    sequence.box_records(sequence.parse_boxes(text))
    sequence.metadata_records(sequence.parse_metadata(text))
    sequence.palette_records(sequence.parse_palette(text))
