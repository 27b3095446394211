"""Exports: 4M's layout, plain WebDataset, and copies, of a small workspace that a run made."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from engine.cli import entry
from engine.export.request import ExportRequest, export
from engine.pipeline import config as pipeline
from engine.run import job
from engine.upkeep.verify import verify
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, ShardError
from manifests.formats import shards
from manifests.formats.shards import Status
from manifests.log import entries as log
from manifests.log.actions import Forgotten
from manifests.modality import MODALITIES
from manifests.pixels import images
from manifests.pixels.crops import CropRule, crop_label, plan_crop
from manifests.pixels.images import decode_npy
from manifests.snapshots.snapshot import open_snapshot
from manifests.store.storage import open_storage
from tokenize_jobs.sequences.words import box_records, plain

ROOT = Path(__file__).parents[3]
PIPELINE = """
workspace: work
corpora:
  photos:
    source: photos
    crops: 2
    part_rows: 5
    modalities:
      rgb: {keep: true}
      edges: {format: webdataset}
      boxes: {tokens: false}
      caption: {}
      metadata: {}
      palette: {tokens: false}
  notes: {source: notes.jsonl, kind: text, modalities: {text: {keep: true}}}
tokenizers:
  text: {vocabulary: 4500}
  rgb: {steps: 2, batch: 4, codebook: 32, width: 16}
  edges: {steps: 2, batch: 4, codebook: 16, width: 16}
snapshots: {most: {where: "part < 2 AND corpus = 'photos'", modalities: [rgb, caption], hold_out: 0.4}}
engine: {runner: local, workers: 1, batch: 4}
"""
EVERY = ["tok_rgb@224", "tok_canny_edge@224", "det", "caption", "metadata", "color_palette"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_photos) -> Path:
    """A workspace of twelve photographs in three parts: one is cut short, three have no caption; and two notes."""
    folder = tmp_path_factory.mktemp("export")
    make_photos(folder / "photos", 11)
    (folder / "photos/cut.jpg").write_bytes((folder / "photos/photo001.jpg").read_bytes()[:900])
    (folder / "photos/cut.txt").write_text("a photograph that is cut short")
    (folder / "photos/photo005.txt").write_text("the end [EOS] is near, v0=5 too")
    (folder / "notes.jsonl").write_text('{"text": "one note"}\n{"text": "another"}\n')
    (folder / "pipeline.yaml").write_text(PIPELINE)
    done = job.run(pipeline.load(folder / "pipeline.yaml"), quiet=True)
    assert done.counts["new_samples"] == 14
    return folder / "work"


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "work"))


def do(work: Path, to: object, **asked: Any) -> str:
    return export(str(work), str(to), ExportRequest(**asked), quiet=True)


# -- readers of others ------------------------------------------------------------------------------------------------


def stems(tar: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar as WebDataset groups them: neighbors with one stem."""
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False):
        yield sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")}


def read_4m(folder: Path, modalities: list[str]) -> list[dict[str, Any]]:
    """Rows as apple/ml-4m's loader reads them: tars of one number side by side, zipped, keys compared, tokens to int64."""
    rows = []
    for number in range(len(list((folder / modalities[0]).iterdir()))):
        tars = [list(stems(folder / name / f"shard-{number:05d}.tar")) for name in modalities]
        assert len({len(tar) for tar in tars}) == 1
        for samples in zip(*tars, strict=True):
            assert len({key for key, _ in samples}) == 1, "Divergence detected!"
            row: dict[str, Any] = {"key": samples[0][0]}
            for name, (_, members) in zip(modalities, samples, strict=True):
                ((extension, data),) = members.items()
                row[name] = decoded(extension, data)
                if "tok_" in name and row[name] is not None:
                    assert row[name].dtype == np.int16
                    row[name] = row[name].astype("int64")
            rows.append(row)
    return rows


def decoded(extension: str, data: bytes) -> Any:
    if extension == "null":
        return None
    if extension.endswith("npy"):
        return np.load(io.BytesIO(data))
    if extension.endswith("json"):
        return json.loads(data)
    return data if extension.endswith(("png", "jpg")) else data.decode()


def read_4m_files(folder: Path, modalities: list[str]) -> list[dict[str, Any]]:
    """Rows as ml-4m's MultiModalDatasetFolder reads them: the files of each class of each modality, by sorted name."""
    columns = []
    for name in modalities:
        assert [path.name for path in (folder / name).iterdir()] == ["all"]
        columns.append(sorted((folder / name / "all").iterdir(), key=lambda path: path.name))
    assert len({len(column) for column in columns}) == 1
    rows = []
    for paths in zip(*columns, strict=True):
        assert len({path.stem for path in paths}) == 1
        row: dict[str, Any] = {"key": paths[0].stem}
        rows.append(row | {n: decoded(p.suffix[1:], p.read_bytes()) for n, p in zip(modalities, paths, strict=True)})
    return rows


