"""The same photographs from every kind of source, in place and packed: equal tokens, and what becomes of packed bytes."""

import datetime
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.export import copy
from engine.export.choice import ExportChoice
from engine.pipeline import config as pipeline
from engine.run import job
from engine.upkeep import forget
from engine.upkeep import verify as verifying
from engine.upkeep.collect import plan
from manifests.catalog.catalog import Catalog
from manifests.formats import shards
from manifests.recover import recover
from manifests.store.storage import open_storage

PIPELINE = """
workspace: work
corpora:
  folder: {source: photos, part_rows: 4, modalities: &m {palette: {tokens: false}, caption: {tokens: false}}}
  tars: {source: tars, part_rows: 4, modalities: *m}
  parquet: {source: photos.parquet, key: id, part_rows: 4, modalities: *m}
  packed: {source: photos, pack: true, part_rows: 4, modalities: *m}
engine: {runner: local, workers: 1, batch: 4}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_photos: Callable[..., Path]) -> Path:
    """A folder with photographs as files, tars and Parquet, and the workspace that was made of all."""
    folder = tmp_path_factory.mktemp("kinds")
    photos = sorted(make_photos(folder / "photos", 6).glob("*.jpg"))
    (folder / "photos/broken.jpg").write_bytes(b"no picture")
    (folder / "tars").mkdir()
    for first in (0, 3):
        with tarfile.open(folder / f"tars/{first}.tar", "w") as tar:
            for photo in photos[first : first + 3]:
                for path in (photo, photo.with_suffix(".txt")):
                    if path.exists():
                        tar.add(path, path.name)
    captions = [p.with_suffix(".txt").read_text() if p.with_suffix(".txt").exists() else None for p in photos]
    columns = {
        "id": [photo.stem for photo in photos] + ["nothing"],
        "image": pa.array([{"bytes": p.read_bytes(), "path": p.name} for p in photos] + [None]),
        "caption": [*captions, "a caption alone"],
    }
    pq.write_table(pa.table(columns), folder / "photos.parquet", row_group_size=3)
    (folder / "pipeline.yaml").write_text(PIPELINE)
    run(folder)
    return folder


def run(folder: Path) -> None:
    job.run(pipeline.load(folder / "pipeline.yaml"), quiet=True)


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it all, with a cache of its own."""
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


def palettes(catalog: Catalog) -> dict[str, dict[str, str]]:
    """By corpus: the palette of each photograph, by the hash of its bytes."""
    query = (
        "SELECT corpus, sha256, list(ROW(k, rank, r, g, b, share) ORDER BY k, rank)::VARCHAR AS colors "
        "FROM palettes JOIN samples USING (corpus, key) GROUP BY ALL"
    )
    found: dict[str, dict[str, str]] = {}
    for row in catalog.sql(query).to_pylist():
        found.setdefault(row["corpus"], {})[row["sha256"]] = row["colors"]
    return found


def findings(home: Path) -> list[str]:
    with Catalog.open(home / "work") as catalog:
        return [f"{finding.path}: {finding.problem}" for finding in verifying.verify(catalog).findings]


def test_every_kind_gives_the_same(made: Path) -> None:
    with Catalog.open(made / "work") as catalog:
        counts = catalog.sql(
            "SELECT corpus, sum(ok)::INT AS ok, sum(failed)::INT AS failed, sum(absent)::INT AS absent FROM coverage "
            "WHERE modality = 'palette' AND form = 'label' GROUP BY corpus ORDER BY corpus"
        ).to_pylist()
        assert [tuple(row.values()) for row in counts] == [
            ("folder", 6, 1, 0),
            ("packed", 6, 1, 0),
            ("parquet", 6, 0, 1),
            ("tars", 6, 0, 0),
        ]
        found = palettes(catalog)
        assert len(found["folder"]) == 6
        for corpus in ("packed", "parquet", "tars"):
            assert {sha: found["folder"][sha] for sha in found[corpus]} == found[corpus]
        captions = catalog.sql("SELECT corpus, count(*)::INT AS n FROM captions GROUP BY corpus ORDER BY corpus")
        assert captions["n"].to_pylist() == [4, 4, 5, 4]
    assert findings(made) == []


def test_packed_bytes_outlive_their_source(home: Path) -> None:
    shutil.rmtree(home / "photos")
    text = """
workspace: work
corpora: {packed: {source: photos, pack: true, part_rows: 4, modalities: {metadata: {tokens: false}}}}
engine: {runner: local, workers: 1, batch: 4}
"""
    (home / "pipeline.yaml").write_text(text)
    run(home)
    with Catalog.open(home / "work") as catalog:
        rows = catalog.sql(
            "SELECT ok, failed FROM coverage WHERE corpus = 'packed' AND modality = 'metadata'"
        ).to_pylist()
    assert [(row["ok"], row["failed"]) for row in rows] == [(6, 1)]


def test_forgotten_bytes_leave_the_pack(home: Path) -> None:
    storage = open_storage(home / "work")
    photo = home / "photos/photo002.jpg"
    secret = photo.read_bytes()[-400:-300]
    with Catalog(storage) as catalog:
        before = {part.part: part for part in catalog.parts("packed")}
        key = catalog.sql(
            "SELECT key, part FROM samples WHERE corpus = 'packed' AND source = 'photo002.jpg'"
        ).to_pylist()[0]
    forget.forget(str(home / "work"), [f"packed/{key['key']}"], quiet=True)
    with Catalog(storage) as catalog:
        part = next(part for part in catalog.parts("packed") if part.part == key["part"])
        assert part.pack_path != before[part.part].pack_path
        later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=2)
        deleted = {deletion.path for deletion in plan(catalog, retention_days=7, now=later)}
        assert before[part.part].pack_path in deleted
        assert part.pack_path not in deleted
        for path in deleted:
            storage.remove(path)
        rows = shards.read_samples(storage.read(part.path))
    # All other rows are where they were.
    with tarfile.open(home / "work" / str(part.pack_path)) as tar:
        assert len(tar.getnames()) == sum(1 for row in rows if row.sha256) + 1
    assert all(secret not in path.read_bytes() for path in (home / "work").rglob("*") if path.is_file())
    assert findings(home) == []


def test_a_pack_is_verified_copied_and_recovered(home: Path, tmp_path: Path) -> None:
    storage = open_storage(home / "work")
    with Catalog(storage) as catalog:
        parts = catalog.parts("packed")
    shutil.rmtree(home / "work/_meta/log")
    shutil.rmtree(home / "work/_meta/checkpoints", ignore_errors=True)
    recover.recover(storage)
    with Catalog(storage) as catalog:
        assert catalog.parts("packed") == parts
        copied = open_storage(tmp_path / "copy")
        copy.copy_workspace(
            catalog, copied, ExportChoice(corpora=None, modalities=None, form=None, snapshot=None), quiet=True
        )
    assert all(copied.exists(str(part.pack_path)) for part in parts)
    path = home / "work" / str(parts[0].pack_path)
    data = path.read_bytes()
    path.write_bytes(data[:-600] + b"x" + data[-599:])
    assert "its packed sources, data/packed/_source/part-0000000" in findings(home)[0]
