"""Entries become rows: many at once as one by one, and what later ones end."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.catalog import replay
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, WorkspaceError
from manifests.log import actions
from manifests.log import entries as log
from manifests.store import paths
from manifests.store.storage import Storage

TABLES = tuple(f"log.{name}" for name in actions.ACTIONS)


def test_many_rows_go_in_as_few_do(
    workspace: Storage, make, answers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    with Catalog(workspace) as catalog:
        catalog.commit([make.run_started(), make.corpus(), make.current(crops=2)], run="r")
        tokenizer = actions.TokenizerAdded(
            name="rgb",
            digest="cc" * 32,
            path=paths.tokenizer("rgb", "cc" * 32),
            family="grid",
            family_version=1,
            vocabulary=9,
            options={"a": [1, {"b": None}]},
            rows=4,
            metrics={"psnr": 1.5},
        )
        catalog.commit([make.part(), make.part(part=1), make.shard(crop=1, tokens=9), tokenizer], run="r")
        snapshot = actions.SnapshotAdded(
            snapshot="s",
            path=paths.snapshot("s"),
            sha256="ab" * 32,
            rows=2,
            held_out=0,
            where=None,
            modalities=["rgb", "depth"],
        )
        forgotten = actions.Forgotten(
            corpus="photos",
            part=0,
            rows=[1, 3],
            keys=["a", "b"],
            sources_sha256=["11" * 32, "22" * 32],
            files=[make.part().path],
        )
        ended = actions.RunEnded(run="r", time=log.now(), status="done", counts={"rows": 2})
        again = make.part(path=paths.samples("photos", 0, "ff" * 32))
        catalog.commit([snapshot, forgotten, make.shard(crop=1), again, ended], run="r")
        expected = answers(catalog, TABLES)
    for file in (cache / log.workspace_id(workspace)).glob("index-*"):
        file.unlink()
    monkeypatch.setattr(replay, "_MANY_ROWS", 1)
    with Catalog(workspace) as catalog:
        assert answers(catalog, TABLES) == expected
        assert catalog.parts("photos")[0].path == again.path
        assert catalog.sql("SELECT row, key FROM forgotten").to_pylist() == [
            {"row": 1, "key": "a"},
            {"row": 3, "key": "b"},
        ]


@pytest.mark.parametrize("at_once", [True, False])
def test_retired_shards_are_live_no_more_until_they_come_again(workspace: Storage, make, at_once: bool) -> None:
    retired = actions.ShardsRetired(
        corpus="photos", modality="caption", form="label", fingerprint=make.recipe_1, reason="superseded"
    )
    again = paths.shard("photos", "caption", make.recipe_1, 0, None, "ff" * 32, is_tar=False)
    with Catalog(workspace) as catalog:
        for new in (
            [make.corpus(), make.part(), make.shard(), make.shard(part=1), make.shard(fingerprint=make.recipe_2)],
            [retired],
            [make.shard(path=again)],
        ):
            catalog.commit(new, run="r")
            if not at_once:
                catalog.corpora()
        assert {(shard.path, shard.fingerprint[:2]) for shard in catalog.live_shards()} == {
            (again, "a1"),
            (make.shard(fingerprint=make.recipe_2).path, "b2"),
        }
    with Catalog(workspace, as_of=1) as then:
        assert len(then.live_shards()) == 3
    with Catalog(workspace, as_of=2) as then:
        assert [shard.fingerprint[:2] for shard in then.live_shards()] == ["b2"]


def test_a_commit_waits_for_no_index_and_is_there_when_asked(workspace: Storage, make) -> None:
    with Catalog(workspace) as catalog:
        catalog.commit([make.corpus()], run="r")
        catalog.commit([make.part()], run="r")
        assert catalog.version == 2
        assert len(catalog._index._pending) == 2
        assert len(catalog.parts("photos")) == 1
        assert not catalog._index._pending


def test_a_forked_process_is_refused(workspace: Storage, make) -> None:
    with Catalog(workspace) as catalog:
        catalog.commit([make.corpus()], run="r")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                catalog.sql("SELECT 1")
            except WorkspaceError:
                try:
                    catalog.commit([make.part()], run="r")
                except WorkspaceError as error:
                    code = 0 if "forked" in str(error) else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(catalog.corpora()) == 1


@pytest.mark.parametrize(
    ("as_of", "says"),
    [(0, "versions 1 to 1"), (2, "versions 1 to 1"), ("yesterday", "expected a version"), ("1999-01-01", "began at")],
)
def test_a_version_that_is_not_there_is_said(workspace: Storage, make, as_of: int | str, says: str) -> None:
    with Catalog(workspace) as catalog:
        catalog.commit([make.corpus()], run="r")
    with pytest.raises(ConfigError, match=says):
        Catalog(workspace, as_of=as_of)


def test_a_time_means_the_newest_version_until_then(workspace: Storage, make) -> None:
    with Catalog(workspace) as catalog:
        catalog.commit([make.corpus()], run="r")
        between = log.now()
        catalog.commit([make.part()], run="r")
    for text in (between, between.removesuffix("Z"), between.replace("Z", "+00:00")):
        with Catalog(workspace, as_of=text) as then:
            assert then.parts("photos") == []
    with Catalog(workspace, as_of="2999-01-01") as then:
        assert len(then.parts("photos")) == 1
