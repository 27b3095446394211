"""Two items of one worker: the second is labeled while the first is written, in their order, and deaths are told apart."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.pipeline import config
from engine.plan.items import Beat, WorkItem
from engine.run import job
from engine.run.runners.queue import ItemQueue
from engine.run.runners.ray.actor import RayWorker
from engine.run.runners.ray.loop import RayLoop
from engine.run.runners.strikes import Strikes
from engine.run.runners.turns import Turns
from engine.work import marks
from engine.work.shard import ShardOutput
from manifests.catalog.catalog import Catalog
from manifests.store.storage import open_storage
from tests.engine.faulty import SETTINGS, attempt, files, item_of, worker_of

LIGHT = {"rgb": {"keep": True, "tokens": False}, "palette": {"tokens": False}}
_LONG_S = 30.0


@pytest.fixture
def source(tmp_path: Path, make_photos: Callable[[Path, int], Path]) -> Path:
    return make_photos(tmp_path / "photos", 10)


def two_items(workspace: Path, source: Path) -> tuple[WorkItem, WorkItem]:
    first = item_of(workspace, source, LIGHT, part_rows=5)
    with Catalog.open(str(workspace)) as catalog:
        return first, replace(first, part=catalog.parts("photos")[1])


class Gate:
    """Holds the first part's shards up, before they are written, until `opened` is set; tells which parts were written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.written: list[int] = []
        self.in_time = True
        write = ShardOutput.write

        def gated(output: Any, **facts: Any) -> Any:
            if output._item.part.part == 0:
                self.in_time = self.opened.wait(_LONG_S) and self.in_time
            record = write(output, **facts)
            self.written.append(record.part)
            return record

        monkeypatch.setattr(ShardOutput, "write", gated)


def test_an_item_is_labeled_while_the_one_before_is_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_items(tmp_path / "w", source)
    alone = worker_of(tmp_path / "w")
    expected = [alone.work(item).records for item in (first, second)]
    for path in files(tmp_path / "w"):
        (tmp_path / "w" / path).unlink()
    gate = Gate(monkeypatch)
    worker = worker_of(tmp_path / "w")
    beats: list[Beat] = []
    written = worker.label(first, beats.append)
    assert not files(tmp_path / "w")
    after = worker.work(second, beats.append)
    gate.opened.set()
    before = written()
    assert gate.in_time
    assert [[record.sha256 for record in result.records] for result in (before, after)] == [
        [record.sha256 for record in records] for records in expected
    ]
    # The time in which the second had the worker is not the first one's too.
    assert before.seconds["total"] <= before.seconds["label"] + before.seconds["wait"] + 1.0
    assert not [
        beat for place, beat in enumerate(beats) if beat.item == first.name and second.name in names(beats[:place])
    ]


def names(beats: list[Beat]) -> set[str]:
    return {beat.item for beat in beats}


@pytest.mark.parametrize("alike", ["actor", "run"])
def test_both_runners_let_the_next_item_begin(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, alike: str
) -> None:
    gate = Gate(monkeypatch)

    def open_when_the_second_is_there() -> None:
        while 1 not in gate.written and not gate.opened.wait(0.05):
            pass
        gate.opened.set()

    watcher = threading.Thread(target=open_when_the_second_is_there)
    watcher.start()
    if alike == "actor":
        first, second = two_items(tmp_path / "w", source)
        actor: Any = RayWorker(str(tmp_path / "w"), SETTINGS)
        with ThreadPoolExecutor(2) as calls:
            found = [calls.submit(actor.work, item, (first.plan, {})) for item in (first, second)]
            assert [[record.part for record in call.result()[0].records] for call in found] == [[0, 0], [1, 1]]
        assert actor.beat() == (None, None)
    else:
        document = {
            "workspace": str(tmp_path / "w"),
            "corpora": {"photos": {"source": str(source), "part_rows": 2, "modalities": LIGHT}},
            "engine": {"runner": "local", "workers": 1},
        }
        done = job.run(config.PipelineConfig.model_validate(document), quiet=True)
        assert done.counts["failed_rows"] == 0
        assert sorted(gate.written) == [part for part in range(5) for _ in LIGHT]
    watcher.join()
    assert gate.in_time, "the second item waited until the first was written"


def test_turns_are_taken_in_order_whatever_happens() -> None:
    turns, seen, ahead = Turns(), [], []
    assert [turns.take() for _ in range(3)] == [0, 1, 2]
    waiting = threading.Barrier(3, timeout=10)

    def go(ticket: int) -> str | None:
        def prefetch() -> None:
            ahead.append(ticket)
            waiting.wait()
            raise OSError("it is fetched when its turn comes")

        def label() -> Callable[[], str] | None:
            if ticket == 0:
                waiting.wait()
            if ticket == 1:
                raise ValueError("it could not even begin")
            seen.append(ticket)
            return lambda: f"written {ticket}"

        return turns.label(ticket, prefetch, label)

    with ThreadPoolExecutor(3) as threads:
        ends = {ticket: threads.submit(go, ticket) for ticket in (2, 1, 0)}
    assert isinstance(ends[1].exception(), ValueError)
    assert [ends[ticket].result() for ticket in (0, 2)] == ["written 0", "written 2"]
    assert seen == [0, 2]
    assert sorted(ahead) == [1, 2]
    assert turns.take() == 3
    assert turns.label(3, lambda: ahead.append(3), lambda: None) is None
    assert 3 not in ahead


@pytest.mark.parametrize(
    ("marked", "seen_at", "blamed"), [(None, "", 0), (None, "second", 1), ("first", "second", 0), ("second", "", 1)]
)
def test_who_is_to_blame_for_a_death(
    tmp_path: Path, source: Path, marked: str | None, seen_at: str, blamed: int
) -> None:
    items = dict(zip(("first", "second"), two_items(tmp_path / "w", source), strict=True))
    storage = open_storage(tmp_path / "w")
    crew: Any = SimpleNamespace(pools={}, actors=[])
    progress: Any = SimpleNamespace()
    loop = RayLoop("work", ItemQueue([], lambda item: frozenset()), crew, progress, Strikes({}), storage, "run-1")
    mark = marks.Mark(rows=(3,), doing="palette", reason="deadline")
    if marked:
        marks.write(storage, "run-1", items[marked].name, mark)
    known = items.get(seen_at)
    actor: Any = SimpleNamespace(items=deque(items.values()), seen_at=known.name if known else "")
    item, found = loop._to_blame(actor, "died")
    assert item is list(items.values())[blamed]
    assert found == (mark if marked else None)
    assert len(actor.items) == 1
    assert not storage.names("runs/run-1/marks")


def test_an_item_whose_worker_died_runs_alone(tmp_path: Path, source: Path) -> None:
    first, second = two_items(tmp_path / "w", source)
    for facts in ({"strikes": 1}, {"batch": 2}):
        queue = ItemQueue([attempt(first, **facts), second], lambda item: frozenset())
        assert queue.next("", alone=False) is None
        assert queue.next("") == attempt(first, **facts)
        assert queue.next("", alone=False) == second
