"""`--where` and `--failed`: only some rows are labeled, each shard still with every row of its part."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.pipeline import config as pipeline
from engine.plan import where
from engine.run import dry_run, job
from engine.upkeep import forget
from engine.upkeep import verify as verifying
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, QueryError
from manifests.formats.shards import read_statuses

PIPELINE = """
workspace: {workspace}
corpora:
  photos:
    source: {photos}
    part_rows: 4
    modalities: {{rgb: {{keep: true, tokens: false}}, palette: {{tokens: false}}, caption: {{tokens: false}}}}
engine: {{runner: local, workers: 1, batch: 4, max_failed_fraction: 1}}
"""


def run(folder: Path, workspace: str = "work", **options) -> job.Done:
    file = folder / "pipeline.yaml"
    file.write_text(PIPELINE.format(workspace=folder / workspace, photos=folder / "photos"))
    return job.run(pipeline.load(file), quiet=True, **options)


def planned(folder: Path, retry: list[str]) -> set[tuple[str, int, str]]:
    """What a dry run plans for the failures of some classes: modality, parts to do, why."""
    lines = dry_run.dry_run(
        pipeline.load(folder / "pipeline.yaml"), retry=retry, sheet=folder / "probe.png", quiet=True
    )
    table = [line.split(maxsplit=5) for line in lines if line.startswith("photos  ") and "failed" in line]
    return {(row[1], int(row[4]), row[5]) for row in table}


def statuses(folder: Path, modality: str) -> dict[str, int]:
    """The status of each source in a modality."""
    with Catalog.open(folder / "work") as catalog:
        sources = {row["key"]: row["source"] for row in catalog.sql("SELECT key, source FROM samples").to_pylist()}
        keys = {
            (row["part"], row["row"]): row["key"]
            for row in catalog.sql("SELECT part, row, key FROM samples").to_pylist()
        }
        found = {}
        for shard in catalog.live_shards():
            if shard.modality == modality:
                for row, status in enumerate(read_statuses(catalog.storage, shard.path, shard.format, shard.rows)):
                    found[sources[keys[shard.part, row]]] = int(status)
        return found


def data(folder: Path) -> dict[str, str]:
    """The live shards' bytes, by place."""
    with Catalog.open(folder) as catalog:
        assert verifying.verify(catalog).findings == []
        return {f"{shard.modality} {shard.part} {shard.crop}": shard.sha256 for shard in catalog.live_shards()}


def test_rows_are_added_to_shards_and_the_end_is_what_one_run_makes(tmp_path: Path, photos: Path) -> None:
    first = run(tmp_path, where="source < 'photo002'")
    for modality in ("rgb", "palette"):
        found = statuses(tmp_path, modality)
        assert {source for source, status in found.items() if status == 0} == {"photo000.jpg", "photo001.jpg"}
        assert {status for source, status in found.items() if source >= "photo002"} <= {3}
    assert first.counts["rows"] % 4 in (0, 1)
    with Catalog.open(tmp_path / "work") as catalog:
        coverage = {row["modality"]: row for row in catalog.coverage()}
        assert (coverage["rgb"]["parts_done"], coverage["rgb"]["ok"]) == (0, 2)
        assert catalog.sql("FROM complete_parts").num_rows == 0
        assert catalog.sql("FROM missing").num_rows == 3 * 3
        assert verifying.verify(catalog).findings == []
    assert run(tmp_path, where="source < 'photo002'").did_nothing
    # What has a label already keeps it, and is not looked at again.
    (photos / "photo000.jpg").rename(tmp_path / "aside.jpg")
    run(tmp_path, where="source IN ('photo001.jpg', 'photo003.jpg')")
    found = statuses(tmp_path, "palette")
    assert {source for source, status in found.items() if status == 0} >= {
        "photo000.jpg",
        "photo001.jpg",
        "photo003.jpg",
    }
    (tmp_path / "aside.jpg").rename(photos / "photo000.jpg")
    run(tmp_path)
    assert set(statuses(tmp_path, "rgb").values()) == {0}
    run(tmp_path, "other")
    assert data(tmp_path / "work") == data(tmp_path / "other")
    assert run(tmp_path).did_nothing


