"""Every shape of a path is parsed as it was built, and no path of another shape comes in from a file."""

import dataclasses
from typing import Any

import duckdb
import pytest

from manifests.errors import LogError, ShardError
from manifests.log import actions
from manifests.store import paths
from manifests.store.paths import Shape

SHA = "0123456789abcdef" * 4
SHAPES = {name: shape for name, shape in vars(paths).items() if isinstance(shape, Shape)}
# What is written for each field, as it stands on disk.
WRITTEN: dict[str, list[tuple[Any, str]]] = {
    "corpus": [("photos", "photos"), ("a_1", "a_1")],
    "modality": [("rgb", "rgb"), ("rgb@448", "rgb@448"), ("sar 1", "sar 1")],
    "tokenizer": [("rgb", "rgb"), ("my-own-text", "my-own-text")],
    "place": [("_samples", "_samples"), ("_source", "_source"), (f"rgb@448/{SHA[:12]}", f"rgb@448/{SHA[:12]}")],
    "part": [(0, "0000000"), (9_999_999, "9999999"), (10_000_000, "10000000")],
    "crop": [(None, ""), (0, ".c00"), (7, ".c07"), (120, ".c120")],
    "list": [("changes", "changes"), ("dropped", "dropped")],
    "changes": [(f"_samples/changes-{SHA[:8]}", f"_samples/changes-{SHA[:8]}"), ("_changes/2", "_changes/2")],
    "sha8": [(SHA[:8], SHA[:8])],
    "fp12": [(SHA[:12], SHA[:12])],
    "digest12": [(SHA[:12], SHA[:12])],
    "id12": [(SHA[:12], SHA[:12])],
    "format": [("parquet", "parquet"), ("tar", "tar")],
    "ending": [("parquet", "parquet"), ("tar", "tar"), ("failed.parquet", "failed.parquet"), ("json", "json")],
    "spilled": [(".json", ".json"), ("-64.parquet", "-64.parquet"), ("-64.failed.parquet", "-64.failed.parquet")],
    "version": [(1, "00000000000000000001"), (10**12, "00000001000000000000")],
    "snapshot": [("scenes", "scenes"), ("A.b-c_1", "A.b-c_1")],
    "run": [("run-20261123T221100-abcdef", "run-20261123T221100-abcdef")],
    "segment": [(1, "000001"), (1_000_000, "1000000")],
    "item": [("photos+0000000+main", "photos+0000000+main")],
    "step": [(0, "00000000"), (250, "00000250")],
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_path_is_parsed_as_it_was_built(name: str) -> None:
    shape = SHAPES[name]
    fields = [piece.partition("}")[0] for piece in shape.template.split("{")[1:]]
    for number in range(max(len(WRITTEN[field]) for field in fields)):
        chosen = {field: WRITTEN[field][number % len(WRITTEN[field])] for field in fields}
        path = shape.path(**{field: value for field, (value, _) in chosen.items()})
        expected = shape.template
        for field, (_, text) in chosen.items():
            expected = expected.replace("{" + field + "}", text)
        assert path == expected
        assert shape.parse(path) == {field: value for field, (value, _) in chosen.items()}
        assert duckdb.execute("SELECT regexp_full_match($1, $2)", [path, shape.pattern]).fetchall() == [(True,)]


def test_paths_are_spelled_as_they_always_were() -> None:
    """The layout that workspaces have on disk: this list never changes, it only grows."""
    stem = "part-0000003.c07-01234567"
    folder = "data/photos/rgb@448/0123456789ab"
    shard = paths.shard("photos", "rgb@448", SHA, 3, 7, SHA, is_tar=True)
    assert shard == f"{folder}/{stem}.tar"
    assert paths.shard("photos", "rgb@448", SHA, 3, 7, SHA, is_tar=False) == f"{folder}/{stem}.parquet"
    assert paths.failed(shard) == f"{folder}/{stem}.failed.parquet"
    assert paths.sidecar(shard) == f"{folder}/{stem}.json"
    assert (
        paths.stem(shard) == paths.stem(paths.failed(shard)) == paths.stem(paths.sidecar(shard)) == f"{folder}/{stem}"
    )
    assert paths.renamed(shard, "f" * 64) == f"{folder}/part-0000003.c07-ffffffff.tar"
    assert paths.spill("photos", "rgb@448", SHA, 3, 7, SHA) == f"{folder}/.spill-{stem}"
    assert paths.SPILL.match(f"{folder}/.spill-{stem}-12.failed.parquet.tmp")
    assert paths.samples("photos", 3, SHA) == "data/photos/_samples/part-0000003-01234567.parquet"
    assert paths.changes("photos", SHA) == "data/photos/_samples/changes-01234567.parquet"
    assert paths.dropped("photos", SHA) == "data/photos/_samples/dropped-01234567.parquet"
    assert paths.pack("photos", 3, SHA) == "data/photos/_source/part-0000003-01234567.tar"
    assert paths.tokenizer("rgb", SHA) == "tokenizers/rgb-0123456789ab"
    assert paths.sidecar(paths.tokenizer("rgb", SHA)) == "tokenizers/rgb-0123456789ab.json"
    assert paths.log_entry(7) == "_meta/log/00000000000000000007.json"
    assert paths.checkpoint(7) == "_meta/checkpoints/00000000000000000007"
    assert paths.lease_epoch(7) == "_meta/lease/00000000000000000007.json"
    assert paths.snapshot("scenes") == "_meta/snapshots/scenes"
    assert paths.receipt("forget-1") == "_meta/receipts/forget-1.json"
    assert paths.events("r") == "runs/r/events.jsonl"
    assert paths.events_segment("r", 2) == "runs/r/events-000002.jsonl"
    assert paths.mark("r", "photos/0000001/main") == "runs/r/marks/photos+0000001+main.json"
    assert paths.fit("rgb", SHA) == "runs/fit-rgb-0123456789ab"
    assert (
        paths.fit_checkpoint(paths.fit("rgb", SHA), 250) == "runs/fit-rgb-0123456789ab/checkpoint-00000250.safetensors"
    )
    assert (paths.FORMAT, paths.LEASE) == ("_meta/format.json", "_meta/lease.json")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../other/data/photos/_samples/part-0000000-01234567.parquet",
        "data/photos/../../x/part-0000000-01234567.parquet",
        "data/photos/../0123456789ab/part-0000000-01234567.parquet",
        "s3://bucket/data/photos/rgb/0123456789ab/part-0000000-01234567.parquet",
        "https://host/part-0000000-01234567.parquet",
        "simplecache::data/photos/rgb/0123456789ab/part-0000000-01234567.parquet",
        "file:///data/photos/rgb/0123456789ab/part-0000000-01234567.parquet",
        "data//rgb/0123456789ab/part-0000000-01234567.parquet",
        "data/photos/*/0123456789ab/part-0000000-01234567.parquet",
        "data/photos/rgb/0123456789ab/part-0000000-01234567.parquet\n",
        "data/photos/rgb/0123456789ab/part-0000000-01234567.exe",
        "data/photos/rgb/0123456789AB/part-0000000-01234567.parquet",
        "data/photos/rgb/0123456789ab/part-0-01234567.parquet",
        "data/photos/rgb/0123456789ab/part-00000000-01234567.parquet",
        "data/photos/rgb/0123456789ab/.part-0000000-01234567.parquet",
        "data\\photos\\rgb\\0123456789ab\\part-0000000-01234567.parquet",
        "_meta/log/00000000000000000001.json",
        "",
        None,
        7,
    ],
)
def test_a_path_of_another_shape_is_refused(path: Any) -> None:
    with pytest.raises(ShardError, match=r"a sidecar: the path .* expected data/<corpus>/<modality>/<fp12>/part-"):
        paths.check(path, paths.SHARD, where="a sidecar")