def det_of_4m(instances: list[dict[str, Any]], settings: list[int], width: int, height: int) -> list[str]:
    """What ml-4m's DetectionTransform makes of a sample's boxes in one crop, but for the order of equal distances."""
    top, left, high, wide, flip = settings
    found = []
    for box in instances:
        x0, y0, x1, y1 = box["boxes"]
        x0, x1 = ((x * width - left) / wide for x in (x0, x1))
        y0, y1 = ((y * height - top) / high for y in (y0, y1))
        x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) for edge in (x0, y0, x1, y1))
        if box["score"] >= 0.6 and (x1 - x0) * (y1 - y0) > 0:
            found.append((1 - x1, y0, 1 - x0, y1, box["class_name"]) if flip else (x0, y0, x1, y1, box["class_name"]))
    return sorted(" ".join([*(f"v{i}={round(edge * 999)}" for i, edge in enumerate(box[:4])), box[4]]) for box in found)


def values(work: Path, modality: str, form: str, crop: int | None = None) -> dict[str, Any]:
    """What the current shards hold, by key, of the rows that are ok."""
    found = {}
    with Catalog.open(work) as catalog:
        rows = catalog.sql(
            "SELECT path, format FROM shards WHERE is_current AND corpus = 'photos' AND modality = ? AND form = ? "
            "AND crop IS NOT DISTINCT FROM ? ORDER BY part",
            [modality, form, crop],
        ).to_pylist()
        for row in rows:
            with catalog.storage.open(row["path"]) as file:
                read = shards.read_parquet(file) if row["format"] == "parquet" else shards.read_tar(file)
            ok = zip(read.keys, read.statuses, read.values or [], strict=True)
            found |= {key: value for key, status, value in ok if status == Status.OK}
    return found


def keys(work: Path, where: str = "true") -> list[str]:
    with Catalog.open(work) as catalog:
        query = f"SELECT key FROM samples WHERE corpus = 'photos' AND ({where}) ORDER BY part, row"
        return catalog.sql(query)["key"].to_pylist()


def sums_hold(folder: Path) -> bool:
    done = subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True)
    return done.returncode == 0


# -- the layout of 4M -------------------------------------------------------------------------------------------------


def test_4ms_layout_has_the_rows_that_are_whole_in_every_folder(made: Path, tmp_path: Path) -> None:
    said = do(made, tmp_path / "out", layout="4m", corpora=["photos"], rows_per_shard=3)
    captions, boxes, metadata = (values(made, name, "label") for name in ("caption", "boxes", "metadata"))
    whole = [key for key in keys(made) if key in captions and key in boxes]
    assert len(whole) == 8
    assert "exported 8 rows" in said
    assert "dropped 4 rows with nulls (caption in 3" in said
    rows = read_4m(tmp_path / "out", [*EVERY, "crop_settings"])
    assert [row["key"] for row in rows] == whole
    assert sorted(path.name for path in (tmp_path / "out/det").iterdir()) == [f"shard-0000{n}.tar" for n in range(3)]
    rgb = [values(made, "rgb", "token", crop) for crop in (0, 1)]
    edges = [values(made, "edges", "token", crop) for crop in (0, 1)]
    for row in rows:
        key = row["key"]
        assert row["tok_rgb@224"].tolist() == [crop[key] for crop in rgb]
        assert row["tok_canny_edge@224"].tolist() == [decode_npy(crop[key]).tolist() for crop in edges]
        assert row["caption"] == plain(captions[key])
        assert {box["score"] for box in row["det"]["instances"]} <= {1}
        assert row["metadata"] == {name: value for name, value in metadata[key].items() if value is not None}
        assert [box["boxes"] for box in row["det"]["instances"]] == [
            [box[side] for side in ("x0", "y0", "x1", "y1")] for box in boxes[key]
        ]
        assert [box["class_name"] for box in row["det"]["instances"]] == [box["class"] for box in boxes[key]]
        (palettes,) = row["color_palette"]
        assert {k: np.array(colors).shape for k, colors in palettes.items()} == {str(k): (k, 3) for k in range(1, 8)}
        width, height = metadata[key]["original_width"], metadata[key]["original_height"]
        assert row["crop_settings"].dtype == np.int64
        for number, (top, left, rows_high, columns_wide, flip) in enumerate(row["crop_settings"].tolist()):
            crop = plan_crop(CropRule(), key, number, width, height)
            assert (left / width, top / height, bool(flip)) == (crop.x0, crop.y0, crop.flip)
            assert ((left + columns_wide) / width, (top + rows_high) / height) == (crop.x1, crop.y1)
    assert sums_hold(tmp_path / "out")
    assert "the end [ EOS] is near, v0 =5 too" in [row["caption"] for row in rows]
    described = json.loads((tmp_path / "out/export.json").read_text())["folders"]
    assert described["tok_rgb@224"]["vocabulary"] == 32
    # The files that decode the tokens, and that ml-4m takes as its `text_tokenizer_path`.
    for name, file in (
        ("tok_rgb@224", "model.safetensors"),
        ("caption", "tokenizer.json"),
        ("metadata", "tokenizer.json"),
    ):
        path = f"{described[name]['tokenizer']}/{file}"
        assert (tmp_path / "out" / path).read_bytes() == (made / path).read_bytes()


