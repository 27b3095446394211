"""Tests that shards that depart from their history are told as they come: those that SQL finds over the whole history."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.progress import events
from engine.progress.progress import Progress
from engine.run.alarms import Alarm, Alarms
from manifests.catalog.catalog import Catalog
from manifests.log import entries as log
from manifests.log.actions import CorpusAdded, PartAdded, RecipeCurrent, ShardAdded
from manifests.store.storage import Storage, open_storage
from tests.records import RECIPE, part_added, shard_added


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "cache"))
    storage = open_storage(tmp_path / "work")
    log.create_workspace(storage)
    with Catalog(storage) as catalog:
        corpus = CorpusAdded(corpus="photos", kind="image", source="x", seed=0, part_rows=100, config={})
        catalog.commit([corpus, *(current(form) for form in ("label", "token"))], run="r")
    return storage


def current(form: Any) -> RecipeCurrent:
    return RecipeCurrent(corpus="photos", modality="depth", form=form, fingerprint=RECIPE, crops=2)


def shard(
    part: int, *, ok: int = 100, rows: int = 100, crop: int = 0, form: Any = "label", **metrics: float
) -> ShardAdded:
    return shard_added(
        part,
        modality="depth",
        crop=crop,
        form=form,
        size_bytes=1000 * ok,
        rows=rows,
        ok=ok,
        failed=rows - ok,
        tokens=196 * ok if form == "token" else None,
        metrics=metrics,
    )


def part(number: int) -> PartAdded:
    return part_added(number, rows=100)


def alarms_of(storage: Storage, *commits: list[ShardAdded]) -> list[Alarm]:
    """The alarms as the commits come, which must be those that SQL finds afterwards."""
    with Catalog(storage) as catalog:
        alarms, before = Alarms(catalog), catalog.version
        found = []
        for records in commits:
            catalog.commit([*(part(record.part) for record in records), *records], run="r")
            found += alarms.new()
        columns = ("part", "crop", "form", "alarm", "metric", "shards_before", "value", "mean", "deviations")
        rows = catalog.fetch(f"SELECT {', '.join(columns)} FROM alarms WHERE version > ?", [before])[1]
    told = [tuple(getattr(alarm, column) for column in columns) for alarm in found]

    def order(row: tuple[Any, ...]) -> tuple[Any, ...]:
        return row[:6]

    assert [row[:6] for row in sorted(told, key=order)] == [row[:6] for row in sorted(rows, key=order)]
    for one, other in zip(sorted(told, key=order), sorted(rows, key=order), strict=True):
        for ours, theirs in zip(one[6:], other[6:], strict=True):
            assert ours == theirs if None in (ours, theirs) else ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    return found


def test_a_value_far_from_those_before_is_a_drift(workspace: Storage) -> None:
    generator = np.random.default_rng(0)
    usual = [[shard(number, mean=float(generator.normal(3, 0.3)))] for number in range(40)]
    (alarm,) = alarms_of(workspace, *usual, [shard(40, mean=5.0)], [shard(41, mean=3.4)])
    assert (alarm.part, alarm.alarm, alarm.metric, alarm.value) == (40, "drift", "mean", 5.0)
    assert alarm.shards_before == 40
    assert alarm.deviations == pytest.approx((5 - 3) / 0.3, rel=0.3)
    assert str(alarm).startswith("alarm (drift): depth labels of photos part 40 crop 0 have mean 5, ")


def test_nothing_drifts_before_there_is_a_history(workspace: Storage) -> None:
    assert alarms_of(workspace, *([shard(number, mean=3.0)] for number in range(19)), [shard(19, mean=99.0)]) == []


def test_a_constant_may_waver(workspace: Storage) -> None:
    usual = [[shard(number, mean=100.0, duplicates=0.0, std=0.0)] for number in range(25)]
    wavering = [shard(25, mean=103.0, duplicates=0.01, std=0.005)]
    assert alarms_of(workspace, *usual, wavering) == []
    (alarm,) = alarms_of(workspace, [shard(26, mean=110.0, duplicates=0.0, std=0.0)])
    assert (alarm.metric, alarm.shards_before) == ("mean", 26)


def test_a_small_part_is_not_compared(workspace: Storage) -> None:
    usual = [[shard(number, mean=3.0, entropy_bits=7.0)] for number in range(25)]
    assert alarms_of(workspace, *usual, [shard(25, rows=40, ok=40, mean=9.0, entropy_bits=2.0)]) == []


def test_extremes_and_histograms_have_no_history(workspace: Storage) -> None:
    usual = [[shard(number, max=1.0, score_hist_3=5)] for number in range(25)]
    assert alarms_of(workspace, *usual, [shard(25, max=900.0, score_hist_3=5000)]) == []


def test_many_more_nulls_than_before_alarm_at_once(workspace: Storage) -> None:
    usual = [[shard(number, ok=98)] for number in range(3)]
    (alarm,) = alarms_of(workspace, *usual, [shard(3, ok=40)])
    assert (alarm.alarm, alarm.metric, alarm.value) == ("nulls", "null_share", 0.6)


def test_rows_left_out_on_purpose_are_no_nulls(workspace: Storage) -> None:
    usual = [[shard(number)] for number in range(3)]
    picked = replace(shard(3, ok=6), failed=0, not_selected=90, forgotten=4)
    assert alarms_of(workspace, *usual, [picked]) == []
    with Catalog(workspace) as catalog:
        found = catalog.fetch("SELECT value FROM quality WHERE part = 3 AND metric = 'null_share'")[1]
    assert [tuple(row) for row in found] == [(0.0,)]


def test_a_codebook_that_collapses_alarms_at_once(workspace: Storage) -> None:
    usual = [[shard(number, form="token", codebook_use=0.9)] for number in range(3)]
    (alarm,) = alarms_of(workspace, *usual, [shard(3, form="token", codebook_use=0.4)])
    assert (alarm.alarm, alarm.metric) == ("collapse", "codebook_use")


def test_rows_that_are_all_equal_and_numbers_that_are_none_alarm_in_the_first_shard_alone(workspace: Storage) -> None:
    broken = [[shard(number, duplicates=0.99, not_finite=0.25)] for number in range(3)]
    found = alarms_of(workspace, *broken)
    assert {(alarm.part, alarm.alarm, alarm.mean) for alarm in found} == {
        (0, "all equal", None),
        (0, "not finite", None),
    }
    assert "the first shard of its recipe" in str(found[0])
    few = [shard(3, form="token", rows=8, ok=8, duplicates=0.875, label_not_finite=0.0)]
    assert alarms_of(workspace, few) == []
    (alarm,) = alarms_of(workspace, [shard(4, form="token", duplicates=0.1, label_not_finite=0.5)])
    assert alarm.metric == "label_not_finite"


@pytest.mark.parametrize("seed", range(6))
def test_the_driver_and_sql_find_the_same_in_any_history(workspace: Storage, seed: int) -> None:
    generator = np.random.default_rng(seed)

    def wild(center: float, spread: float) -> float:
        factor = generator.choice([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 60.0])
        return float(f"{center + spread * factor * generator.standard_normal():.6g}")

    commits: list[list[ShardAdded]] = []
    for first in range(0, 60, 4):
        records = []
        for number in range(first, first + 4):
            ok = int(generator.choice([100, 99, 95, 60, 30, 3], p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05]))
            figures: dict[str, Any] = {
                "mean": wild(3, 0.3),
                "std": abs(wild(0.02, 0.001)),
                "duplicates": min(1, abs(wild(0.1, 0.1))),
            }
            figures["not_finite"] = float(generator.choice([0, 0, 0, 0.1]))
            for crop in (1, 0):
                records.append(shard(number, ok=ok, crop=crop, **figures))
            records.append(shard(number, ok=ok, form="token", codebook_use=abs(wild(0.5, 0.05)), label_mean=1.0))
        commits.append([records[place] for place in generator.permutation(len(records))])
    # A driver that starts in the middle goes on where the log stands.
    found = alarms_of(workspace, *commits[:8])
    with Catalog(workspace) as catalog:
        alarms = Alarms(catalog)
        for records in commits[8:]:
            catalog.commit([*(part(record.part) for record in records), *records], run="r")
            found += alarms.new()
        rows = catalog.fetch("SELECT part, crop, form, alarm, metric, shards_before FROM alarms")[1]
    told = [(each.part, each.crop, each.form, each.alarm, each.metric, each.shards_before) for each in found]
    assert sorted(told) == sorted(rows)
    assert {alarm.alarm for alarm in found} >= {"drift", "nulls", "not finite"}


def test_alarms_of_many_kinds_do_not_flood(workspace: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    with Catalog(workspace) as catalog:
        alarms = Alarms(catalog)
        progress = Progress(events.sink(workspace, "r"))
        usual: dict[str, Any] = {f"figure_{number}": 1.0 for number in range(20)}
        wild: dict[str, Any] = dict.fromkeys(usual, 9.0)
        for number in range(25):
            catalog.commit([shard(number, **usual)], run="r")
        assert alarms.tell(progress) == 0
        catalog.commit([shard(25, **wild)], run="r")
        assert alarms.tell(progress) == 0, "it was asked a moment ago"
        assert alarms.tell(progress, at_once=True) == 20
        assert alarms.tell(progress, at_once=True) == 0
        progress.close()
    assert workspace.read("runs/r/events.jsonl").decode().count('"event": "alarm"') == 20
    told = capsys.readouterr().err
    assert told.count("alarm (drift)") == 8
    assert told.count("of more kinds") == 1


def test_an_alarm_is_an_event_each_and_a_line_a_kind(workspace: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    with Catalog(workspace) as catalog:
        alarms = Alarms(catalog)
        progress = Progress(events.sink(workspace, "r"))
        catalog.commit([shard(number, mean=1.0) for number in range(25)], run="r")
        catalog.commit([shard(25, mean=7.0), shard(26, mean=70.0), shard(27, mean=1.0)], run="r")
        assert alarms.tell(progress) == 2
        progress.close()
    written = workspace.read("runs/r/events.jsonl").decode()
    assert written.count('"event": "alarm"') == 2
    assert capsys.readouterr().err.count("alarm (drift)") == 1