def test_a_refusal_says_what_leads_out_of_the_workspace() -> None:
    with pytest.raises(
        LogError, match="version 3: the path '/x' leads out of the workspace, expected _meta/snapshots/<snap"
    ):
        paths.check("/x", paths.SNAPSHOT, where="version 3", error=LogError)
    with pytest.raises(ShardError, match="the path 'x' is no such file of a workspace"):
        paths.check("x", paths.SNAPSHOT, where="version 3")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "a/b", "a" * 65, "a b", "a\n"])
def test_a_name_that_no_snapshot_has_is_told(name: str) -> None:
    assert not paths.is_snapshot_name(name)


def test_what_people_put_beside_their_data_keeps_its_name() -> None:
    for path in ("data/photos/notes.txt", "data/photos/rgb/0123456789ab/part-0000000-01234567.parquet.bak", "README"):
        assert paths.stem(path) == path
    assert paths.is_temporary("data/x/.part-0000000-01234567.parquet.12-ab.tmp")
    assert not any(map(paths.is_temporary, ("data/x/.DS_Store", "data/x/a.tmp", "data/x/..tmp")))
    assert paths.group("data/photos/rgb/0123456789ab/x.tar") == "data/photos/rgb"
    assert paths.group("data/photos/x") == "data/photos"


def test_every_field_of_an_action_that_holds_a_path_has_its_shape() -> None:
    """An action that is new, or a field, is named here: nothing with a path comes in unchecked."""
    holds = {
        (kind, field.name)
        for kind in actions.ACTIONS.values()
        for field in dataclasses.fields(kind)
        if field.name == "files"
        or field.name.endswith("path")
        or (kind, field.name) == (actions.SamplesDropped, "replaces")
    }
    assert holds == {(kind, name) for kind, columns in actions.PATHS.items() for name, _ in columns}