def test_nulls_that_are_kept_keep_their_place(made: Path, tmp_path: Path) -> None:
    do(made, tmp_path / "out", layout="4m", corpora=["photos"], nulls="keep")
    rows = read_4m(tmp_path / "out", [*EVERY, "crop_settings", "row"])
    assert [row["key"] for row in rows] == keys(made)
    captions, boxes = values(made, "caption", "label"), values(made, "boxes", "label")
    assert [row["key"] for row in rows if row["row"]["status"]["caption"] == 0] == [
        key for key in keys(made) if key in captions
    ]
    nulls = [row for row in rows if row["key"] not in boxes]
    assert len(nulls) == 1
    assert nulls[0]["row"]["status"]["tok_rgb@224"] == Status.FAILED
    # An empty member: a loader that knows nothing of nulls stops, instead of taking numbers that stand for none.
    assert [name for name in (*EVERY, "crop_settings") if nulls[0][name] is not None] == ["caption"]
    assert [row["caption"] is None for row in rows] == [row["key"] not in captions for row in rows]


def test_pixels_come_as_crop_zero_with_all_else_cropped_to_it(made: Path, tmp_path: Path) -> None:
    do(made, tmp_path / "out", layout="4m", corpora=["photos"], modalities=["rgb@224", "rgb", "boxes"])
    rows = read_4m(tmp_path / "out", ["rgb", "tok_rgb@224", "det", "crop_settings"])
    pixels, tokens = values(made, "rgb", "label", 0), values(made, "rgb", "token", 0)
    boxes, metadata = values(made, "boxes", "label"), values(made, "metadata", "label")
    assert len(rows) == 11
    for row in rows:
        key = row["key"]
        assert row["rgb"] == pixels[key]
        assert row["tok_rgb@224"].tolist() == [tokens[key]]
        assert row["crop_settings"].tolist() == [[0, 0, 224, 224, 0]]
        crop = plan_crop(CropRule(), key, 0, metadata[key]["original_width"], metadata[key]["original_height"])
        cropped = crop_label(MODALITIES["boxes"], boxes[key], crop, 224)
        assert [box["boxes"][0] for box in row["det"]["instances"]] == [box["x0"] for box in cropped]


def test_whole_photographs_keep_every_crop_and_det(made: Path, tmp_path: Path) -> None:
    do(made, tmp_path / "out", layout="4m", corpora=["photos"], modalities=["photographs", "rgb", "boxes"])
    rows = read_4m(tmp_path / "out", ["rgb", "tok_rgb@224", "det", "crop_settings"])
    boxes, metadata = values(made, "boxes", "label"), values(made, "metadata", "label")
    tokens = [values(made, "rgb", "token", crop) for crop in (0, 1)]
    assert [row["key"] for row in rows] == [key for key in keys(made) if key in tokens[0]]
    for row in rows:
        key = row["key"]
        assert row["tok_rgb@224"].tolist() == [crop[key] for crop in tokens]
        width, height = metadata[key]["original_width"], metadata[key]["original_height"]
        assert images.decode(row["rgb"]).shape == (height, width, 3)
        for number, settings in enumerate(row["crop_settings"].tolist()):
            crop = plan_crop(CropRule(), key, number, width, height)
            ours = box_records(crop_label(MODALITIES["boxes"], boxes[key], crop, 224))
            theirs = det_of_4m(row["det"]["instances"], settings, width, height)
            # ml-4m rounds in float64: a coordinate may be one bin off.
            for mine in ours:
                theirs.remove(next(other for other in theirs if near(mine, other)))
            assert theirs == []
    assert sum(len(row["det"]["instances"]) for row in rows) == sum(len(boxes[row["key"]]) for row in rows)


