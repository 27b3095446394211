"""`modmill verify` finds every file that is not what the log says."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from engine import config as pipeline
from engine import run as running
from engine.verify import verify
from manifests.catalog import Catalog

PIPELINE = """
workspace: work
corpora:
  photos:
    source: photos
    part_rows: 4
    modalities: {rgb: {keep: true, tokens: false}, palette: {}, caption: {}}
engine: {runner: local, workers: 1, batch: 4}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_photos) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    photos = make_photos(folder / "photos", 7)
    (photos / "broken.jpg").write_bytes(b"no picture")
    (folder / "pipeline.yaml").write_text(PIPELINE)
    running.run(pipeline.load(folder / "pipeline.yaml"), quiet=True)
    return folder / "work"


@pytest.fixture
def workspace(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "work")
    return tmp_path / "work"


def findings(workspace: Path) -> list[tuple[str, str]]:
    with Catalog.open(workspace) as catalog:
        return [(finding.path, finding.problem) for finding in verify(catalog).findings]


def test_a_whole_workspace_has_no_findings(workspace: Path) -> None:
    assert findings(workspace) == []


@pytest.mark.parametrize(
    "pattern",
    [
        "data/photos/rgb/*/*.tar",
        "data/photos/palette/*/part-*.parquet",
        "data/photos/_samples/*.parquet",
        "data/photos/rgb/*/*.failed.parquet",
        "tokenizers/*/tokenizer.json",
    ],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_found(workspace: Path, pattern: str, damage: str) -> None:
    path = sorted(workspace.glob(pattern))[0]
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-10])
    else:
        path.unlink()
    found = findings(workspace)
    assert len(found) == 1, found
    name, problem = found[0]
    assert name.startswith(str(path.relative_to(workspace)).partition(".failed")[0].rpartition(".")[0][:20])
    assert "altered" in problem or "gone" in problem or "not those" in problem


def test_a_shard_whose_tokens_pass_the_vocabulary_is_found(workspace: Path) -> None:
    """The log agrees with the file, but the file is wrong in itself: a bug in a tokenizer, not on the disk."""
    from manifests import actions, shards
    from manifests.recipe import sha256_hex
    from manifests.storage import open_storage

    with Catalog.open(workspace) as catalog:
        shard = next(s for s in catalog.live_shards("photos") if s.modality == "caption" and s.form == "token")
        keys = pq.read_table(workspace / shard.path)["key"].to_pylist()
        data = shards.write_tokens(keys, [0] * len(keys), [[70_000]] * len(keys), 1 << 20, {})
        open_storage(workspace).put("data/photos/caption/bad.parquet", data)
        fields = {
            **actions.to_json(shard),
            "path": "data/photos/caption/bad.parquet",
            "sha256": sha256_hex(data),
            "ok": len(keys),
            "failed": 0,
            "absent": 0,
            "tokens": len(keys),
            "failed_path": None,
            "failed_sha256": None,
        }
        action = actions.from_json(fields)
        assert isinstance(action, actions.ShardAdded)
        catalog.commit([action], run="test")
        assert [finding.problem for finding in verify(catalog).findings] == [
            f"it holds the token 70000, its vocabulary has {shard.vocabulary}"
        ]


def test_rows_in_another_order_are_found(workspace: Path) -> None:
    from manifests import actions, shards
    from manifests.recipe import sha256_hex

    with Catalog.open(workspace) as catalog:
        shard = next(s for s in catalog.live_shards("photos") if s.modality == "caption" and s.form == "token")
        table = pq.read_table(workspace / shard.path)
        swapped = table.take([1, 0, *range(2, table.num_rows)])
        values = [None if v is None else v for v in swapped["tokens"].to_pylist()]
        data = shards.write_tokens(
            swapped["key"].to_pylist(), swapped["status"].to_pylist(), values, shard.vocabulary or 0, {}
        )
        catalog.storage.put("data/photos/caption/swapped.parquet", data)
        fields = {**actions.to_json(shard), "path": "data/photos/caption/swapped.parquet", "sha256": sha256_hex(data)}
        action = actions.from_json(fields)
        assert action is not None
        catalog.commit([action], run="test")
        assert "part's order" in verify(catalog).findings[0].problem


def test_an_altered_log_entry_is_found(workspace: Path) -> None:
    with Catalog.open(workspace):
        pass
    entry = workspace / "_meta/log/00000000000000000003.json"
    document = json.loads(entry.read_text())
    document["run"] = "somebody-else"
    entry.write_text(json.dumps(document))
    with Catalog.open(workspace) as catalog:
        found = verify(catalog).findings
    assert len(found) == 1
    assert "altered" in found[0].problem
