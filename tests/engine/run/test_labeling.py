"""Work items that fail as a whole: counted against `max_failed_parts`, named, and left to be done."""

import json
from pathlib import Path

import pytest

from engine.pipeline import config as pipeline
from engine.run import job
from manifests.catalog.catalog import Catalog
from manifests.errors import TooManyFailures

PIPELINE = """
workspace: {folder}/work
corpora:
  photos:
    source: {folder}/photos
    part_rows: 3
    modalities: {{palette: {{tokens: false}}, caption: {{tokens: false}}}}
engine: {{runner: local, workers: 1, batch: 4}}
"""


def test_a_run_goes_on_past_items_that_fail_up_to_the_number_allowed(tmp_path: Path, photos: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.format(folder=tmp_path))
    config = pipeline.load(file)
    job.run(config, steps=("ingest",), quiet=True)
    with Catalog.open(tmp_path / "work") as catalog:
        path = tmp_path / "work" / catalog.parts("photos")[1].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(TooManyFailures, match=r"1 work items failed as a whole, more than engine.max_failed_parts = 0"):
        job.run(config, steps=("label",), quiet=True)
    done = job.run(pipeline.load(file, ["engine.max_failed_parts=1"]), steps=("label",), quiet=True)
    assert done.counts["failed_items"] == 1
    with Catalog.open(tmp_path / "work") as catalog:
        missing = catalog.sql("SELECT part, modality FROM missing ORDER BY ALL").to_pylist()
        assert [row["part"] for row in missing] == [1, 1]
        assert [row["status"] for row in catalog.sql("SELECT status FROM runs").to_pylist()] == [
            "done",
            "over_budget",
            "done",
        ]
    events = [json.loads(line) for line in (tmp_path / "work/runs" / done.run / "events.jsonl").open()]
    assert any(
        "left to do: 1 work items failed as a whole (photos/0000001)" in str(event.get("text")) for event in events
    )
    path.write_bytes(whole)
    assert job.run(config, quiet=True).counts["shards"] == 2
