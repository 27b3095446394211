import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from labelers.files import Files
from manifests.errors import ConfigError, LabelError
from manifests.modality import Modality
from manifests.pixels.crops import rle_decode
from manifests.pixels.images import encode_npy, encode_png

BANDS = Modality(
    name="bands",
    kind="image",
    label_grain="sample",
    token_grain="crop",
    crop_rule="linear",
    labeler="files",
    tokenizer="grid",
    axes="h w c",
    channels=5,
    dtype="uint16",
    unit="sensor counts",
)
GAZE = Modality(
    name="gaze",
    kind="vector",
    label_grain="sample",
    token_grain="sample",
    crop_rule="whole",
    labeler="files",
    tokenizer="grid",
    axes="c",
    channels=2,
    dtype="float32",
    range=(-1, 1),
)
WEATHER = Modality(
    name="weather",
    kind="structured",
    label_grain="sample",
    token_grain="sample",
    crop_rule="whole",
    labeler="files",
    tokenizer="text",
    fields={"sky": "string", "wind": "float32"},
)
MINE = "modmill_test_modalities"


@pytest.fixture(autouse=True)
def _my_modalities(tmp_path, monkeypatch):
    """A module of one's own, with the modalities above."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / f"{MINE}.py").write_text(
        "from modmill import Modality\n"
        + "\n".join(f"{name} = {value!r}" for name, value in (("BANDS", BANDS), ("GAZE", GAZE), ("WEATHER", WEATHER)))
    )
    monkeypatch.syspath_prepend(str(folder))


def label(labeler: Files, source: str | Path = "photos/a.jpg", **columns: object) -> object:
    found = labeler.label({"source": [str(source)], "columns": [columns]})
    (labels,) = found.values()
    return labels[0]


@pytest.fixture
def photo(tmp_path) -> Path:
    """photos/trip/a.b.jpg, of a corpus that keeps its labels in folders beside `photos`."""
    folder = tmp_path / "photos" / "trip"
    folder.mkdir(parents=True)
    for name in ("depth", "boxes"):
        (tmp_path / name).mkdir()
    return folder / "a.b.jpg"


def test_depth_from_a_file_beside_the_photograph(photo):
    (photo.parents[2] / "depth" / "a.b.png").write_bytes(encode_png(np.array([[0, 1500]], np.uint16)))
    labeler = Files(modality="depth", path="../../depth/{stem}.png", scale=0.001, null=0)
    np.testing.assert_allclose(label(labeler, photo), np.array([[np.nan, 1.5]], np.float32))
    assert label(labeler, photo.with_name("other.jpg")) is None


def test_the_full_name_may_stand_in_the_path(photo):
    photo.with_name("a.b.jpg.npy").write_bytes(encode_npy(np.array([[2.5]])))
    assert label(Files(modality="depth", path="{name}.npy"), photo).tolist() == [[2.5]]


def test_uris_are_normalized_and_read_by_fsspec():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/corpus/depth/a.npy", encode_npy(np.array([[7.0]])))
    labeler = Files(modality="depth", path="../depth/{stem}.npy")
    assert label(labeler, "memory://corpus/photos/a.jpg").tolist() == [[7.0]]
    assert label(labeler, "memory://corpus/photos/b.jpg") is None
    memory.rm("/corpus", recursive=True)


def test_a_relative_source_is_relative_to_the_working_folder(photo, monkeypatch):
    monkeypatch.chdir(photo.parents[2])
    Path("depth/c.npy").write_bytes(encode_npy(np.array([[3.0]])))
    assert label(Files(modality="depth", path="../depth/{stem}.npy"), "photos/c.jpg").tolist() == [[3.0]]


def test_unreadable_files_are_errors_not_absent(photo):
    place = photo.with_suffix(".png")
    labeler = Files(modality="depth", path="{stem}.png")
    place.write_bytes(encode_png(np.zeros((40, 40), np.uint8))[:-30])
    with pytest.raises(LabelError, match=r"a\.b\.png: PNG of .* truncated"):
        label(labeler, photo)
    place.unlink()
    place.mkdir()
    with pytest.raises(LabelError, match="cannot be read"):
        label(labeler, photo)


def test_labels_that_do_not_fit_say_where(photo):
    photo.with_suffix(".png").write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(LabelError, match=r"a\.b\.png: depth: numbers of shape \(4, 4, 3\), expected \(h w\)"):
        label(Files(modality="depth", path="{stem}.png"), photo)


def test_segmentation_of_a_palette_png(photo):
    index = np.array([[0, 5], [132, 255]], np.uint8)
    picture = Image.fromarray(index, "P")
    picture.putpalette(list(range(256)) * 3)
    picture.save(photo.with_suffix(".png"))
    found = label(Files(modality="segmentation", path="{stem}.png"), photo)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, index)


def test_normals_of_8_bits(photo):
    photo.with_suffix(".png").write_bytes(encode_png(np.array([[[128, 128, 255], [128, 128, 128]]], np.uint8)))
    found = label(Files(modality="normals", path="{stem}.png"), photo)
    np.testing.assert_allclose(found, [[[0, 0, 1], [0, 0, 0]]], atol=0.01)


def test_a_photograph_as_a_label_is_decoded_as_one(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4), (9, 8, 7)).save(photo.with_suffix(".webp"), lossless=True, exif=exif)
    assert label(Files(modality="rgb", path="{stem}.webp"), photo).shape == (6, 4, 3)


def test_columns_hold_paths_values_or_json(photo):
    (photo.parents[2] / "depth" / "x.npy").write_bytes(encode_npy(np.array([[1.0]])))
    labeler = Files(modality="depth", column="depth")
    assert label(labeler, photo, depth="../../depth/x.npy").tolist() == [[1.0]]
    assert label(labeler, photo, depth=[[1.0, 2.0]]).tolist() == [[1, 2]]
    assert label(labeler, photo, depth="[[1.0], [2.0]]").tolist() == [[1], [2]]
    assert label(labeler, photo, depth=np.array([[4.0]])).dtype == np.float32
    assert label(labeler, photo, depth=encode_npy(np.array([[5.0]]))).tolist() == [[5.0]]
    for nothing in ({}, {"depth": None}, {"depth": ""}, {"depth": "missing.npy"}):
        assert label(labeler, photo, **nothing) is None


@pytest.mark.parametrize("value", ["[[1.0], [2.0, 3.0]]", '[["a"]]', "[1", {"a": 1}, "/etc/hostname", "http://h/a.npy"])
def test_columns_that_are_no_depth_are_refused(value, photo):
    with pytest.raises(LabelError):
        label(Files(modality="depth", column="depth"), photo, depth=value)


def test_paths_may_not_leave_the_store():
    with pytest.raises(LabelError, match="leads out of"):
        label(Files(modality="depth", column="depth"), "s3://bucket/a.jpg", depth="../../other/a.npy")


def test_boxes_of_both_spellings():
    labeler = Files(modality="boxes", column="boxes", names=["person", "bicycle"])
    expected = [
        {"class": "cat", "score": 0.5, "x0": 0.1, "y0": 0.2, "x1": 0.3, "y1": 1.0},
        {"class": "bicycle", "score": 1.0, "x0": 0.0, "y0": 0.0, "x1": 1.0, "y1": 1.0},
    ]
    records = [{**expected[0], "y1": 1.0005, "area": 7}, {"class": 1, "x0": 0, "y0": 0, "x1": 1, "y1": 1}]
    assert label(labeler, boxes=records) == expected
    assert label(labeler, boxes=json.dumps(records)) == expected
    fourm = [
        {"boxes": [0.1, 0.2, 0.3, 1.0], "class_name": "cat", "score": 0.5},
        {"boxes": [0, 0, 1, 1], "class_name": 1},
    ]
    assert label(labeler, boxes={"instances": fourm}) == expected
    assert label(labeler, boxes=[]) == []


def test_class_names_by_mapping():
    labeler = Files(modality="boxes", column="boxes", names={"17": "cat", "n02": "dog"})
    corners = {"x0": 0, "y0": 0, "x1": 1, "y1": 1}
    found = label(labeler, boxes=[{"class": 17, **corners}, {"class": "n02", **corners}, {"class": "cow", **corners}])
    assert [box["class"] for box in found] == ["cat", "dog", "cow"]


CORNERS = {"class": "cat", "x0": 0.1, "y0": 0.1, "x1": 0.5, "y1": 0.5}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{**CORNERS, "x1": 120}], "x1 is 120; expected a fraction from 0 to 1 .*not pixels"),
        ([{**CORNERS, "x1": 0.05}], "ends before it starts"),
        ([{**CORNERS, "class": 3}], "the class 3 has no name"),
        ([{**CORNERS, "score": 1.5}], "score is 1.5"),
        ([{"class": "cat", "x0": 0.1}], "y0 is None"),
        ([{"class": "cat", "boxes": [0.1, 0.2]}], "2 coordinates"),
        ("[{", "no JSON"),
        ([1], "expected a list of boxes"),
        (5, "expected a list of boxes"),
    ],
)
def test_boxes_that_are_none_are_refused(value, message):
    with pytest.raises(LabelError, match=message):
        label(Files(modality="boxes", column="boxes"), boxes=value)


def test_instances_of_an_index_map(photo):
    index = np.zeros((4, 8), np.uint16)
    index[1:3, 2:6] = 2
    index[3, 7] = 1
    photo.with_suffix(".png").write_bytes(encode_png(index))
    boxes = photo.parents[2] / "boxes" / "a.b.json"
    labeler = Files(modality="instances", path="{stem}.png", boxes_path="../../boxes/{stem}.json")
    assert label(labeler, photo) is None
    boxes.write_text(json.dumps([{**CORNERS, "class": "dot"}, {**CORNERS, "score": 0.25}]))
    dot, cat = label(labeler, photo)
    assert (dot["class"], dot["score"], cat["class"], cat["score"]) == ("dot", 1.0, "cat", 0.25)
    assert (cat["x0"], cat["y0"], cat["x1"], cat["y1"]) == (0.25, 0.25, 0.75, 0.75)
    np.testing.assert_array_equal(rle_decode(cat["rle_counts"], 4, 8), index == 2)
    boxes.write_text(json.dumps([CORNERS]))
    with pytest.raises(LabelError, match=r"holds instance 2, but .* 1 records"):
        label(labeler, photo)
    unnamed = label(Files(modality="instances", path="{stem}.png"), photo)
    assert [record["class"] for record in unnamed] == ["instance", "instance"]


def test_instances_of_records(photo):
    record = {**CORNERS, "score": 0.5, "rle_height": 1, "rle_width": 2, "rle_counts": [1, 1]}
    labeler = Files(modality="instances", column="masks")
    assert label(labeler, photo, masks=[record]) == [record]
    with pytest.raises(LabelError, match="instances: the fields are"):
        label(labeler, photo, masks=[CORNERS])


def test_text_from_files_and_columns(photo):
    photo.with_suffix(".txt").write_bytes("\ufeffKätzchen 😺\n".encode())
    labeler = Files(modality="text", path="{stem}.txt")
    assert label(labeler, photo) == "Kätzchen 😺\n"
    photo.with_suffix(".txt").write_bytes(b"")
    assert label(labeler, photo) is None
    photo.with_suffix(".txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(LabelError, match="not UTF-8"):
        label(labeler, photo)
    assert label(Files(modality="text", column="body"), photo, body="[not JSON]") == "[not JSON]"


def test_modalities_of_ones_own(photo):
    bands = np.random.default_rng(0).integers(0, 4000, (6, 7, 5), dtype=np.uint16)
    photo.with_suffix(".npy").write_bytes(encode_npy(bands))
    labeler = Files(modality=f"{MINE}:BANDS", path="{stem}.npy")
    found = labeler.label({"source": [str(photo)], "columns": [{}]})
    assert list(found) == ["bands"]
    np.testing.assert_array_equal(found["bands"][0], bands)

    gaze = Files(modality=f"{MINE}:GAZE", column="gaze")
    np.testing.assert_allclose(label(gaze, gaze=[0.5, -1]), np.array([0.5, -1], np.float32))
    with pytest.raises(LabelError, match=r"gaze: .*expected float32 \(c\) = \(2,\)"):
        label(gaze, gaze=[0.5, -1, 0])

    weather = Files(modality=f"{MINE}:WEATHER", column="weather")
    assert label(weather, weather='{"sky": "clear", "wind": 2.5}') == {"sky": "clear", "wind": 2.5}
    with pytest.raises(LabelError, match="weather: the fields are"):
        label(weather, weather={"sky": "clear"})


def test_structured_labels_must_be_json(photo):
    photo.with_suffix(".json").write_text("sky: clear")
    with pytest.raises(LabelError, match="no JSON; expected a JSON list or object"):
        label(Files(modality=f"{MINE}:WEATHER", path="{stem}.json"), photo)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "depth"}, "give one of path=None and column=None"),
        ({"modality": "depth", "path": "a", "column": "b"}, "give one of"),
        ({"modality": "dept", "column": "b"}, "did you mean 'depth'"),
        ({"modality": "edges", "column": "b", "null": 0}, "no null marker"),
        ({"modality": "depth", "path": "{stam}.png"}, "expected {stem} and {name} only"),
        ({"modality": "instances", "path": "a", "boxes_path": "{0}"}, "expected {stem} and {name} only"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Files(**options)
