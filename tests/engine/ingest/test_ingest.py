"""Source columns keep their types and their values, whatever they are."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from engine.ingest.part import typed_columns
from engine.pipeline import config as pipeline
from engine.run import job
from manifests.catalog.catalog import Catalog


def test_columns_take_the_type_that_holds_them() -> None:
    rows = [{"year": 1990, "tags": ["a", "b"], "gps": {"lat": 1.5}, "none": None}, {"year": None, "tags": []}]
    arrays = typed_columns(rows, {})
    assert arrays["year"].type == pa.int64()
    assert arrays["tags"].to_pylist() == [["a", "b"], []]
    assert arrays["gps"].to_pylist() == [{"lat": 1.5}, None]
    assert arrays["none"].type == pa.string()


def test_columns_of_many_types_become_json_text() -> None:
    arrays = typed_columns([{"x": 1}, {"x": "one"}, {"x": {"y": []}}, {"x": None}, {"z": {}}], {})
    assert arrays["x"].to_pylist() == ["1", "one", '{"y": []}', None, None]
    assert arrays["z"].to_pylist() == [None, None, None, None, "{}"]


def test_a_later_part_keeps_the_columns_type() -> None:
    assert typed_columns([{"x": 1}], {"x": pa.float64()})["x"].type == pa.float64()
    assert typed_columns([{"x": "one"}], {"x": pa.float64()})["x"].type == pa.string()


def test_a_column_named_like_ours_is_kept_under_another_name() -> None:
    arrays = typed_columns([{"key": "k", "source": "museum", "row": 3}], {})
    assert {name: array.to_pylist()[0] for name, array in arrays.items()} == {
        "source_key": "k",
        "source_source": "museum",
        "source_row": 3,
    }


def test_captions_and_columns_from_sidecars_and_a_table(tmp_path: Path, photos: Path) -> None:
    names = sorted(path.name for path in photos.glob("*.jpg"))
    (photos / names[0]).with_suffix(".json").write_text(json.dumps({"caption": "from json", "iso": 200}))
    lines = ["file,license,year"] + [f"{name},cc-by,{1990 + i}" for i, name in enumerate(names)] + ["gone.jpg,cc0,1"]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    (tmp_path / "pipeline.yaml").write_text(
        "workspace: work\ncorpora: {photos: {source: photos, table: table.csv, modalities: [caption]}}\n"
        "engine: {runner: local}\n"
    )
    job.run(pipeline.load(tmp_path / "pipeline.yaml"), steps=("ingest",), quiet=True)
    with Catalog.open(tmp_path / "work") as catalog:
        query = "SELECT source, license, year, caption, iso FROM samples ORDER BY source"
        rows = catalog.sql(query).to_pylist()
        part = catalog.parts("photos")[0]
    assert [row["source"] for row in rows] == names
    assert rows[0] == {"source": names[0], "license": "cc-by", "year": 1990, "caption": "from json", "iso": 200}
    assert rows[1]["caption"].startswith("a photograph, number 1")
    assert rows[4]["caption"] is None
    keys = pq.read_table(tmp_path / "work" / part.path)["key"].to_pylist()
    assert keys == sorted(keys)
