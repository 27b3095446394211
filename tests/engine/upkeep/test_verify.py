"""`modmill verify` finds every file that is not what the log says."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engine.pipeline import config as pipeline
from engine.progress.record import recorded
from engine.run import job
from engine.upkeep.verify import verify
from manifests.catalog.catalog import Catalog
from manifests.errors import LogError
from manifests.formats import shards, sidecars
from manifests.log import actions
from manifests.recipe import sha256_hex
from manifests.recover import sidecars_again
from manifests.store import paths
from manifests.store.storage import open_storage

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
    job.run(pipeline.load(folder / "pipeline.yaml"), quiet=True)
    return folder / "work"


@pytest.fixture
def workspace(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "work")
    return tmp_path / "work"


def findings(workspace: Path) -> list[tuple[str, str]]:
    with Catalog(open_storage(workspace)) as catalog:
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
    from manifests.store.storage import open_storage

    with Catalog.open(workspace) as catalog:
        shard = next(s for s in catalog.live_shards("photos") if s.modality == "caption" and s.form == "token")
        keys = pq.read_table(workspace / shard.path)["key"].to_pylist()
        data = shards.write_tokens(keys, [0] * len(keys), [[70_000]] * len(keys), 1 << 20, {})
        path = paths.renamed(shard.path, sha256_hex(data))
        open_storage(workspace).put(path, data)
        fields = {
            **actions.to_json(shard),
            "path": path,
            "sha256": sha256_hex(data),
            "size_bytes": len(data),
            "ok": len(keys),
            "failed": 0,
            "absent": 0,
            "tokens": len(keys),
            "failed_path": None,
            "failed_sha256": None,
        }
        action = actions.from_json(fields)
        assert isinstance(action, actions.ShardAdded)
        catalog.storage.put(sidecars.path_of(action), sidecars.of_shard(action, {}))
        catalog.commit([action], run="test")
        assert [finding.problem for finding in verify(catalog).findings] == [
            f"it holds the token 70000, its vocabulary has {shard.vocabulary}"
        ]


def test_rows_in_another_order_are_found(workspace: Path) -> None:
    with Catalog.open(workspace) as catalog:
        shard = next(s for s in catalog.live_shards("photos") if s.modality == "caption" and s.form == "token")
        table = pq.read_table(workspace / shard.path)
        swapped = table.take([1, 0, *range(2, table.num_rows)])
        data = shards.write_tokens(
            swapped["key"].to_pylist(),
            swapped["status"].to_pylist(),
            swapped["tokens"].to_pylist(),
            shard.vocabulary or 0,
            {},
        )
        commit_instead(catalog, shard, data)
        assert "part's order" in verify(catalog).findings[0].problem


def commit_instead(catalog: Catalog, shard: actions.ShardAdded, data: bytes, **fields: Any) -> actions.ShardAdded:
    """Commits another file for a shard, as a worker would that made it so: record and sidecar agree with the bytes."""
    # A name of its own, even for equal bytes.
    path = paths.renamed(shard.path, sha256_hex(b"another" + data))
    catalog.storage.put(path, data)
    changed = {"path": path, "sha256": sha256_hex(data), "size_bytes": len(data), **fields}
    action = dataclasses.replace(shard, **changed)
    catalog.storage.put(sidecars.path_of(action), sidecars.of_shard(action, {}))
    catalog.commit([action], run="test")
    return action


def tar_of(catalog: Catalog) -> actions.ShardAdded:
    shards_in_tars = (shard for shard in catalog.live_shards("photos") if shard.format == "webdataset")
    return next(shard for shard in shards_in_tars if not shard.failed)


def test_a_tar_whose_header_is_broken_is_found(workspace: Path) -> None:
    """Plain readers take it for the end of the tar, and return fewer rows without an error."""
    with Catalog.open(workspace) as catalog:
        shard = tar_of(catalog)
        data = bytearray(catalog.storage.read(shard.path))
        second = data.index(b"ustar", 600) - 257
        data[second + 20] ^= 1
        commit_instead(catalog, shard, bytes(data))
        problems = [finding.problem for finding in verify(catalog).findings]
        assert len(problems) == 1
        assert "broken at byte" in problems[0] or "no WebDataset shard" in problems[0]


def test_two_shards_in_each_others_place_are_found(workspace: Path) -> None:
    one, other = sorted(workspace.glob("data/photos/rgb/*/*.tar"))[:2]
    content = one.read_bytes(), other.read_bytes()
    one.write_bytes(content[1])
    other.write_bytes(content[0])
    found = findings(workspace)
    assert [name for name, _ in found] == [str(path.relative_to(workspace)) for path in (one, other)]
    assert all("altered" in problem for _, problem in found)


def test_a_missing_sidecar_is_wrong_and_is_written_from_the_log(workspace: Path) -> None:
    shard = sorted(workspace.glob("data/photos/rgb/*/*.tar"))[0]
    files = [
        shard.with_suffix(".json"),
        *workspace.glob("data/photos/_samples/*.json"),
        *workspace.glob("tokenizers/*.json"),
    ]
    assert len(files) == 4  # Two parts, one tokenizer.
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    with Catalog.open(workspace) as catalog:
        verified = verify(catalog)
        assert [(f.path, f.problem[:20]) for f in verified.findings] == [
            (str(shard.relative_to(workspace)), "its sidecar is gone;")
        ]
        assert [f.kind for f in verified.left_over] == ["no sidecar"] * 3
        assert sidecars_again.write_missing(catalog) == 4
        assert sidecars_again.write_missing(catalog) == 0
        assert (verify(catalog).findings, verify(catalog).left_over) == ([], [])
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(
    "pattern", ["data/photos/rgb/*/*[0-9a-f].json", "data/photos/_samples/*.json", "tokenizers/*.json"]
)
def test_a_sidecar_that_says_other_than_the_log_is_wrong(workspace: Path, pattern: str) -> None:
    path = sorted(workspace.glob(pattern))[0]
    path.write_bytes(path.read_bytes()[:-9])
    assert [problem[:27] for _, problem in findings(workspace)] == ["the sidecar cannot be read "]
    with Catalog.open(workspace) as catalog:
        assert sidecars_again.write_missing(catalog) == 1
    document = json.loads(path.read_bytes())
    fields = next(document[name] for name in ("shard", "part", "tokenizer") if name in document)
    # Another path of the same shape.
    fields["path"] = re.sub(r"[0-9a-f]{8}(?=(\.\w+)?$)", "01234567", fields["path"])
    path.write_text(json.dumps(document))
    assert [problem for _, problem in findings(workspace)] == ["the sidecar says another path than the log"]
    with Catalog.open(workspace) as catalog:
        assert sidecars_again.write_missing(catalog) == 1
        assert verify(catalog).findings == []


def test_what_is_left_over_is_listed_and_not_wrong(workspace: Path) -> None:
    with Catalog.open(workspace) as catalog:
        old = tar_of(catalog)
        commit_instead(catalog, old, catalog.storage.read(old.path))
        folder = (workspace / old.path).parent
        (folder / "part-0000009.c00-0badf00d.tar").write_bytes(b"of a killed run")
        (folder / ".part-0000001.c00-0badf00d.tar.12-ab.tmp").write_bytes(b"half of a file")
        (workspace / "_meta/snapshots/begun").mkdir(parents=True)
        (workspace / "_meta/snapshots/begun/snapshot.json").write_text("{}")
        (workspace / "tokenizers/rgb-123456789abc").mkdir()
        (workspace / "tokenizers/rgb-123456789abc/config.json").write_text("{}")
        verified = verify(catalog)
    assert verified.findings == []
    by_kind = {}
    for finding in verified.left_over:
        by_kind.setdefault(finding.kind, set()).add(Path(finding.path).name)
    assert by_kind == {
        "replaced": {Path(path).name for path in (old.path, sidecars.path_of(old))},
        "orphan": {"part-0000009.c00-0badf00d.tar", "snapshot.json", "config.json"},
        "temporary": {".part-0000001.c00-0badf00d.tar.12-ab.tmp"},
    }
    kinds = [finding.kind for finding in verified.left_over]
    assert kinds == sorted(kinds)


def test_a_part_that_the_log_lacks_is_found(workspace: Path) -> None:
    with Catalog.open(workspace) as catalog:
        part = catalog.parts("photos")[-1]
        path = part.path.replace("part-0000001", "part-0000003")
        catalog.commit([dataclasses.replace(part, part=3, path=path)], run="test")
        problems = [finding.problem for finding in verify(catalog).findings]
    assert problems == ["the log has 3 parts, but no part 2", "the file is gone"]


def test_rows_marked_forgotten_that_the_log_does_not_know_are_found(workspace: Path) -> None:
    with Catalog.open(workspace) as catalog:
        shard = next(
            s for s in catalog.live_shards("photos") if s.modality == "palette" and s.form == "token" and not s.failed
        )
        table = pq.read_table(workspace / shard.path)
        statuses, values = [4, *table["status"].to_pylist()[1:]], [None, *table["tokens"].to_pylist()[1:]]
        data = shards.write_tokens(table["key"].to_pylist(), statuses, values, shard.vocabulary or 0, {})
        tokens = sum(len(value) for value in values if value)
        commit_instead(catalog, shard, data, ok=shard.ok - 1, forgotten=1, tokens=tokens)
        assert [f.problem for f in verify(catalog).findings] == [
            "1 of its rows are marked forgotten, the log says 0 or others"
        ]


def test_data_without_a_log_is_wrong(workspace: Path) -> None:
    shutil.rmtree(workspace / "_meta/log")
    assert findings(workspace) == [
        ("_meta/log", "the log is empty or lost, but there is data; `modmill verify --recover` rebuilds it")
    ]
    # Whoever asks or writes is told, and gets no empty answer.
    with pytest.raises(LogError, match="its log is lost"):
        Catalog.open(workspace)
    with pytest.raises(LogError, match="its log is lost"), recorded(open_storage(workspace), "run", {}, quiet=True):
        pass


def test_nothing_is_written_on_a_log_with_a_gap_that_an_index_hides(workspace: Path) -> None:
    with Catalog.open(workspace) as catalog:
        newest = catalog.version
    (workspace / "_meta/log/00000000000000000002.json").unlink()
    with (
        pytest.raises(LogError, match=r"02\.json is missing"),
        recorded(open_storage(workspace), "run", {}, quiet=True),
    ):
        pass
    assert not (workspace / paths.log_entry(newest + 1)).exists()


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