def near(mine: str, other: str) -> bool:
    bins, others = ([int(n) for n in re.findall(r"v\d=(\d+)", record)] for record in (mine, other))
    return mine.split()[4:] == other.split()[4:] and all(abs(a - b) <= 1 for a, b in zip(bins, others, strict=True))


def test_a_photograph_that_is_gone_or_another_costs_its_row(
    tmp_path: Path, make_photos, capsys: pytest.CaptureFixture[str]
) -> None:
    make_photos(tmp_path / "photos", 5)
    (tmp_path / "p.yaml").write_text(
        "workspace: work\ncorpora: {photos: {source: photos, modalities: {rgb: {}, metadata: {tokens: false}}}}\n"
        "tokenizers: {rgb: {steps: 2, batch: 4, codebook: 32, width: 16}}\nengine: {runner: local, workers: 1}\n"
    )
    job.run(pipeline.load(tmp_path / "p.yaml"), quiet=True)
    (tmp_path / "photos/photo001.jpg").unlink()
    shutil.copy(tmp_path / "photos/photo002.jpg", tmp_path / "photos/photo003.jpg")
    request = ExportRequest(layout="4m", modalities=["photographs", "rgb"])
    said = export(str(tmp_path / "work"), str(tmp_path / "out"), request)
    assert "exported 3 rows" in said
    assert "dropped 2 rows with nulls (rgb in 2)" in said
    told = capsys.readouterr().err
    assert "2 photographs of part 0 cannot be had: photo00" in told
    rows = read_4m(tmp_path / "out", ["rgb", "tok_rgb@224"])
    assert len({row["rgb"] for row in rows}) == 3


def test_text_goes_where_4m_reads_it(made: Path, tmp_path: Path) -> None:
    do(made, tmp_path / "out", layout="4m", corpora=["notes"])
    read = pq.read_table(tmp_path / "out/train-00000.parquet").to_pydict()
    assert sorted(read["text"]) == ["another", "one note"]
    assert sums_hold(tmp_path / "out")
    asked = {"layout": "4m", "corpora": ["photos"], "modalities": ["caption"], "rows_per_shard": 5}
    do(made, tmp_path / "captions", **asked)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "captions").glob("train-*.parquet"))]
    assert [table.num_rows for table in tables] == [5, 4]
    captions = values(made, "caption", "label")
    assert [text for table in tables for text in table["text"].to_pylist()] == [
        plain(captions[key]) for key in keys(made) if key in captions
    ]
    do(made, tmp_path / "held", **asked, snapshot="most", held_out=True)
    assert (tmp_path / "held/validation-00000.parquet").exists()


def test_rows_of_a_snapshot_and_of_a_condition(made: Path, tmp_path: Path) -> None:
    snapshot = open_snapshot(f"{made}#most")
    held_out = [part.held_out for part in snapshot.parts]
    for name, is_judged in (("train", False), ("other", True)):
        do(made, tmp_path / name, layout="4m", snapshot="most", held_out=is_judged, modalities=["rgb", "metadata"])
    folders = ["tok_rgb@224", "metadata", "crop_settings"]
    trained = {row["key"] for row in read_4m(tmp_path / "train", folders)}
    # 4M validates on plain files.
    others = read_4m_files(tmp_path / "other", folders)
    tokens = [values(made, "rgb", "token", crop) for crop in (0, 1)]
    assert all(row["tok_rgb@224"].tolist() == [crop[row["key"]] for crop in tokens] for row in others)
    assert sums_hold(tmp_path / "other")
    rows = {row["key"] for row in others}
    assert not trained & rows
    assert trained | rows == set(keys(made, "part < 2")) & set(tokens[0])
    assert 0 < len(rows) <= sum(int(part.sum()) for part in held_out)
    do(made, tmp_path / "some", layout="4m", where="corpus = 'photos' AND row = 1", modalities=["tok_rgb@224"])
    assert {row["key"] for row in read_4m(tmp_path / "some", ["tok_rgb@224"])} <= set(keys(made, "row = 1"))
    with pytest.raises(ConfigError, match="no row to export"):
        do(made, tmp_path / "none", layout="4m", where="key = 'x'")


def test_what_was_forgotten_is_in_no_export_of_an_older_snapshot(work: Path, tmp_path: Path) -> None:
    before = keys(work, "part = 0")
    with Catalog.open(work) as catalog:
        files = catalog.sql("SELECT path FROM shards WHERE corpus = 'photos' AND part = 0")["path"].to_pylist()
        gone = {"rows": [0, 1, 2, 3], "keys": before[:4], "sources_sha256": [], "files": files}
        catalog.commit([Forgotten(corpus="photos", part=0, **gone)], run="r")
    do(work, tmp_path / "out", layout="4m", snapshot="most", modalities=["rgb"])
    assert {row["key"] for row in read_4m(tmp_path / "out", ["tok_rgb@224"])}.isdisjoint(before[:4])
    with pytest.raises(ConfigError, match="forgotten since"):
        do(work, tmp_path / "copy", snapshot="most")
    do(work, tmp_path / "copy")
    with Catalog.open(tmp_path / "copy") as catalog:
        assert catalog.snapshots().num_rows == 0


