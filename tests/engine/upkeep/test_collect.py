"""`modmill forget --collect` deletes what nothing needs, and nothing else."""

import datetime
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine.upkeep import collect as collecting
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, WorkspaceError
from manifests.formats import rewrite, shards
from manifests.log import actions
from manifests.log import entries as log
from manifests.log.lease import writer_lease
from manifests.modality import MODALITIES
from manifests.recipe import sha256_hex
from manifests.snapshots import snapshot
from manifests.store import paths
from manifests.store.storage import Storage, open_storage

OLD, NEW = "a1" * 32, "b2" * 32
DAY = datetime.timedelta(days=1)
KEYS = ["k0", "k1"]


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A workspace with one part of two rows."""
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "cache"))
    storage = open_storage(tmp_path / "work")
    log.create_workspace(storage)
    with Catalog(storage) as made:
        rows = [
            {"corpus": "c", "part": 0, "row": row, "key": key, "source": key, "size_bytes": 1, "sha256": bytes(32)}
            for row, key in enumerate(KEYS)
        ]
        data = shards.write_samples(rows, pa.schema([]))
        path = paths.samples("c", 0, sha256_hex(data))
        storage.put(path, data)
        corpus = actions.CorpusAdded(corpus="c", kind="text", source="c", seed=0, part_rows=2, config={})
        part = actions.PartAdded(
            corpus="c",
            part=0,
            rows=2,
            path=path,
            sha256=sha256_hex(data),
            size_bytes=len(data),
            keys_sha256=shards.keys_digest(KEYS),
            source_bytes=2,
        )
        made.commit([corpus, part], run="r")
        yield made


def put_shard(storage: Storage, text: str, fingerprint: str = OLD, *, failed: bool = False) -> actions.ShardAdded:
    """Writes a shard of captions, its sidecar and, where asked for, a failed file; its record."""
    data = shards.write_labels(KEYS, [0, 0], [text, "other"], MODALITIES["caption"], {})
    stem = paths.stem(paths.shard("c", "caption", fingerprint, 0, None, sha256_hex(data), is_tar=False))
    storage.put(f"{stem}.parquet", data)
    storage.put(f"{stem}.json", b"{}")
    if failed:
        storage.put(f"{stem}.failed.parquet", b"failed")
    return actions.ShardAdded(
        corpus="c",
        part=0,
        crop=None,
        modality="caption",
        form="label",
        fingerprint=fingerprint,
        path=f"{stem}.parquet",
        format="parquet",
        sha256=sha256_hex(data),
        size_bytes=len(data),
        rows=2,
        ok=2,
        failed=0,
        absent=0,
        keys_sha256=shards.keys_digest(KEYS),
        failed_path=f"{stem}.failed.parquet" if failed else None,
    )


def paths_of(deletions: list[collecting.Deletion]) -> set[str]:
    return {deletion.path for deletion in deletions}


def at(catalog: Catalog, days: float, **options: Any) -> set[str]:
    """What a collection deletes in so many days."""
    now = datetime.datetime.now(datetime.UTC) + days * DAY
    return paths_of(collecting.plan(catalog, retention_days=options.pop("retention_days", 7), now=now))


def make_old(storage: Storage, path: str, hours: float) -> None:
    then = time.time() - hours * 3600
    os.utime(storage.full(path), (then, then))


def test_what_was_replaced_goes_when_no_version_of_the_retention_has_it(catalog: Catalog) -> None:
    first = put_shard(catalog.storage, "first", failed=True)
    catalog.commit([first], run="r")
    between = datetime.datetime.now(datetime.UTC)
    second = put_shard(catalog.storage, "second")
    catalog.commit([second], run="r")
    other = put_shard(catalog.storage, "other recipe", NEW)
    catalog.commit([other], run="r")
    held = set(rewrite.files_of(first.path))
    assert at(catalog, 0) == set()
    assert at(catalog, 6.9) == set()
    assert at(catalog, 7.1) == held
    assert at(catalog, 7.1, retention_days=8) == set()
    assert at(catalog, 0, retention_days=0) == held
    # The version that was the newest as the retention began is one that may be looked at.
    assert paths_of(collecting.plan(catalog, retention_days=0, now=between)) == set()
    retired = actions.ShardsRetired(corpus="c", modality="caption", form="label", fingerprint=NEW, reason="superseded")
    catalog.commit([retired], run="r")
    assert at(catalog, 7.1) == {*held, other.path, other.path.replace(".parquet", ".json")}
    # The same bytes made again are live again.
    catalog.commit([first], run="r")
    assert second.path in at(catalog, 7.1)
    assert first.path not in at(catalog, 7.1)
    with pytest.raises(ConfigError, match="number of days from 0 up"):
        collecting.plan(catalog, retention_days=-1)


def test_files_of_snapshots_stay(catalog: Catalog) -> None:
    storage = catalog.storage
    digest = "d" * 64
    data = shards.write_tokens(KEYS, [0, 0], [[1], [2]], 10, {})
    path = paths.shard("c", "caption", OLD, 0, None, sha256_hex(data), is_tar=False)
    storage.put(path, data)
    record = replace(
        put_shard(storage, "label"),
        form="token",
        path=path,
        sha256=sha256_hex(data),
        size_bytes=len(data),
        tokens=2,
        vocabulary=10,
    )
    document = {"modality": "caption", "form": "token", "weights": digest, "parameters": {"tokenizer": "text"}}
    catalog.commit(
        [
            actions.TokenizerAdded(
                name="text",
                digest=digest,
                path=paths.tokenizer("text", digest),
                family="text",
                family_version=1,
                vocabulary=10,
                options={},
                rows=2,
                metrics={},
            ),
            actions.RecipeAdded(fingerprint=OLD, document=document),
            actions.RecipeCurrent(corpus="c", modality="caption", form="token", fingerprint=OLD, crops=None),
            record,
        ],
        run="r",
    )
    snapshot.make(catalog, "s", run="r")
    retired = actions.ShardsRetired(corpus="c", modality="caption", form="token", fingerprint=OLD, reason="superseded")
    catalog.commit([retired], run="r")
    assert path not in at(catalog, 100)
    folder = Path(storage.full("_meta/snapshots/s"))
    (folder / "shards.parquet").write_bytes(b"cut")
    with pytest.raises(Exception, match="altered or truncated"):
        collecting.plan(catalog, retention_days=7)


def test_orphans_and_temporary_files_wait_a_day_and_strangers_stay(catalog: Catalog) -> None:
    storage = catalog.storage
    orphan = put_shard(storage, "never committed", failed=True)
    temporary = [
        "data/c/caption/.part-0000000-00000000.parquet.12-abcdef01.tmp",
        "_meta/log/.00000000000000000009.json.12-abcdef01.tmp",
    ]
    strangers = ["data/c/README.txt", "data/c/caption/part-7.parquet", "data/c/.hidden", "data/export.parquet"]
    for path in [*temporary, *strangers]:
        Path(storage.full(path)).parent.mkdir(parents=True, exist_ok=True)
        Path(storage.full(path)).write_bytes(b"x")
    files = {path for path in rewrite.files_of(orphan.path) if storage.exists(path)}
    assert len(files) == 3
    assert at(catalog, 0) == set()
    for path in [*files, *temporary, *strangers]:
        make_old(storage, path, 23)
    assert at(catalog, 0) == set()
    for path in [*files, *temporary, *strangers]:
        make_old(storage, path, 25)
    assert at(catalog, 0) == {*files, *temporary}


def test_what_holds_forgotten_rows_goes_at_once_but_never_what_is_live(catalog: Catalog) -> None:
    first, second = put_shard(catalog.storage, "secret", failed=True), put_shard(catalog.storage, "public")
    catalog.commit([first], run="r")
    forgotten = actions.Forgotten(
        corpus="c",
        part=0,
        rows=[0],
        keys=["k0"],
        sources_sha256=["00" * 32],
        files=[*rewrite.files_of(first.path), *rewrite.files_of(second.path)],
    )
    catalog.commit([second, forgotten], run="r")
    assert at(catalog, 0, retention_days=1000) == set(rewrite.files_of(first.path))


def test_old_checkpoints_go_but_the_newest_two(catalog: Catalog) -> None:
    for version in (1, 5, 9):
        catalog.storage.put(f"{paths.checkpoint(version)}/SHA256SUMS", b"")
    assert at(catalog, 0) == {f"{paths.checkpoint(1)}/SHA256SUMS"}


def test_a_collection_deletes_its_plan_as_the_one_writer(catalog: Catalog) -> None:
    storage = catalog.storage
    first, second = put_shard(storage, "first"), put_shard(storage, "second")
    catalog.commit([first], run="r")
    catalog.commit([second], run="r")
    planned = collecting.plan(catalog, retention_days=0)
    assert paths_of(planned) == {first.path, first.path.replace(".parquet", ".json")}
    assert {deletion.why for deletion in planned} == {"replaced or retired at version 3"}
    with writer_lease(storage, "other"), pytest.raises(WorkspaceError, match="is being written by"):
        collecting.collect(storage.uri, retention_days=0, quiet=True)
    assert storage.exists(first.path)
    before = {file.path for file in storage.walk("data")}
    assert collecting.collect(storage.uri, retention_days=0, quiet=True) == planned
    assert {file.path for file in storage.walk("data")} == before - paths_of(planned)
    catalog.refresh()
    runs = catalog.sql("SELECT kind, status, counts FROM runs").to_pylist()
    assert [(run["kind"], run["status"]) for run in runs] == [("collect", "done")]
    assert '"files_deleted": 2' in runs[0]["counts"]
    assert collecting.collect(storage.uri, retention_days=0, quiet=True) == []