def test_failed_rows_of_a_class_are_made_again(tmp_path: Path, photos: Path, make_photos: Callable[..., Path]) -> None:
    good = (photos / "photo002.jpg").read_bytes()
    (photos / "photo001.jpg").write_bytes(b"no picture")
    run(tmp_path, steps=("ingest",))
    (photos / "photo002.jpg").unlink()
    run(tmp_path)
    classes = {"photo001.jpg": "DecodeError", "photo002.jpg": "SourceError"}
    assert {source for source, status in statuses(tmp_path, "rgb").items() if status == 1} == set(classes)
    (photos / "photo002.jpg").write_bytes(good)
    with pytest.raises(ConfigError, match="no row failed with that; did you mean 'DecodeError'"):
        run(tmp_path, retry=["DecodeErr"])
    assert run(tmp_path).did_nothing
    before = data(tmp_path / "work")
    with Catalog.open(tmp_path / "work") as catalog:
        failing = {row["part"] for row in catalog.sql("SELECT part FROM failures").to_pylist()}
    assert planned(tmp_path, ["SourceError"]) == {
        (modality, 1, "1 with failed rows of SourceError") for modality in ("rgb", "palette")
    }
    assert len(failing) == 2
    assert planned(tmp_path, []) == {(modality, 2, "2 with failed rows") for modality in ("rgb", "palette")}
    assert run(tmp_path, retry=["SourceError"], where="source <> 'photo002.jpg'").did_nothing
    run(tmp_path, retry=["SourceError"])
    assert {source for source, status in statuses(tmp_path, "rgb").items() if status == 1} == {"photo001.jpg"}
    assert len(data(tmp_path / "work").items() - before.items()) in (2, 3)
    again = run(tmp_path, retry=())
    assert again.counts["failed_rows"] == 2


def test_forgotten_rows_never_come_back(tmp_path: Path, photos: Path) -> None:
    run(tmp_path, where="source < 'photo004'")
    with Catalog.open(tmp_path / "work") as catalog:
        key = catalog.sql("SELECT key FROM samples WHERE source = 'photo001.jpg'").to_pylist()[0]["key"]
        other = catalog.sql("SELECT key FROM samples WHERE source = 'photo008.jpg'").to_pylist()[0]["key"]
    forget.forget(str(tmp_path / "work"), [f"photos/{key}", f"photos/{other}"], quiet=True)
    with Catalog.open(tmp_path / "work") as catalog:
        picked = where.pick(catalog, f"key IN ('{key}', '{other}') OR source = 'photo003.jpg'", ["photos"])
        assert len(picked.parts("photos")) == 1
        with pytest.raises(ConfigError, match="picks no row"):
            where.pick(catalog, f"key = '{key}'", ["photos"])
    run(tmp_path)
    with Catalog.open(tmp_path / "work") as catalog:
        coverage = {row["modality"]: row for row in catalog.coverage()}
        assert (coverage["rgb"]["ok"], coverage["rgb"]["parts_missing"]) == (7, 0)
        assert verifying.verify(catalog).findings == []


def test_conditions_that_are_none_are_refused_before_any_work(tmp_path: Path, photos: Path) -> None:
    run(tmp_path, steps=("ingest",))
    for condition in ("nonsense > 1", "1=1); DROP TABLE x; --"):
        with pytest.raises(QueryError, match="is refused"):
            run(tmp_path, where=condition)
    with pytest.raises(ConfigError, match="picks no row of photos; the workspace has 9 samples"):
        run(tmp_path, where="source = 'photo999.jpg'")
    shutil.rmtree(tmp_path / "work")


def test_bitmaps_hold_a_bit_a_row() -> None:
    chosen = np.random.default_rng(0).random(1001) < 0.3
    bits = np.packbits(chosen).tobytes()
    assert (where.unpacked(bits, 1001) == chosen).all()