# -- plain WebDataset -------------------------------------------------------------------------------------------------


def test_webdataset_reads_what_the_shards_hold(made: Path, tmp_path: Path) -> None:
    do(made, tmp_path / "out", layout="webdataset", modalities=["rgb", "caption", "boxes", "text"], rows_per_shard=4)
    folder = tmp_path / "out/photos"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*")) == [
        *("boxes/label", "caption/label", "caption/token", "rgb/label", "rgb/token")
    ]
    tars = sorted((folder / "rgb/token").iterdir())
    assert [tar.name for tar in tars] == ["shard-00000.tar", "shard-00001.tar"]
    read = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode()
    rows = {row["__key__"]: row for row in read}
    tokens = [values(made, "rgb", "token", crop) for crop in (0, 1)]
    captions = values(made, "caption", "label")
    assert list(rows) == [key for key in keys(made) if key in captions and key in tokens[0]]
    for key, row in rows.items():
        assert row["c00.npy"].dtype == np.uint8
        assert [row["c00.npy"].tolist(), row["c01.npy"].tolist()] == [crop[key] for crop in tokens]
    texts = dict(read_all(folder / "caption/label"))
    assert {key: members["txt"].decode() for key, members in texts.items()} == {key: captions[key] for key in rows}
    assert [key for key, _ in read_all(folder / "rgb/label")] == list(rows)
    assert [len(members) for _, members in read_all(folder / "rgb/label")] == [2] * len(rows)
    assert len(read_all(tmp_path / "out/notes/text/label")) == 2
    with tarfile.open(tars[0]) as tar:
        assert {(info.mtime, info.uid, info.uname, info.mode) for info in tar} == {(0, 0, "", 0o644)}
    assert sums_hold(tmp_path / "out")


