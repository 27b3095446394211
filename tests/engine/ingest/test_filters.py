"""Filters before labeling: what they leave out, that SQL tells why, and that it stays left out."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from engine.ingest import ingest
from engine.pipeline.config import CorpusConfig
from engine.sources import images
from manifests.catalog.catalog import Catalog
from manifests.formats.shards import read_samples
from manifests.log import entries as log
from manifests.store.storage import Storage, open_storage

ASKED = "SELECT source, reason, message FROM dropped ORDER BY source"


def created(path: Path) -> Storage:
    storage = open_storage(path)
    log.create_workspace(storage)
    return storage


def write(path: Path, width: int, height: int, seed: int = 0, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def config(source: Path, **options: Any) -> CorpusConfig:
    return CorpusConfig.model_validate({"source": str(source), **options})


def test_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write(folder / "good.jpg", 60, 50)
    write(folder / "low.jpg", 60, 20)
    write(folder / "wide.jpg", 200, 50)
    # Upright it is 50 wide and 60 high.
    write(folder / "turned.jpg", 60, 50, orientation=6)
    (folder / "broken.jpg").write_bytes(b"no image")
    asked = config(folder, filter={"min_side": 30, "aspect": [0.5, 2], "min_height": 55})
    with Catalog(created(tmp_path / "work")) as catalog:
        found = ingest.ingest(catalog, "photos", asked, run="r")
        assert (found.new, found.dropped, found.new_parts) == (2, 3, 1)
        assert catalog.sql(ASKED).to_pylist() == [
            {"source": "good.jpg", "reason": "small", "message": "60 x 50 px, below min_height 55"},
            {"source": "low.jpg", "reason": "small", "message": "60 x 20 px, below min_height 55"},
            {"source": "wide.jpg", "reason": "small", "message": "200 x 50 px, below min_height 55"},
        ]
        assert "3 samples are left out by the filter (3 small); the view `dropped` has them" in found.notes
        sources = catalog.sql("SELECT source FROM samples ORDER BY source")["source"].to_pylist()
        # What has no header that can be read is a row, which will say so.
        assert sources == ["broken.jpg", "turned.jpg"]
        before = catalog.parts("photos")
        again = ingest.ingest(catalog, "photos", asked, run="r")
        assert (again.new, again.dropped, again.notes) == (0, 0, [])
        assert catalog.parts("photos") == before
    with Catalog(created(tmp_path / "work2")) as catalog:
        ingest.ingest(catalog, "photos", config(folder, filter={"aspect": [0.5, 2], "min_width": 55}), run="r")
        assert {row["source"]: row["message"] for row in catalog.sql(ASKED).to_pylist()} == {
            "low.jpg": "60 x 20 px: 3.000, outside 0.5 to 2",
            "turned.jpg": "50 x 60 px, below min_width 55",
            "wide.jpg": "200 x 50 px: 4.000, outside 0.5 to 2",
        }


def test_duplicates_within_and_across(tmp_path: Path, make_photos: Callable[..., Path]) -> None:
    folder = make_photos(tmp_path / "photos", 5)
    for name in ("a", "b"):
        (folder / f"copy_{name}.jpg").write_bytes((folder / "photo001.jpg").read_bytes())
    (folder / "empty_a.jpg").write_bytes(b"")
    (folder / "empty_b.jpg").write_bytes(b"")
    other = make_photos(tmp_path / "other", 6)
    storage = created(tmp_path / "work")
    with Catalog(storage) as catalog:
        within = config(folder, filter={"duplicates": "within"}, part_rows=3)
        found = ingest.ingest(catalog, "photos", within, run="r")
        assert (found.new, found.dropped) == (7, 2)
        reasons = catalog.sql("SELECT DISTINCT reason, message FROM dropped").to_pylist()
        assert reasons == [{"reason": "duplicate", "message": "its bytes are those of an earlier sample of the corpus"}]
        joined = "SELECT count(*) AS n FROM dropped d JOIN samples s USING (corpus, sha256)"
        assert catalog.sql(joined)["n"].to_pylist() == [2]
        # Those of another corpus are no duplicates within this one.
        assert ingest.ingest(catalog, "same", config(other, filter={"duplicates": "within"}), run="r").dropped == 0
        across = config(other, filter={"duplicates": "across"})
        everything = ingest.ingest(catalog, "all_dropped", across, run="r")
        assert (everything.new, everything.new_parts, everything.dropped) == (0, 0, 6)
        assert ingest.ingest(catalog, "all_dropped", across, run="r").dropped == 0
        # A copy that comes later is one of those that were there before; parts stay as they are.
        parts = catalog.parts("photos")
        (folder / "later.jpg").write_bytes((folder / "photo002.jpg").read_bytes())
        (folder / "new.jpg").write_bytes(cv2.imencode(".jpg", np.zeros((40, 40, 3), np.uint8))[1].tobytes())
        found = ingest.ingest(catalog, "photos", within, run="r")
        assert (found.new, found.dropped) == (1, 1)
        assert catalog.parts("photos")[: len(parts)] == parts
        assert read_samples(storage.read(catalog.parts("photos")[-1].path))[0].source == "new.jpg"
        last = catalog.sql("SELECT corpus, sum(rows)::INT AS n FROM parts GROUP BY corpus ORDER BY corpus").to_pylist()
        assert last == [{"corpus": "photos", "n": 8}, {"corpus": "same", "n": 6}]


def test_documents_have_duplicates_but_no_size(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / "docs" / f"{name}.txt").write_text(text)
    with Catalog(created(tmp_path / "work")) as catalog:
        asked = config(tmp_path / "docs", kind="text", filter={"duplicates": "within"})
        assert ingest.ingest(catalog, "docs", asked, run="r").dropped == 1
        assert catalog.sql(ASKED)["source"].to_pylist() == ["c.txt"]
    with pytest.raises(ValueError, match="filter looks at sizes of images"):
        config(tmp_path, kind="text", filter={"min_side": 3})


def test_an_empty_view(tmp_path: Path) -> None:
    with Catalog(created(tmp_path / "work")) as catalog:
        assert catalog.sql("SELECT * FROM dropped").column_names == [
            *("corpus", "key", "source", "size_bytes", "sha256", "reason", "message")
        ]


def test_what_is_of_another_kind_can_be_asked_and_becomes_a_sample_once_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    write(folder / "a.jpg", 60, 50)
    write(folder / "b.tif", 60, 50)
    for name in ("c.heic", "d.mov", "e.mov"):
        (folder / name).write_bytes(b"x")
    asked = config(folder, filter={"min_side": 30})
    with Catalog(created(tmp_path / "work")) as catalog:
        found = ingest.ingest(catalog, "photos", asked, run="r")
        assert (found.new, found.dropped, found.suffixes) == (2, 0, {".jpg", ".tif"})
        assert catalog.sql(ASKED).to_pylist() == [
            {"source": "c.heic", "reason": "kind", "message": "of kind .heic"},
            {"source": "d.mov", "reason": "kind", "message": "of kind .mov"},
            {"source": "e.mov", "reason": "kind", "message": "of kind .mov"},
        ]
        assert "2 files of kind .mov, passed over: d.mov, e.mov" in found.notes
        (folder / "f.mov").write_bytes(b"x")
        for _ in range(2):
            assert ingest.ingest(catalog, "photos", asked, run="r").new == 0
            assert catalog.sql("SELECT count(*) AS n FROM dropped")["n"].to_pylist() == [4]
        monkeypatch.setattr(images, "IMAGE_SUFFIXES", (*images.IMAGE_SUFFIXES, ".heic"))
        found = ingest.ingest(catalog, "photos", asked, run="r")
        assert (found.new, found.suffixes) == (1, {".jpg", ".tif", ".heic"})


def test_a_tar_has_a_row_for_all_members_of_a_kind(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("1.jpg", "1.cls", "2.jpg", "2.cls", "only.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    with Catalog(created(tmp_path / "work")) as catalog:
        ingest.ingest(catalog, "photos", config(tmp_path / "a.tar"), run="r")
        assert catalog.sql("SELECT source, message, size_bytes FROM dropped ORDER BY source").to_pylist() == [
            {"source": "a.tar#*.cls", "message": "2 members of kind .cls", "size_bytes": 6},
            {"source": "a.tar#*.mp4", "message": "1 member of kind .mp4", "size_bytes": 3},
        ]
