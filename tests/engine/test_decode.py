"""Rows in order within a bound of bytes, whatever is wrong with them."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decode import ByteBudget


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


def test_a_reader_that_stops_early_leaves_no_thread_waiting(photos, tmp_path) -> None:
    from engine.config import PipelineConfig
    from engine.corpus_plan import corpus_plan
    from engine.decode import load_rows
    from engine.sources import read_bytes, scan
    from manifests.recipe import sha256_hex

    config = PipelineConfig.model_validate(
        {"workspace": str(tmp_path / "w"), "corpora": {"p": {"source": str(photos), "modalities": ["rgb"]}}}
    )
    found = scan(config.corpora["p"])
    plan = corpus_plan(config, "p", found.root, {})
    samples = [
        {
            "corpus": "p",
            "part": 0,
            "row": row,
            "key": listed.key,
            "source": listed.source,
            "size_bytes": listed.size_bytes,
            "sha256": bytes.fromhex(sha256_hex(read_bytes(found.root, listed.source))),
        }
        for row, listed in enumerate(found.samples)
    ]
    rows = load_rows(plan, samples, needs_image=True, threads=4, queue_bytes=1)
    first = next(rows)
    assert first.image is not None
    assert first.image.shape[2] == 3
    rows.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    keys = [row.key for row in load_rows(plan, samples, needs_image=True, threads=3, queue_bytes=1 << 20)]
    assert keys == [listed.key for listed in found.samples]
    with pytest.raises(StopIteration):
        next(load_rows(plan, [], needs_image=True, threads=2, queue_bytes=1))
