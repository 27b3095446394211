"""What a run tells: the fold of its events, the file they stand in, the table and the plain lines."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from engine.pipeline.sections import CorpusConfig
from engine.plan.corpus import CorpusPlan
from engine.plan.items import Beat, ItemResult, Target, WorkItem
from engine.progress import events, progress, table
from engine.progress import state as run_state
from engine.progress.progress import Progress
from engine.progress.state import RunState
from manifests.pixels.crops import CropRule
from manifests.store.storage import Storage, open_storage
from tests.records import part_added, shard_added

MADE = ("depth", "edges")


def item(number: int, group: str = "light", modalities: tuple[str, ...] = MADE, pool: str = "") -> WorkItem:
    part = part_added(number, rows=100)
    planned = CorpusPlan(
        corpus="photos",
        root="/",
        config=CorpusConfig(source="photos"),
        rule=CropRule(seed=0),
        crops=1,
        labelers=(),
        modalities={},
    )
    targets = tuple(
        Target(modality=name, form=form, fingerprint="f", crop=None)
        for name in modalities
        for form in ("label", "token")
    )
    return WorkItem(plan=planned, part=part, targets=targets, tokenizers={}, group=group, pool=pool)


def result(of: WorkItem, seconds: float = 2.0, failed: int = 0) -> ItemResult:
    records = tuple(
        shard_added(of.part.part, modality=target.modality, form=target.form, format="tar", rows=100, failed=failed)
        for target in of.targets
    )
    return ItemResult(
        records=records, rows=100, seconds={"total": seconds}, seconds_by_labeler={}, busy=0.9, rss_bytes=1 << 30
    )


def beat(name: str, rows: int) -> Beat:
    return Beat(item=name, rows=rows, stage="label", stage_s=0.1, busy=0.8, queue_fill=0.25, rss_bytes=2 << 30)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "work")


def in_file(storage: Storage, run: str) -> list[dict]:
    return [json.loads(line) for path in events.files(storage, run) for line in storage.read(path).splitlines()]


# -- the fold ---------------------------------------------------------------------------------------------------------


def fold(told: list[tuple[float, str, dict]]) -> RunState:
    state = RunState()
    for t, kind, fields in told:
        state.apply({"t": t, "event": kind, **fields})
    return state


def started(t: float, worker: str, number: int, group: str = "light", pool: str = "") -> tuple[float, str, dict]:
    name = f"photos/{number:07d}/{group}"
    return t, "started", {"worker": worker, "pool": pool, "item": name, "rows": 100, "modalities": [group]}


def made(t: float, number: int, seconds: float, group: str = "light", pool: str = "") -> tuple[float, str, dict]:
    fields = {"item": f"photos/{number:07d}/{group}", "pool": pool, "rows": 100, "shards": 2, "failed": 3}
    return t, "item", {**fields, "seconds": seconds, "busy": 0.9, "modalities": {group: 3}}


def at(t: float, worker: str, number: int, rows: int, group: str = "light") -> tuple[float, str, dict]:
    return t, "beat", {"worker": worker, **vars(beat(f"photos/{number:07d}/{group}", rows))}


def plan(t: float, modalities: dict[str, int], workers: int, price: float | None = None) -> tuple[float, str, dict]:
    return t, "plan", {"modalities": modalities, "workers": workers, "price": price}


def test_parts_rows_rates_and_eta_of_a_modality() -> None:
    told = [plan(10, {"light": 10}, 1)]
    for number in range(4):
        told += [started(10 + 20 * number, "w", number), made(30 + 20 * number, number, 20)]
    state = fold([*told, started(90, "w", 4), at(100, "w", 4, 50)])
    assert (state.modalities["light"].parts, state.parts, state.rows_of("light")) == (4, (4, 10), 450)
    recent, overall = state.rates_of("light")
    # From the first item on (t = 10): 450 rows in 90 s, and five a second in the last minute too.
    assert overall == pytest.approx(5)
    assert recent == pytest.approx(5, rel=0.35)
    assert state.eta_of("light") == pytest.approx(550 / (recent or 1))
    assert state.eta() == (pytest.approx(550 * 80 / 400), True)
    assert state.failed_rows == 12


def test_a_modality_that_no_worker_came_to_makes_the_eta_a_lower_bound() -> None:
    state = fold([plan(0, {"light": 2, "heavy": 2}, 2), started(0, "w", 0), made(10, 0, 10)])
    assert state.eta() == (pytest.approx(5), False)
    assert "ETA > 0:05" in table.line(state)


def test_pools_end_one_by_one_and_the_last_gives_the_eta() -> None:
    told = [plan(0, {"light": 4, "heavy": 4}, 5)]
    told += [(0, "workers", {"pool": name, "ready": ready, "wanted": 4}) for name, ready in (("a", 4), ("b", 1))]
    told += [started(0, "a-0", 0, pool="a"), started(0, "b-0", 0, "heavy", "b")]
    told += [made(10, 0, 10, pool="a"), made(40, 0, 40, "heavy", "b")]
    assert fold(told).eta() == (pytest.approx(3 * 40), True)


def test_what_workers_cost_is_counted_while_they_are_ready() -> None:
    told = [plan(0, {"light": 2}, 8, 3.6), (0, "workers", {"pool": "", "ready": 2, "wanted": 8})]
    told += [(100, "workers", {"pool": "", "ready": 4, "wanted": 8}), (200, "ended", {"status": "done", "counts": {}})]
    state = fold([*told, (500, "message", {"text": "late"})])
    assert state.cost == pytest.approx((2 * 100 + 4 * 100) * 3.6 / 3600)


def test_an_item_is_at_one_worker_and_a_failed_one_is_no_longer_waited_for() -> None:
    told = [plan(0, {"light": 2}, 2), started(0, "a", 0), at(5, "a", 0, 40), started(9, "b", 0), made(20, 1, 9)]
    state = fold(told)
    assert list(state.at_work) == ["b"]
    assert state.rows_of("light") == 100
    told += [
        (21, "failed_item", {"item": "photos/0000000/light", "error": "X", "message": "", "modalities": ["light"]})
    ]
    state = fold(told)
    assert not state.at_work
    assert state.modalities["light"].finished
    assert state.eta() is None


def test_a_state_goes_through_json_and_its_size_is_that_of_the_workers() -> None:
    def size(items: int) -> int:
        told = [plan(0, {"light": items}, 4)]
        for number in range(items):
            told += [started(number, f"w{number % 4}", number), made(number + 0.5, number, 1)]
        state = fold(told)
        document = json.loads(json.dumps(run_state.document(state)))
        assert run_state.loaded(document) == state
        return len(json.dumps(document))

    assert size(8000) < size(800) + 200


# -- the driver's side ------------------------------------------------------------------------------------------------


def test_every_event_stands_in_the_file_of_a_local_run(storage: Storage) -> None:
    told = Progress(events.sink(storage, "run-a"), quiet=True)
    told.event("run", run="run-a", kind="run", host="mill", pid=1)
    told.stage("ingest photos", 100, "samples")
    told.update("ingest photos", 100)
    told.plan({"depth": 2, "edges": 2}, 1, 2.5)
    told.workers("", 1, 1)
    told.workers("", 1, 1)
    first, second = item(0), item(1)
    told.started(first, "w0")
    told.beat("w0", beat(first.name, 64))
    told.done_items([(first, result(first, failed=2))])
    told.strike(second, "w0", "killed by signal 9", 1, "done again")
    told.failed_item(second, ValueError("broken"))
    told.alarm("depth: null rate 0.5")
    told.say("a word")
    told.event("ended", status="done", counts={})
    told.close()
    told.close()
    found = in_file(storage, "run-a")
    kinds = ["run", "stage", "progress", "plan", "workers", "started", "beat", "item", "strike", "failed_item", "alarm"]
    assert [event["event"] for event in found] == [*kinds, "message", "ended"]
    assert [event["t"] for event in found] == sorted(event["t"] for event in found)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", event["time"]) for event in found)
    done = found[kinds.index("item")]
    assert (done["modalities"], done["failed"], done["shards"]) == ({"depth": 4, "edges": 4}, 8, 4)
    again = fold([(event["t"], event["event"], event) for event in found])
    assert (again.failed_items, again.strikes, again.alarms, again.status) == (1, 1, 1, "done")


def test_events_that_matter_are_in_the_file_at_once(storage: Storage) -> None:
    told = Progress(events.sink(storage, "run-a"), quiet=True)
    told.plan({"depth": 1, "edges": 1}, 1)
    one = item(0)
    told.done_items([(one, result(one))])
    until = time.monotonic() + 5
    while not any(event["event"] == "item" for event in in_file(storage, "run-a")):
        assert time.monotonic() < until
        time.sleep(0.01)
    told.close()


def test_many_items_cost_microseconds_and_no_memory(storage: Storage) -> None:
    told = Progress(events.sink(storage, "run-a"), quiet=True)
    count = 6000
    told.plan(dict.fromkeys(MADE, count), 8, 1.0)
    items = [item(number) for number in range(count)]
    results = [result(one) for one in items]
    sizes = []
    began = time.thread_time()
    for number, (one, its) in enumerate(zip(items, results, strict=True)):
        told.started(one, f"w{number % 8}")
        told.beat(f"w{number % 8}", beat(one.name, 50))
        told.done_items([(one, its)])
        if number in (500, count - 1):
            sizes.append(len(json.dumps(run_state.document(told._state))))
    each_s = (time.thread_time() - began) / (3 * count)
    told.close()
    assert sizes[1] < sizes[0] + 500
    # 0.02 ms on an idle core; the machine may be busy.
    assert each_s < 0.3e-3
    assert told._state.parts == (2 * count, 2 * count)
    # Who comes late starts at the newest state, and knows the same.
    late = events.EventReader(storage, "run-a")
    found = late.read()
    assert found[0]["event"] == "state"
    assert len(found) < 2 * count
    state = RunState()
    for event in found:
        state.apply(event)
    assert (state.items, state.modalities["depth"].rows) == (count, 100 * count)


def test_many_workers_beat_no_more_often_than_a_file_bears(storage: Storage) -> None:
    told = Progress(events.sink(storage, "run-a"), quiet=True)
    told.plan({"depth": 500}, 200)
    for _ in range(5):
        for number in range(200):
            told.beat(f"w{number}", beat(f"photos/{number:07d}/light", 50))
    told.close()
    assert len([event for event in in_file(storage, "run-a") if event["event"] == "beat"]) == 200
    assert len(told._state.at_work) == 200


def test_threads_may_report_at_once(storage: Storage) -> None:
    told = Progress(events.sink(storage, "run-a"), quiet=True)
    told.plan(dict.fromkeys(MADE, 400), 4)

    def work(worker: int) -> None:
        for number in range(worker, 400, 4):
            one = item(number)
            told.started(one, f"w{worker}")
            told.beat(f"w{worker}", beat(one.name, 10))
            told.done_items([(one, result(one))])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.close()
    found = in_file(storage, "run-a")
    assert len([event for event in found if event["event"] == "item"]) == 400
    assert not told._state.at_work


def test_a_full_disk_costs_the_events_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    told = Progress(events._EventFile(Path("/dev/full")), quiet=True)
    for _ in range(3):
        told.event("item", item="photos/0", modalities={}, rows=1, seconds=1.0, pool="")
        time.sleep(0.05)
    told.close()
    assert len([record for record in caplog.records if "events are lost" in record.message]) == 1


# -- an object store --------------------------------------------------------------------------------------------------


def test_a_store_gets_segments_of_which_the_newest_tells_all(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_STATE_AFTER_BYTES", 4000)
    storage = open_storage(f"{s3_bucket}/events")
    told = Progress(events.sink(storage, "run-a"), quiet=True)
    told.plan(dict.fromkeys(MADE, 40), 2)
    early, until = None, time.monotonic() + 10
    while early is None:
        assert time.monotonic() < until
        if events.files(storage, "run-a"):
            early = events.EventReader(storage, "run-a")
    seen = early.read()
    for number in range(40):
        told.done_items([(item(number), result(item(number)))])
        time.sleep(0.005)
    told.event("ended", status="done", counts={})
    told.close()
    names = events.files(storage, "run-a")
    assert names[:2] == ["runs/run-a/events-000001.jsonl", "runs/run-a/events-000002.jsonl"]
    for reader, before in ((early, seen), (events.EventReader(storage, "run-a"), [])):
        state = RunState()
        for event in [*before, *reader.read()]:
            state.apply(event)
        assert (state.items, state.parts, state.status) == (40, (80, 80), "done")
    assert len([event for event in in_file(storage, "run-a") if event["event"] == "item"]) == 40


def test_a_store_that_is_away_costs_no_event_once_it_is_back(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "work")
    segments = events._SegmentWriter(storage, "run-a")
    (tmp_path / "work").write_text("a file where the folder should be")
    segments.write(b'{"t": 0, "event": "message"}\n')
    segments.flush(now=True)
    (tmp_path / "work").unlink()
    segments.flush(now=True)
    assert len(in_file(storage, "run-a")) == 1


# -- for people -------------------------------------------------------------------------------------------------------


def busy_state() -> RunState:
    told = [plan(10, {"depth_of_something_with_a_long_name": 1200, "light": 1200}, 8, 2.5)]
    told += [(10, "workers", {"pool": "gpu", "ready": 3, "wanted": 4})]
    told += [(11, "stage", {"stage": "ingest photos", "total": 10, "unit": "samples"})]
    told += [(12, "progress", {"stage": "ingest photos", "done": 5, "total": 10, "failed": 0, "note": ""})]
    for number in range(30):
        told += [started(12 + number, "gpu-1", number, pool="gpu"), made(12.9 + number, number, 1, pool="gpu")]
    told += [(50, "alarm", {"text": "depth part 7: null rate 0.3"}), started(50, "gpu-2", 77, pool="gpu")]
    return fold([*told, at(51, "gpu-2", 77, 64), (51 + 192, "message", {"text": "x"})])


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(width: int) -> None:
    console = Console(width=width, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(table.table(busy_state()))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    text = re.sub(r"\s+", " ", text)
    for expected in (
        "light",
        "30/1,200",
        "3/4",
        "photos/0000077/light 3:13",
        "2.1 GB",
        "90 failed rows",
        "1 alarm",
        "$",
    ):
        assert expected in text
    assert "worker gpu-2 stands at row 64 of photos/0000077/light since 3:12" in text


def test_the_line_has_the_same_facts() -> None:
    line = table.line(busy_state())
    assert "\n" not in line
    for expected in ("4:03", "30/2,400 parts", "light 30/1,200", "$", "90 failed rows", "gpu-2 stands", "busy 27 %"):
        assert expected in line


def test_without_a_terminal_there_are_lines(
    storage: Storage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.2)
    told = Progress(events.sink(storage, "run-a"))
    told.plan(dict.fromkeys(MADE, 2), 1)
    told.started(item(0), "w0")
    told.beat("w0", beat(item(0).name, 50))
    time.sleep(1.2)
    told.done_items([(item(number), result(item(number))) for number in range(2)])
    told.event("ended", status="done", counts={})
    told.close()
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 8
    assert "4/4 parts 100 %" in lines[-1]
    assert "depth 2/2" in lines[-1]


def test_stages_of_other_verbs_show_lines_at_their_end(capsys: pytest.CaptureFixture[str]) -> None:
    told = Progress()
    told.stage("copy", 10, "files")
    told.update("copy", 4, item="before")
    told.update("copy", 6, item="now", note="3 MB")
    told.close()
    assert capsys.readouterr().err == "copy         10/10 files  100 %  3 MB\n"


ON_TERMINAL = """
import sys, threading, time
sys.path.insert(0, {tests!r})
from test_progress import beat, item, result, MADE
from engine.progress import events
from engine.progress.progress import Progress
from manifests.store.storage import open_storage
told = Progress(events.sink(open_storage({work!r}), "run-a"))
told.stage("ingest photos", 100, "samples")
told.update("ingest photos", 100)
told.plan(dict.fromkeys(MADE, 40), 4, 2.5)
def work(worker):
    for number in range(worker, 40, 4):
        one = item(number)
        told.started(one, "w%d" % worker)
        told.beat("w%d" % worker, beat(one.name, 10))
        told.say("item %d" % number)
        time.sleep(0.1)
        told.done_items([(one, result(one))])
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
told.event("ended", status="done", counts={{}})
told.close()
"""


@pytest.fixture
def on_terminal() -> Iterator[Callable[[list[str]], str]]:
    """Runs a command on a terminal of 80 columns; what it wrote."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(command: list[str]) -> str:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "COLUMNS": "80", "LINES": "40", "TERM": "xterm-256color"}
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        processes.append(process)
        os.close(theirs)
        written = b""
        try:
            while chunk := os.read(ours, 65536):
                written += chunk
        except OSError:  # The other end is closed.
            pass
        os.close(ours)
        assert process.wait(timeout=10) == 0, written.decode()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode()).replace("\r", "\n")

    yield run
    for process in processes:
        process.kill()


