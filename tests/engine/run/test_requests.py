"""How often an object store is asked: each request takes tens of milliseconds, so their numbers must not creep up."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from engine.pipeline import config as pipeline
from engine.plan import missing
from engine.plan.items import Target
from engine.progress import record
from engine.run import job
from manifests.catalog.catalog import Catalog
from manifests.errors import QueryError
from manifests.log import actions
from manifests.log import entries as log
from manifests.store import parquet, paths
from manifests.store.storage import open_storage
from tests.manifests.conftest import Make
from tests.manifests.fault_proxy import Spoiled
from tests.manifests.store.test_object_stores import spoiled  # noqa: F401

PARTS = 20
ROWS = 3
KEPT = ("rgb", "edges", "metadata", "caption")
PIPELINE = """
workspace: {workspace}
corpora:
  photos:
    source: {source}
    part_rows: {rows}
    modalities: {{{modalities}}}
engine: {{runner: local, workers: 1, batch: 4}}
"""


@pytest.fixture
def pipeline_file(s3_bucket: str, spoiled: Spoiled, tmp_path: Path) -> Callable[[int], Path]:  # noqa: F811
    """Writes a pipeline file for a workspace on S3 with so many parts of small photographs."""

    def write(parts: int) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir()
        for number in range(parts * ROWS):
            image = Image.new("RGB", (64, 48), (number % 256, number // 256, 90))
            image.save(folder / f"photo{number:04d}.png")
            (folder / f"photo{number:04d}.txt").write_text(f"photo {number}")
        file = tmp_path / "pipeline.yaml"
        modalities = ", ".join(f"{name}: {{keep: true, tokens: false}}" for name in KEPT)
        workspace = f"{s3_bucket}/{secrets.token_hex(8)}"
        file.write_text(PIPELINE.format(workspace=workspace, source=folder, rows=ROWS, modalities=modalities))
        return file

    return write


@contextmanager
def at_most(requests: int, seen: Spoiled) -> Iterator[None]:
    before = len(seen.asked)
    yield
    # How often a lease is renewed and events are written is a matter of time.
    asked = [text for text in seen.asked[before:] if "/_meta/lease/" not in text and "/runs/" not in text]
    assert len(asked) <= requests, "\n".join([f"{len(asked)} requests", *asked])


def test_questions_and_runs_without_work_ask_for_a_file_once(
    pipeline_file: Callable[[int], Path],
    spoiled: Spoiled,  # noqa: F811
) -> None:
    config = pipeline.load(pipeline_file(PARTS))
    job.run(config, steps=["ingest"], quiet=True)
    count = "SELECT count(*) AS n, count(DISTINCT sha256) AS d FROM samples"
    with at_most(PARTS + 5, spoiled), Catalog.open(config.workspace) as catalog:
        assert catalog.sql("SELECT count(*) AS n FROM samples")["n"].to_pylist() == [PARTS * ROWS]
    # The first question was 601 requests, and the run 847: DuckDB asks for the size of a file thirty times.
    with at_most(PARTS + 10, spoiled), Catalog.open(config.workspace) as catalog:
        assert catalog.sql(count).to_pylist() == [{"n": PARTS * ROWS, "d": PARTS * ROWS}]
        with at_most(2, spoiled):
            catalog.refresh()
            assert catalog.sql(count).to_pylist() == [{"n": PARTS * ROWS, "d": PARTS * ROWS}]
    with at_most(PARTS + 20, spoiled):
        assert job.run(config, steps=["ingest"], quiet=True).did_nothing


def test_a_shard_costs_at_most_four_requests_with_all_that_a_run_costs(
    pipeline_file: Callable[[int], Path],
    spoiled: Spoiled,  # noqa: F811
) -> None:
    config = pipeline.load(pipeline_file(4))
    job.run(config, steps=["ingest"], quiet=True)
    shards = 4 * len(KEPT)
    with at_most(4 * shards - 8, spoiled):
        assert job.run(config, steps=["label"], quiet=True).counts["shards"] == shards


def test_sizes_in_the_log_are_not_believed_and_a_file_that_is_gone_is_named() -> None:
    storage = open_storage(f"memory://{secrets.token_hex(8)}")
    log.create_workspace(storage)
    with Catalog(storage) as catalog:
        rows = pa.table({"corpus": ["photos"], "part": pa.array([0], pa.int32()), "row": pa.array([0], pa.int32())})
        for name, kind in (
            ("key", pa.string()),
            ("source", pa.string()),
            ("size_bytes", pa.int64()),
            ("sha256", pa.binary()),
        ):
            rows = rows.append_column(name, pa.nulls(1, kind))
        parts = [Make.part(part=part, size_bytes=size) for part, size in enumerate((4, 5 << 20, 4))]
        for part in parts:
            storage.put(part.path, parquet.written(rows))
        catalog.commit([Make.corpus(), *parts], run="r")
        assert catalog.sql("SELECT count(*) AS n FROM samples")["n"].to_pylist() == [3]
    storage.remove(parts[2].path)
    with (
        Catalog(storage) as catalog,
        pytest.raises(QueryError, match=r"is gone: FileNotFoundError: .*part-0000002.*verify"),
    ):
        catalog.sql("FROM samples")


def test_rows_left_aside_are_looked_for_only_after_a_run_that_was_cut_short() -> None:
    storage = open_storage(f"memory://{secrets.token_hex(8)}")
    log.create_workspace(storage)
    targets = [Target(modality="rgb", form="label", fingerprint="ab" * 32, crop=0)]
    storage.replace(paths.spill("photos", "rgb", "ab" * 32, 7, 0, "cd" * 32) + ".json.tmp", b"{}")

    def left(run: str, **ended: object) -> set[int]:
        started = record.started_with(run, "run", {})
        end = [actions.RunEnded(run=run, time=log.now(), **ended)] if ended else []  # type: ignore[arg-type]
        with Catalog(storage) as catalog:
            catalog.commit([started], run=run)
            found = missing._parts_left_aside(catalog, "photos", targets)
            catalog.commit(end, run=run)
        return found

    assert left("r1", status="done", counts={}) == set()
    assert left("r2", status="done", counts={"failed_items": 1}) == set()
    assert left("r3", status="done", counts={}) == {7}
    storage.remove(paths.spill("photos", "rgb", "ab" * 32, 7, 0, "cd" * 32) + ".json.tmp")
    assert left("r4", status="done", counts={}) == set()
