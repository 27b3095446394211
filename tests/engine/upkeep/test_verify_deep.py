"""`modmill verify --deep` looks into the values, and holds the index and the checkpoints against the log."""

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from engine.pipeline import config as pipeline
from engine.run import job
from engine.upkeep.verify import verify
from manifests.catalog.catalog import Catalog
from manifests.catalog.index import Index
from manifests.formats import shards, sidecars
from manifests.log import actions
from manifests.modality import MODALITIES
from manifests.pixels import images
from manifests.recipe import sha256_hex
from manifests.store import paths
from manifests.store.storage import open_storage

PIPELINE = """
workspace: work
corpora:
  photos:
    source: photos
    part_rows: 3
    modalities: {rgb: {keep: true, tokens: false}, boxes: {}, palette: {}, metadata: {}, caption: {}}
snapshots: {all: {hold_out: 0}}
engine: {runner: local, workers: 1, batch: 4}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_photos) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    make_photos(folder / "photos", 5)
    (folder / "pipeline.yaml").write_text(PIPELINE)
    job.run(pipeline.load(folder / "pipeline.yaml"), quiet=True)
    return folder / "work"


@pytest.fixture
def workspace(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(whole, tmp_path / "work")
    return tmp_path / "work"


def problems(catalog: Catalog, *, deep: bool = True) -> list[str]:
    return [finding.problem for finding in verify(catalog, deep=deep).findings]


def shard_of(catalog: Catalog, modality: str, form: str = "label") -> actions.ShardAdded:
    return next(shard for shard in catalog.live_shards() if (shard.modality, shard.form) == (modality, form))


def commit_instead(catalog: Catalog, shard: actions.ShardAdded, data: bytes, **fields: Any) -> None:
    # A name of its own, even for equal bytes.
    path = paths.renamed(shard.path, sha256_hex(b"another" + data))
    action = dataclasses.replace(shard, path=path, sha256=sha256_hex(data), size_bytes=len(data), **fields)
    catalog.storage.put(path, data)
    catalog.storage.put(sidecars.path_of(action), sidecars.of_shard(action, {}))
    catalog.commit([action], run="test")


def test_a_whole_workspace_has_no_findings(workspace: Path) -> None:
    with Catalog.open(workspace) as catalog:
        verified = verify(catalog, deep=True)
    assert (verified.findings, verified.left_over, verified.notes) == ([], [], [])


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            images.encode_png(np.zeros((8, 9, 3), np.uint8)),
            "row 0 has shape (8, 9, 3), rgb has (h w c) = (224, 224, 3)",
        ),
        (images.encode_npy(np.zeros((224, 224, 3), np.int16)), "row 0 is int16, rgb is uint8"),
        (b"\x89PNG\r\n\x1a\nno picture", "the value of row 0 cannot be decoded: "),
    ],
)
def test_pixels_that_are_none_of_their_modality_are_found(workspace: Path, value: bytes, problem: str) -> None:
    with Catalog.open(workspace) as catalog:
        shard = shard_of(catalog, "rgb")
        found = shards.read_tar(io.BytesIO(catalog.storage.read(shard.path)))
        writer = shards.TarWriter("png")
        for key, status in zip(found.keys, found.statuses, strict=True):
            writer.add(key, status, value)
        commit_instead(catalog, shard, writer.finish().read())
        assert problems(catalog, deep=False) == []
        assert [text[: len(problem)] for text in problems(catalog)] == [problem]


@pytest.mark.parametrize(
    ("corners", "problem"),
    [
        ((0.1, 0.1, 1.5, 0.2), "a box holds numbers from 0.1"),
        ((0.5, 0.1, 0.4, 0.2), "a box ends before it begins"),
        ((0.5, 0.1, float("nan"), 0.2), "a box holds numbers from nan to nan"),
    ],
)
def test_boxes_out_of_range_are_found(workspace: Path, corners: tuple[float, ...], problem: str) -> None:
    with Catalog.open(workspace) as catalog:
        shard = shard_of(catalog, "boxes")
        keys = pq.read_table(workspace / shard.path)["key"].to_pylist()
        box = {"class": "cat", "score": 1.0, **dict(zip(("x0", "y0", "x1", "y1"), corners, strict=True))}
        data = shards.write_labels(keys, [0] * len(keys), [[box]] * len(keys), MODALITIES["boxes"], {})
        commit_instead(catalog, shard, data, ok=len(keys), absent=0)
        assert problems(catalog, deep=False) == []
        assert [text[: len(problem)] for text in problems(catalog)] == [problem]


def test_tokens_of_a_tokenizer_that_is_gone_are_told(workspace: Path) -> None:
    with Catalog.open(workspace) as catalog:
        shutil.rmtree(workspace / catalog.tokenizers()[0].path)
        verified = verify(catalog, deep=True)
    assert [finding.problem for finding in verified.findings] == [
        "its files are not those that were committed, or are gone"
    ]
    assert not verified.notes or all("were not decoded" in note for note in verified.notes)


def test_a_replaced_file_that_a_snapshot_is_of_is_hashed(workspace: Path) -> None:
    with Catalog.open(workspace) as catalog:
        old = shard_of(catalog, "palette", "token")
        table = pq.read_table(workspace / old.path).replace_schema_metadata({})
        commit_instead(catalog, old, shards.encode_table(table))
        data = bytearray((workspace / old.path).read_bytes())
        data[len(data) // 2] ^= 1
        (workspace / old.path).write_bytes(data)
        assert problems(catalog, deep=False) == []
        found = verify(catalog, deep=True).findings
    assert [finding.path for finding in found] == [old.path]
    assert "the snapshot 'all' is of it" in found[0].problem


def write_checkpoint(workspace: Path, tmp_path: Path) -> Path:
    index = Index(open_storage(workspace), tmp_path / "another-index")
    index.write_checkpoint()
    index.close()
    return workspace / paths.checkpoint(index.version)


def test_a_checkpoint_that_is_not_the_log_is_found(workspace: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(workspace, tmp_path)
    with Catalog.open(workspace) as catalog:
        catalog.commit([dataclasses.replace(shard_of(catalog, "palette"), device="cuda")], run="later")
        assert problems(catalog) == []
    table = folder / "shard.parquet"
    before = table.read_bytes()
    table.write_bytes(before[:-1])
    with Catalog.open(workspace) as catalog:
        assert ["altered or truncated" in problem for problem in problems(catalog)] == [True]
    # One that is whole, and wrong all the same.
    table.write_bytes(before)
    duckdb.sql(f"COPY (SELECT * REPLACE (ok + 1 AS ok) FROM read_parquet('{table}')) TO '{table}.new' (FORMAT parquet)")
    Path(f"{table}.new").replace(table)
    sums = (folder / "SHA256SUMS").read_text().replace(sha256_hex(before), sha256_hex(table.read_bytes()))
    (folder / "SHA256SUMS").write_text(sums)
    with Catalog.open(workspace) as catalog:
        assert "it has other rows of shard than the log; delete the folder: readers replay the log instead" in problems(
            catalog
        )


def test_a_checkpoint_without_its_sums_is_left_over(workspace: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(workspace, tmp_path)
    (folder / "SHA256SUMS").unlink()
    with Catalog.open(workspace) as catalog:
        verified = verify(catalog, deep=True)
    assert verified.findings == []
    assert {finding.kind for finding in verified.left_over} == {"orphan"}
    assert {str(Path(finding.path).parent) for finding in verified.left_over} == {str(folder.relative_to(workspace))}


def test_an_index_that_is_not_the_log_is_found(workspace: Path, tmp_path: Path) -> None:
    with Catalog.open(workspace) as catalog:
        catalog.version  # noqa: B018 the index stands from here on
    (file,) = (tmp_path / "cache").rglob("index-*.duckdb")
    with duckdb.connect(str(file)) as connection:
        connection.execute("UPDATE log.shard SET ok = ok - 1, failed = failed + 1 WHERE modality = 'caption'")
    with Catalog.open(workspace) as catalog:
        assert "the index of this machine holds other rows of shard than the log; delete it" in problems(catalog)