def test_on_a_terminal_threads_report_above_a_table_whose_last_state_stays(
    tmp_path: Path, on_terminal: Callable[[list[str]], str]
) -> None:
    code = ON_TERMINAL.format(tests=str(Path(__file__).parent), work=str(tmp_path / "work"))
    written = on_terminal([sys.executable, "-c", code])
    assert len(re.findall(r"item \d+ *$", written, re.MULTILINE)) == 40
    last = written[written.rindex("modality") :]
    assert re.search(r"depth +40/40 +100 % .* done", last)
    assert re.search(r"80/80 parts 100 % .* done", last)


def test_the_page_names_every_event_with_its_fields(storage: Storage) -> None:
    page = (Path(__file__).parents[3] / "docs/running.md").read_text()
    told = {
        name: set(fields.split(", ")) for name, fields in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE)
    }
    tell = Progress(events.sink(storage, "run-a"), quiet=True)
    tell.stage("copy", 1, "files")
    tell.update("copy", 1)
    tell.plan({"depth": 1}, 1)
    tell.workers("", 1, 1)
    one = item(0)
    tell.started(one, "w")
    tell.beat("w", beat(one.name, 1))
    tell.strike(one, "w", "killed", 1, "done again")
    tell.done_items([(one, result(one))])
    tell.failed_item(one, ValueError("x"))
    tell.alarm("x")
    tell.say("x")
    tell.close()
    for event in in_file(storage, "run-a"):
        assert set(event) - {"time", "t", "event"} == told[event["event"]]
    assert {name for name in vars(RunState) if name.startswith("_on_")} <= {f"_on_{name}" for name in told}
