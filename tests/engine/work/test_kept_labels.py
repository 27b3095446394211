"""Persons and embeddings that lie beside the photographs: kept as Parquet, verified, shown, exported and asked by SQL."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

import modmill
from engine.cli import entry
from engine.pipeline import config as pipeline
from engine.run import job
from engine.upkeep.verify import verify
from manifests.catalog.catalog import Catalog

PIPELINE = """
workspace: work
corpora:
  photos:
    source: photos
    crops: 2
    part_rows: 3
    modalities:
      dinov2_global: {labeler: files, parameters: {path: "{stem}.npy"}, keep: true}
      poses: {parameters: {path: "{stem}.json"}}
engine: {runner: local, workers: 1, batch: 4}
"""
PERSON = {"class": "person", "score": 0.9, "x0": 0.1, "y0": 0.2, "x1": 0.5, "y1": 0.9}
POSE = {"global_orient": [1.0] * 9, "body_pose": [0.0] * 207, "betas": [0.5] * 10, "camera": [0.9, 0.0, 0.0]}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, make_photos) -> Path:
    """Five photographs: photo i has i persons and the vector (i, 0, 0, ...); the last has neither file."""
    folder = tmp_path_factory.mktemp("kept")
    make_photos(folder / "photos", 5)
    for number in range(4):
        vector = np.zeros(768)
        vector[:2] = number, 1
        np.save(folder / f"photos/photo{number:03d}.npy", vector)
        (folder / f"photos/photo{number:03d}.json").write_text(json.dumps([{**PERSON, **POSE}] * number))
    (folder / "pipeline.yaml").write_text(PIPELINE)
    done = job.run(pipeline.load(folder / "pipeline.yaml"), quiet=True)
    assert done.counts["failed_rows"] == 0
    return folder / "work"


def test_sql_asks_for_what_they_say(work: Path) -> None:
    with modmill.open(work) as workspace:
        near = (
            "SELECT source, crop FROM dinov2_global JOIN samples USING (corpus, key) "
            "ORDER BY array_distance(embedding, ([2.9, 1] || repeat([0], 766))::FLOAT[768]), crop LIMIT 3"
        )
        found = workspace.sql(near).to_pylist()
        assert [(row["source"], row["crop"]) for row in found] == [
            ("photo003.jpg", 0),
            ("photo003.jpg", 1),
            ("photo002.jpg", 0),
        ]
        crowds = (
            "SELECT source, count(*) AS n FROM persons JOIN samples USING (corpus, key) WHERE area > 0.2 GROUP BY ALL"
        )
        assert {row["source"]: row["n"] for row in workspace.sql(crowds).to_pylist()} == {
            f"photo{number:03d}.jpg": number for number in (1, 2, 3)
        }
        key = workspace.sql("SELECT key FROM samples WHERE source = 'photo001.jpg'")["key"][0].as_py()
        shown = workspace.show(key, corpus="photos")["label"]
        assert shown["dinov2_global"][1][:3] == [1.0, 1.0, 0.0]
        assert shown["poses"][None][0]["betas"] == [0.5] * 10


def test_they_verify_and_parts_know_their_keys(work: Path) -> None:
    with Catalog.open(work) as catalog:
        found = verify(catalog, deep=True)
        assert (found.findings, found.shards) == ([], 6)
        ends = catalog.sql(
            "SELECT p.key_min, p.key_max, min(key) AS least, max(key) AS greatest FROM parts p "
            "JOIN samples s USING (corpus, part) GROUP BY ALL"
        ).to_pylist()
    assert len(ends) == 2
    assert all((row["key_min"], row["key_max"]) == (row["least"], row["greatest"]) for row in ends)


def test_they_are_exported(work: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        entry.main(["export", str(work), "--to", str(tmp_path / "out"), "--layout", "webdataset"])
    assert not end.value.code
    members = {}
    for path in (tmp_path / "out").rglob("*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                if "dinov2_global" in str(path) and info.name.endswith(".npy"):
                    members[info.name] = np.load(io.BytesIO(tar.extractfile(info).read()))  # type: ignore[union-attr]
    assert {(array.dtype.name, array.shape) for array in members.values()} == {("float32", (768,))}
    assert len(members) == 8
