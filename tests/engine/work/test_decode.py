"""Rows in order within a bound of bytes, whatever is wrong with them."""

import threading
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan.corpus import CorpusPlan
from engine.sources.read import SourceBytes
from engine.work.decode import ByteBudget, load_chunks
from engine.work.inputs import Inputs
from engine.work.rows import LoadedRow, Needs
from manifests.formats import shards
from manifests.store.storage import open_storage
from tests.engine.faulty import SETTINGS, item_of


@given(sizes=st.lists(st.integers(0, 120), min_size=1, max_size=30), limit=st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_rows_enter_in_order_and_stay_under_the_limit(sizes: list[int], limit: int) -> None:
    budget = ByteBudget(limit)
    inside: list[int] = []
    order: list[int] = []
    lock = threading.Lock()
    over: list[int] = []

    def enter(ticket: int) -> None:
        budget.enter(ticket, sizes[ticket])
        with lock:
            order.append(ticket)
            inside.append(ticket)
            held = sum(sizes[row] for row in inside)
            if held > limit and len([row for row in inside if sizes[row]]) > 1:
                over.append(held)

    threads = [threading.Thread(target=enter, args=(ticket,), daemon=True) for ticket in reversed(range(len(sizes)))]
    for thread in threads:
        thread.start()
    for ticket in range(len(sizes)):
        until = time.monotonic() + 10
        while ticket not in order and time.monotonic() < until:
            time.sleep(0.0005)
        assert ticket in order, "a row never got in"
        with lock:
            inside.remove(ticket)
        budget.leave(sizes[ticket])
    assert sorted(order) == list(range(len(sizes)))
    assert not over


def test_one_row_alone_may_exceed_the_limit() -> None:
    budget = ByteBudget(10)
    budget.enter(0, 1000)
    entered = threading.Event()

    def second() -> None:
        budget.enter(1, 1)
        entered.set()

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    assert not entered.wait(0.1)
    budget.leave(1000)
    assert entered.wait(5)


def part_of(folder: Path, workspace: Path, **corpus: Any) -> tuple[CorpusPlan, list[dict[str, Any]]]:
    item = item_of(workspace, folder, {"rgb": {"tokens": False, "keep": True}}, **corpus)
    return item.plan, shards.read_samples(open_storage(workspace).read(item.part.path))


def chunks_of(
    plan: CorpusPlan, samples: list[dict[str, Any]], units: list[list[int]], *, photo: bool = True, **bounds: int
) -> Generator[list[LoadedRow], None, None]:
    bounds = {"threads": 3, "queue_bytes": 64 << 20, "most": 4, **bounds}
    inputs = Inputs(
        plan=plan,
        samples=samples,
        source=SourceBytes(plan.root, plan.config, samples),
        storage=open_storage(plan.root),
        settings=replace(SETTINGS, decode_threads=bounds["threads"]),
    )
    needs = Needs(decode=True, photo=photo, crops=(0, 1), sizes=(224,))
    return load_chunks(inputs, units, needs=needs, most=bounds["most"], budget=ByteBudget(bounds["queue_bytes"]))


def test_a_reader_that_stops_early_leaves_no_thread_waiting(photos: Path, tmp_path: Path) -> None:
    plan, samples = part_of(photos, tmp_path / "w")
    before = set(threading.enumerate())
    rows = list(range(len(samples)))
    chunks = chunks_of(plan, samples, [rows], queue_bytes=1)
    first = next(chunks)
    assert first[0].image is not None
    assert first[0].image.shape[2] == 3
    chunks.close()
    assert set(threading.enumerate()) <= before
    keys = [row.key for chunk in chunks_of(plan, samples, [rows]) for row in chunk]
    assert keys == [sample.key for sample in samples]
    assert list(chunks_of(plan, samples, [])) == []


def test_chunks_end_with_their_unit_and_by_bytes_never_by_time(photos: Path, tmp_path: Path) -> None:
    plan, samples = part_of(photos, tmp_path / "w")
    units = [[0, 1, 2, 3, 4, 5], [6], [8, 7]]
    found = [[row.row for row in chunk] for chunk in chunks_of(plan, samples, units)]
    assert found == [[0, 1, 2, 3], [4, 5], [6], [8, 7]]
    assert [[row.row for row in chunk] for chunk in chunks_of(plan, samples, units, queue_bytes=1)] == [
        [row] for unit in units for row in unit
    ]
    # A photograph here takes about half a megabyte to decode, and its crops as much again.
    bounds = [
        [[row.row for row in chunk] for chunk in chunks_of(plan, samples, units, queue_bytes=4 << 20, threads=threads)]
        for threads in (1, 2, 5)
    ]
    assert bounds[0] == bounds[1] == bounds[2]


def test_rows_come_with_crops_and_let_go_of_photographs_that_none_needs(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff no photograph")
    plan, samples = part_of(photos, tmp_path / "w")
    rows = [row for chunk in chunks_of(plan, samples, [list(range(10))], photo=False) for row in chunk]
    broken = [row for row in rows if row.problem is not None]
    assert len(broken) == 1
    assert broken[0].problem is not None
    assert broken[0].problem.failure is not None
    assert broken[0].problem.failure.class_name == "DecodeError"
    assert broken[0].cuts == broken[0].pixels == {}
    for row in rows:
        if row.problem is None:
            assert row.image is None
            assert row.size is not None
            assert {key: array.shape for key, array in row.pixels.items()} == dict.fromkeys(
                [(0, 224), (1, 224)], (224, 224, 3)
            )
