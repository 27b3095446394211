"""What was measured of shards goes into the log and comes back in SQL, whatever way the index was made."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from manifests.catalog import index_checkpoint, replay
from manifests.catalog.catalog import Catalog
from manifests.formats import sidecars
from manifests.locked import locked
from manifests.log import entries as log
from manifests.log.actions import ShardAdded
from manifests.queries import audit, quality
from manifests.recipe import canonical_json
from manifests.store import paths
from manifests.store.storage import Storage

FIGURES = {"std": 2.0, "mean": 0.1, "score_hist_3": 12, "entropy_bits": 7.25}


@pytest.fixture
def measured(workspace: Storage, make) -> list[ShardAdded]:
    """The shards of a workspace: one with figures, one of before there were any, one that was replaced, tokens."""
    old = make.shard(part=1)
    tokens = make.shard(form="token", tokens=20, vocabulary=64, ok=3, failed=1, metrics={"codebook_use": 0.125})
    with Catalog(workspace) as catalog:
        catalog.commit([make.corpus(), make.part(), make.part(part=1)], run="r")
        catalog.commit([make.current(), make.current(form="token")], run="r")
        catalog.commit([make.shard(metrics={"mean": 9.0}), old], run="r")
        catalog.commit([make.shard(metrics=FIGURES), tokens], run="r")
    return [make.shard(metrics=FIGURES), tokens, old]


def figures(catalog: Catalog, part: int, form: str) -> dict[str, float]:
    query = "SELECT metric, value FROM quality WHERE part = ? AND form = ? AND value IS NOT NULL"
    return dict(catalog.fetch(query, [part, form])[1])


def test_figures_of_counts_and_of_values_stand_side_by_side(workspace: Storage, measured: list[ShardAdded]) -> None:
    with Catalog(workspace) as catalog:
        assert figures(catalog, 0, "label") == {
            **{"null_share": 0, "failed_share": 0, "bytes_per_row": 250},
            **FIGURES,
        }
        assert figures(catalog, 1, "label") == {"null_share": 0, "failed_share": 0, "bytes_per_row": 250}
        assert figures(catalog, 0, "token") == {
            **{"null_share": 0.25, "failed_share": 0.25, "bytes_per_row": pytest.approx(1000 / 3)},
            **{"tokens_per_row": pytest.approx(20 / 3), "codebook_use": 0.125},
        }
    with Catalog(workspace, as_of=3) as then:
        assert figures(then, 0, "label")["mean"] == 9
        assert figures(then, 0, "token") == {}


def test_records_keep_their_figures(workspace: Storage, measured: list[ShardAdded]) -> None:
    with Catalog(workspace) as catalog:
        assert catalog.live_shards() == measured
        assert catalog.live_shards("photos", 0, 1) == measured


@pytest.mark.parametrize("way", ["few rows", "many rows", "checkpoint"])
def test_an_index_made_anew_has_the_same_figures(
    way: str,
    workspace: Storage,
    measured: list[ShardAdded],
    answers: Callable[..., Any],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Catalog(workspace) as catalog:
        expected = answers(catalog, ("log.shard", "quality", "alarms"))
        if way == "checkpoint":
            catalog._index.write_checkpoint()
            assert index_checkpoint.versions(workspace) == [4]
    for file in (cache / log.workspace_id(workspace)).glob("index-*"):
        file.unlink()
    if way == "many rows":
        monkeypatch.setattr(replay, "_MANY_ROWS", 1)
    with Catalog(workspace) as catalog:
        assert answers(catalog, ("log.shard", "quality", "alarms")) == expected
        assert catalog.live_shards() == measured
        assert list(audit.check_index(catalog)) == []


def test_a_log_without_figures_is_read(workspace: Storage, make) -> None:
    with Catalog(workspace) as catalog:
        catalog.commit([make.corpus(), make.part(), make.current(), make.shard()], run="r")
    path = Path(workspace.full(paths.log_entry(1)))
    document = json.loads(path.read_text())
    for action in document["actions"]:
        action.pop("metrics", None)
    path.write_bytes(log._sealed(canonical_json({key: value for key, value in document.items() if key != "crc32"})))
    with Catalog(workspace) as catalog:
        assert figures(catalog, 0, "label")["bytes_per_row"] == 250
        assert catalog.live_shards()[0].metrics == {}


def test_a_sidecar_tells_the_figures_and_may_differ_in_them(workspace: Storage, measured: list[ShardAdded]) -> None:
    shard = measured[0]
    assert workspace.put(sidecars.path_of(shard), sidecars.of_shard(shard, {"modality": "caption"}))
    found = sidecars.read(workspace, sidecars.path_of(shard)).of
    assert found == shard
    assert sidecars.differences(found, replace(shard, metrics={})) == []


def test_locked_sql_sees_figures_too(workspace: Storage, make) -> None:
    with Catalog(workspace) as catalog:
        part = make.samples_file(workspace, "photos", 0, {}, ["a", "b"])
        shard = make.labels_file(workspace, "caption", ["a", "b"], [0, 0], ["x", "y"], metrics=FIGURES)
        catalog.commit([make.corpus(), part, make.current(), shard], run="r")
        query = "SELECT value FROM quality WHERE metric = 'mean' UNION ALL SELECT count(*) FROM alarms"
        answer = locked.ask(catalog, query, timeout_s=30, memory_bytes=1 << 30)
    assert answer.column(0).to_pylist() == [0.1, 0]


def test_a_history_is_of_the_current_shards_that_are_judged(workspace: Storage, make) -> None:
    values = [1.0, 2.0, 4.0, 8.5]
    with Catalog(workspace) as catalog:
        parts = [make.part(part=number) for number in range(4)]
        catalog.commit([make.corpus(), *parts, make.current()], run="r")
        shards = [
            make.shard(part=number, ok=4 - number, absent=number, metrics={"mean": value, "min": 0.0})
            for number, value in enumerate(values)
        ]
        catalog.commit([*shards, make.shard(fingerprint=make.recipe_2, metrics={"mean": 99.0})], run="r")
        places = {place: metric for metric, place in catalog.fetch("SELECT metric, place FROM state.judged_metric")[1]}
        before, version = quality.histories(catalog), catalog.version
        catalog.commit([make.part(part=4), make.shard(part=4, ok=2, absent=2, metrics={"mean": 0.5})], run="r")
        # What is new may be added to what was known.
        after = {row["place"]: row for row in quality.histories(catalog, version, before)}
        assert after == {row["place"]: row for row in quality.histories(catalog)}
    found = {places[row["place"]]: row for row in before}
    assert found.keys() == {"mean", "null_share", "failed_share", "bytes_per_row"}
    assert found["mean"] == {"place": ANY, "shards": 4, "total": 15.5, "squares": 93.25, "weight": 10}
    assert found["null_share"]["weight"] == 16