def read_all(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    return [sample for tar in sorted(folder.iterdir()) for sample in stems(tar)]


def test_webdataset_with_nulls_kept_says_which_rows_are(made: Path, tmp_path: Path) -> None:
    do(made, tmp_path / "out", layout="webdataset", corpora=["photos"], nulls="keep", form="label")
    captions = values(made, "caption", "label")
    read = read_all(tmp_path / "out/photos/caption/label")
    assert [key for key, _ in read] == keys(made)
    for key, members in read:
        assert members["status.cls"] == (b"0" if key in captions else b"2")
        assert ("txt" in members) == (key in captions)
    assert not (tmp_path / "out/photos/rgb/token").exists()


# -- an export that stands, or is wrong -------------------------------------------------------------------------------


def test_a_killed_export_goes_on_and_equal_rows_give_equal_bytes(made: Path, tmp_path: Path) -> None:
    asked = {"layout": "4m", "corpora": ["photos"], "rows_per_shard": 3}
    do(made, tmp_path / "one", **asked)
    assert "nothing to do" in do(made, tmp_path / "one", **asked)
    # As a kill leaves it: some tars, no sums.
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two/SHA256SUMS").unlink()
    shutil.rmtree(tmp_path / "two/det")
    do(made, tmp_path / "two", **asked)
    assert (tmp_path / "one/SHA256SUMS").read_bytes() == (tmp_path / "two/SHA256SUMS").read_bytes()
    (tmp_path / "two/SHA256SUMS").unlink()
    (tmp_path / "two/det/shard-00001.tar").write_bytes(b"else")
    with pytest.raises(ConfigError, match=r"det/shard-00001.tar stands with other content"):
        do(made, tmp_path / "two", **asked)
    with pytest.raises(ConfigError, match=r"holds another export \(its nulls is 'drop', here 'keep'\)"):
        do(made, tmp_path / "one", **asked, nulls="keep")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"layout": "4m"},
            "the 4M layout holds one corpus, and the picked rows are in notes, photos; name one with --corpora",
        ),
        ({"layout": "4m", "corpora": ["photo"]}, "no corpus 'photo'.*did you mean 'photos'"),
        ({"layout": "4m", "corpora": ["photos"], "modalities": ["edgs"]}, "no modality 'edgs'.*did you mean 'edges'"),
        ({"layout": "4m", "corpora": ["photos"], "modalities": ["instances"]}, "pickled polygons"),
        ({"layout": "4m", "corpora": ["photos"], "form": "token"}, "--form"),
        (
            {"layout": "4m", "corpora": ["photos"], "modalities": ["metadata", "caption"]},
            "reads caption, metadata only beside tokens of images.*add tok_canny_edge@224 or tok_rgb@224, or name caption",
        ),
        ({"layout": "4m", "corpora": ["notes"], "nulls": "keep"}, "--nulls keep: only tars have a place"),
        (
            {"layout": "4m", "snapshot": "most", "held_out": True, "nulls": "keep", "modalities": ["rgb"]},
            "--nulls keep: only tars have a place",
        ),
        (
            {"layout": "4m", "corpora": ["photos"], "modalities": ["rgb", "rgb@224", "photographs"]},
            "rgb@224 and photographs are both the folder rgb",
        ),
        ({"layout": "webdataset", "modalities": ["captoin"]}, "did you mean 'caption'"),
        ({"modalities": ["captoin"]}, "did you mean 'caption'"),
        ({"modalities": ["boxes"], "form": "token"}, "no token shards"),
        ({"where": "row = 1"}, "--where is only for tars"),
        ({"held_out": True}, "name one with --snapshot"),
        ({"snapshot": "most", "modalities": ["rgb"]}, "leave --corpora"),
    ],
)
def test_what_cannot_be_had_is_said(made: Path, tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        do(made, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_what_others_have(made: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for asked in ({"layout": "webdataset"}, {}):
        with pytest.raises(ConfigError, match=r"not empty \(mine.txt"):
            do(made, tmp_path / "full", **asked)
    log.create_workspace(open_storage(tmp_path / "other"))
    with Catalog.open(tmp_path / "other") as catalog:
        catalog.commit([Forgotten(corpus="x", part=0, rows=[], keys=[], sources_sha256=[], files=[])], run="r")
    with pytest.raises(ConfigError, match="but no copy of"):
        do(made, tmp_path / "other")
    with pytest.raises(ConfigError, match="is the workspace itself"):
        do(made, made)


@pytest.mark.parametrize("layout", ["4m", "webdataset", None])
def test_an_altered_shard_is_refused_by_name(work: Path, tmp_path: Path, layout: Any) -> None:
    with Catalog.open(work) as catalog:
        query = "SELECT path FROM shards WHERE modality = 'rgb' AND form = 'token' AND part = 1 AND crop = 1"
        path = catalog.sql(query)["path"][0].as_py()
    data = bytearray((work / path).read_bytes())
    data[len(data) // 2] ^= 1
    (work / path).write_bytes(data)
    with pytest.raises(ShardError, match=rf"{path} has sha256"):
        do(work, tmp_path / "out", layout=layout, corpora=["photos"])
    assert not (tmp_path / "out" / path).exists()
    assert not (tmp_path / "out/SHA256SUMS").exists()
    (work / path).unlink()
    with pytest.raises(ShardError, match=path):
        do(work, tmp_path / "out", layout=layout, corpora=["photos"])


# -- copies -----------------------------------------------------------------------------------------------------------

VIEWS = "corpora, parts, shards, recipes, coverage, tokenizers, snapshots, samples, failures, captions, boxes, lineage"


def seen(work: object) -> dict[str, list[Any]]:
    """What the views say of a workspace, but for versions and times."""
    found = {}
    with Catalog.open(str(work)) as catalog:
        for view in VIEWS.split(", "):
            rows = catalog.sql(f"SELECT * FROM {view}").to_pylist()
            found[view] = sorted(
                repr({name: value for name, value in row.items() if name not in ("version", "time")}) for row in rows
            )
    return found


def findings(work: object) -> list[str]:
    with Catalog.open(str(work)) as catalog:
        return [f"{finding.path}: {finding.problem}" for finding in verify(catalog).findings]


def test_a_copy_is_a_workspace_of_its_own_that_says_the_same(made: Path, tmp_path: Path) -> None:
    said = do(made, tmp_path / "copy")
    assert said.startswith("copied ")
    assert findings(tmp_path / "copy") == []
    assert seen(tmp_path / "copy") == seen(made)
    assert log.workspace_id(open_storage(tmp_path / "copy")) != log.workspace_id(open_storage(made))
    assert open_snapshot(f"{tmp_path / 'copy'}#most").sha256 == open_snapshot(f"{made}#most").sha256
    assert "nothing to do" in do(made, tmp_path / "copy")
    with Catalog.open(tmp_path / "copy") as catalog:
        kinds = catalog.sql("SELECT kind, status FROM runs").to_pylist()
    assert [(row["kind"], row["status"]) for row in kinds] == [("export", "done"), ("run", "done"), ("export", "done")]


def test_a_workspace_may_be_moved(work: Path, tmp_path: Path) -> None:
    before = seen(work)
    moved = work.rename(tmp_path / "elsewhere")
    assert seen(moved) == before
    assert findings(moved) == []
    do(moved, tmp_path / "copy", modalities=["rgb"])
    copy = (tmp_path / "copy").rename(tmp_path / "deeper")
    assert findings(copy) == []


def test_a_copy_of_some_modalities_has_what_they_need(made: Path, tmp_path: Path) -> None:
    do(made, tmp_path / "copy", modalities=["rgb", "caption"], corpora=["photos"])
    assert findings(tmp_path / "copy") == []
    with Catalog.open(tmp_path / "copy") as catalog:
        rows = catalog.sql("SELECT DISTINCT corpus, modality, form FROM shards ORDER BY ALL").to_pylist()
        tokenizers = [tokenizer.name for tokenizer in catalog.tokenizers()]
        done = catalog.sql("SELECT bool_and(parts_missing = 0) AS done, count(*) AS n FROM coverage").to_pylist()
        samples = catalog.sql("SELECT count(*) AS n FROM samples")["n"][0].as_py()
        failed = catalog.sql("SELECT DISTINCT modality FROM failures").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("photos", "caption", "label"),
        ("photos", "caption", "token"),
        ("photos", "rgb", "label"),
        ("photos", "rgb", "token"),
    ]
    assert tokenizers == ["rgb", "text"]
    assert done == [{"done": True, "n": 4}]
    assert (samples, failed) == (12, [{"modality": "rgb"}])
    assert not (tmp_path / "copy/data/notes").exists()
    # More of the same workspace goes to the same copy; what stands is not copied again.
    said = do(made, tmp_path / "copy", modalities=["boxes"], corpora=["photos"])
    assert "copied 7 files" in said
    assert findings(tmp_path / "copy") == []


def test_a_copy_of_a_snapshot_is_what_a_training_needs(made: Path, tmp_path: Path) -> None:
    do(made, tmp_path / "copy", snapshot="most")
    assert findings(tmp_path / "copy") == []
    copied, source = open_snapshot(f"{tmp_path / 'copy'}#most"), open_snapshot(f"{made}#most")
    assert copied.sha256 == source.sha256
    with Catalog.open(tmp_path / "copy") as catalog:
        paths = set(catalog.sql("SELECT path FROM shards")["path"].to_pylist())
        parts = {(row["corpus"], row["part"]) for row in catalog.sql("SELECT corpus, part FROM parts").to_pylist()}
    assert paths == {shard.path for shard in source.shards}
    assert parts == {("photos", 0), ("photos", 1)}


KILLED = """
import os, sys
from engine.export.request import ExportRequest, export
from manifests.store.storage import Storage
left, put = int(sys.argv[3]), Storage.put
def putting(self, path, data):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return put(self, path, data)
Storage.put = putting
export(sys.argv[1], sys.argv[2], ExportRequest(), quiet=True)
"""


@pytest.mark.parametrize("files", [1, 4, 31, 90])
def test_a_killed_copy_goes_on_where_it_was(made: Path, tmp_path: Path, files: int) -> None:
    command = [sys.executable, "-c", KILLED, str(made), str(tmp_path / "copy"), str(files)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy/data").rglob("*.*") if path.suffix != ".tmp"}
    if files > 3:
        assert findings(tmp_path / "copy") == []
    do(made, tmp_path / "copy")
    assert findings(tmp_path / "copy") == []
    assert seen(tmp_path / "copy") == seen(made)
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize(
    "path", ["tokenizers/rgb-*/config.json", "data/photos/rgb/*/*c00-*.json", "_meta/snapshots/most/*.json"]
)
def test_an_altered_companion_is_refused_by_name(work: Path, tmp_path: Path, path: str) -> None:
    (altered, *_) = sorted(work.glob(path))
    altered.write_text('{"shard": {"sha256": "00"}}')
    with pytest.raises(ShardError, match=str(altered.parent)):
        do(work, tmp_path / "copy")


def test_a_copy_tells_of_sidecars_that_are_gone(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sidecars = list(work.glob("data/photos/rgb/*/*.json"))
    for sidecar in sidecars:
        sidecar.unlink()
    export(str(work), str(tmp_path / "copy"), ExportRequest())
    assert f"{len(sidecars)} shards of the source have no sidecar" in capsys.readouterr().err
    left = findings(tmp_path / "copy")
    assert len(left) == len(sidecars)
    assert all("its sidecar is gone" in problem for problem in left)


def test_a_file_that_stands_cut_in_the_copy_is_not_taken_for_whole(made: Path, tmp_path: Path) -> None:
    with Catalog.open(made) as catalog:
        path = catalog.sql("SELECT path FROM shards ORDER BY path")["path"][0].as_py()
    do(made, tmp_path / "copy", modalities=["edges"])
    (tmp_path / "copy" / path).parent.mkdir(parents=True)
    (tmp_path / "copy" / path).write_bytes((made / path).read_bytes()[:-1])
    with pytest.raises(ShardError, match=rf"{path} holds sha256"):
        do(made, tmp_path / "copy")
    (tmp_path / "copy" / path).unlink()
    do(made, tmp_path / "copy")
    assert seen(tmp_path / "copy") == seen(made)


def test_a_copy_takes_up_what_the_source_has_since(work: Path, make_photos, made: Path, tmp_path: Path) -> None:
    do(work, tmp_path / "copy")
    make_photos(tmp_path / "photos", 3, seed=7)
    file = tmp_path / "more.yaml"
    file.write_text(
        f"workspace: {work}\ncorpora: {{more: {{source: {tmp_path / 'photos'}, modalities: [palette]}}}}\n"
        "engine: {runner: local, workers: 1, batch: 4}\n"
    )
    for gone in (None, "photo001.jpg", "photo002.jpg"):
        if gone is not None:
            (tmp_path / "photos" / gone).unlink()
        job.run(pipeline.load(file), quiet=True)
        do(work, tmp_path / "copy")
        assert findings(tmp_path / "copy") == []
        assert seen(tmp_path / "copy") == seen(work)
    with Catalog.open(tmp_path / "copy") as catalog:
        assert [row["vanished"] for row in catalog.corpora() if row["corpus"] == "more"] == [2]
    names = {path.name for path in (work / "data/more/_samples").iterdir()}
    assert names == {path.name for path in (tmp_path / "copy/data/more/_samples").iterdir()}


def test_exports_go_to_an_object_store_and_come_back(made: Path, tmp_path: Path, s3_bucket: str) -> None:
    do(made, f"{s3_bucket}/copy", modalities=["rgb", "caption"])
    assert findings(f"{s3_bucket}/copy") == []
    assert "nothing to do" in do(made, f"{s3_bucket}/copy", modalities=["rgb", "caption"])
    export(f"{s3_bucket}/copy", str(tmp_path / "back"), ExportRequest(), quiet=True)
    assert findings(tmp_path / "back") == []
    assert seen(tmp_path / "back") == seen(f"{s3_bucket}/copy")
    do(made, f"{s3_bucket}/tars", layout="webdataset", modalities=["caption"])
    do(made, tmp_path / "tars", layout="webdataset", modalities=["caption"])
    stored = open_storage(f"{s3_bucket}/tars")
    assert stored.read("SHA256SUMS") == (tmp_path / "tars/SHA256SUMS").read_bytes()
    assert stored.read("photos/caption/token/shard-00000.tar")
    asked = ExportRequest(layout="webdataset", modalities=["caption"], corpora=["photos"])
    export(f"{s3_bucket}/copy", str(tmp_path / "from"), asked, quiet=True)
    assert read_all(tmp_path / "from/photos/caption/token") == read_all(tmp_path / "tars/photos/caption/token")


def test_a_copy_needs_no_more_than_the_base(made: Path, tmp_path: Path) -> None:
    heavy = ("torch", "ray", "cv2", "PIL", "pandas", "skimage", "transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({heavy!r})); "
    code += "from engine.export.request import ExportRequest, export; "
    code += "export(sys.argv[1], sys.argv[2], ExportRequest(), quiet=True)"
    done = subprocess.run(
        [sys.executable, "-c", code, made, tmp_path / "copy"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert seen(tmp_path / "copy") == seen(made)


def test_the_verb(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> int:
        with pytest.raises(SystemExit) as end:
            entry.main(["export", str(made), "--to", str(tmp_path / "out"), *arguments])
        return int(end.value.code or 0)

    tars = ("--layout", "4m", "--corpora", "photos", "--modalities", "rgb, caption", "--snapshot", "most")
    assert command(*tars, "--held-out", "--nulls", "keep") == 2
    assert command(*tars, "--rows-per-shard", "2", "--nulls", "keep", "--where", "row < 4") == 0
    assert f" rows to {tmp_path / 'out'}: 4 folders, " in capsys.readouterr().out
    assert command("--layout", "webdataset", "--form", "token") == 2
    assert "holds another export" in capsys.readouterr().err


def test_a_file_is_no_place_for_an_export(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for asked in ({}, {"layout": "webdataset"}):
        with pytest.raises(ConfigError, match="is a file"):
            do(made, tmp_path / "file", **asked)
