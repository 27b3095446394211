"""Which item comes next, what follows a death, how many workers there are: policies, without Ray and without clocks."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from engine.pipeline import config as pipeline
from engine.plan.corpus import CorpusPlan, corpus_plan
from engine.plan.items import Attempt, Target, WorkItem
from engine.run.runners.driver import Draining
from engine.run.runners.pools import has_room, pools, wanted_workers
from engine.run.runners.queue import ItemQueue, in_turn
from engine.run.runners.strikes import Strikes, stops_the_run, then_words
from engine.work.inputs import WorkerSettings
from engine.work.marks import Mark
from manifests.errors import ConfigError, ModmillError, ShardError
from manifests.log.interrupts import held_back
from tests.records import part_added

PIPELINE = """
workspace: work
corpora:
  photos: {source: photos, modalities: [palette, metadata]}
engine:
  runner: local
  gpus: 0.5
  pools:
    big: {labelers: [edges], workers: 3, threads: 2, batch: 8, memory_mb: 1024, node_labels: {kind: big}}
"""
TARGET = Target(modality="palette", form="label", fingerprint="f" * 64, crop=None)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> pipeline.PipelineConfig:
    file = tmp_path_factory.mktemp("queue") / "pipeline.yaml"
    file.write_text(PIPELINE)
    return pipeline.load(file, [])


@pytest.fixture(scope="module")
def plan(config: pipeline.PipelineConfig) -> CorpusPlan:
    return corpus_plan(config, "photos", "/photos", {})


def make_item(plan: CorpusPlan, number: int, group: str = "", pool: str = "") -> WorkItem:
    part = part_added(number, rows=64)
    return WorkItem(plan=plan, part=part, targets=(TARGET,), tokenizers={}, group=group, pool=pool)


def numbers(queue: ItemQueue, count: int, **how) -> list[int]:
    found = [queue.next("", **how) for _ in range(count)]
    return [item.part.part for item in found if item is not None]


# -- queue ---------------------------------------------------------------------------------------------------------


def test_items_come_in_their_order_and_again_first(plan: CorpusPlan) -> None:
    queue = ItemQueue((make_item(plan, number) for number in range(4)), lambda item: frozenset())
    first = queue.next("")
    assert first is not None
    assert numbers(queue, 1) == [1]
    queue.put_back(first)
    assert not queue.exhausted
    assert numbers(queue, 9) == [0, 2, 3]
    assert queue.exhausted


def test_a_worker_gets_the_group_whose_models_it_holds(plan: CorpusPlan) -> None:
    items = [make_item(plan, number, group) for group in ("a", "b") for number in range(3)]
    queue = ItemQueue(items, lambda item: frozenset({f"model {item.group}", "shared"}))
    held = queue.next("", frozenset({"model b", "shared"}))
    fresh = queue.next("")
    assert held is not None
    assert held.group == "b"
    assert fresh is not None
    assert fresh.group == "a"
    rest = [queue.next("", frozenset({"model b"})) for _ in range(4)]
    assert [item.group for item in rest if item is not None] == ["b", "b", "a", "a"]


def test_pools_are_served_apart_and_by_turns(plan: CorpusPlan) -> None:
    streams = [[make_item(plan, number, pool=pool) for number in range(2)] for pool in ("", "big")]
    queue = ItemQueue(in_turn(map(iter, streams)), lambda item: frozenset(), window=1)
    big = queue.next("big")
    assert big is not None
    assert big.pool == "big"
    assert numbers(queue, 9) == [0, 1]
    assert queue.waiting("big") == 1


def test_the_iterator_is_pulled_no_further_than_is_needed(plan: CorpusPlan) -> None:
    pulled = []

    def endless() -> Iterator[WorkItem]:
        while True:
            pulled.append(None)
            yield make_item(plan, len(pulled))

    queue = ItemQueue(endless(), lambda item: frozenset(), window=10)
    for _ in range(1000):
        assert queue.next("") is not None
    assert 1000 <= len(pulled) <= 1010
    assert queue.next("nobody's") is None
    assert len(pulled) < 10_000, "a pool without items must not make the driver hold all others'"


def test_an_item_with_marks_runs_alone(plan: CorpusPlan) -> None:
    item = make_item(plan, 0)
    queue = ItemQueue([], lambda item: frozenset())
    queue.put_back(replace(item, attempt=replace(item.attempt, strikes=1)))
    assert queue.next("", alone=False) is None
    assert queue.next("", alone=True) is not None


# -- strikes ----------------------------------------------------------------------------------------------------------


def again(outcome: WorkItem | Exception) -> WorkItem:
    assert isinstance(outcome, WorkItem), outcome
    return outcome


def live_through(item: WorkItem, killers: set[int], batch: int = 8, doing: str = "palette") -> tuple[WorkItem, int]:
    """An item whose worker dies at these rows, as workers mark what they do; the attempt that goes through."""
    strikes = Strikes({"": batch})
    for deaths in range(100):
        left = sorted(killers - set(item.attempt.killers))
        if not left:
            return item, deaths
        row = left[0]
        rows = range(row // batch * batch, row // batch * batch + batch)
        # Suspects of the batch go first and one by one; then the rest of it together.
        for suspect in item.attempt.suspects:
            if suspect in rows:
                rows = (suspect,)
                if suspect == row:
                    break
        mark = Mark(rows=tuple(rows) if row in rows else (row,), doing=doing) if item.attempt.marks else None
        item = again(strikes.died(item, "died", "its process ended", mark))
    raise AssertionError("it never goes through")


def test_a_row_that_kills_is_found_and_left_out(plan: CorpusPlan) -> None:
    item, deaths = live_through(make_item(plan, 0), {13})
    assert set(item.attempt.killers) == {13}
    failure = item.attempt.killers[13]
    assert (failure.stage, failure.class_name) == ("label", "WorkerDied")
    assert "palette" in failure.message
    assert deaths <= 4
    assert item.attempt.strikes == 1


def test_four_killers_in_one_part_are_found(plan: CorpusPlan) -> None:
    item, deaths = live_through(make_item(plan, 0), {3, 4, 40, 63}, doing="decode")
    assert set(item.attempt.killers) == {3, 4, 40, 63}
    assert {failure.stage for failure in item.attempt.killers.values()} == {"decode"}
    assert deaths <= 14


def test_more_killers_than_sixteen_fail_the_item(plan: CorpusPlan) -> None:
    with pytest.raises(AssertionError, match="more than 16 of its rows"):
        live_through(make_item(plan, 0), set(range(0, 64, 3)))


def test_a_worker_killed_by_chance_costs_no_row(plan: CorpusPlan) -> None:
    """Whoever kills processes at random will hit a row that is alone at work; not the same one twice."""
    strikes, item = Strikes({"": 8}), make_item(plan, 0)
    item = again(strikes.died(item, "died", "", None))
    item = again(strikes.died(item, "died", "", Mark(rows=tuple(range(8)), doing="palette")))
    assert item.attempt.suspects == tuple(range(8))
    for row in (3, 5):
        item = again(strikes.died(item, "died", "", Mark(rows=(row,), doing="palette")))
    assert item.attempt.killers == {}


def test_what_follows_a_death_is_told(plan: CorpusPlan) -> None:
    strikes, item = Strikes({"": 8}), make_item(plan, 7)
    mark = Mark(rows=tuple(range(8)), doing="palette")
    said = []
    for cause, at_hand in (
        ("left", None),
        ("memory", None),
        ("died", None),
        ("died", mark),
        *(("died", Mark(rows=(5,), doing="palette")),) * 2,
    ):
        after = again(strikes.died(item, cause, "", at_hand))
        said.append(then_words(item, after))
        item = after
    assert said == [
        "done again",
        "done again, 4 rows a call at most",
        "done again, noting each batch it begins",
        "done again, 8 rows of it one by one",
        "done again, 8 rows of it one by one",
        "done again without row 5, at which it died alone",
    ]
    assert then_words(item, ModmillError("lost")) == "it fails as a whole"


def test_four_deaths_without_progress_fail_the_item(plan: CorpusPlan) -> None:
    strikes, item = Strikes({"": 8}), make_item(plan, 7)
    for _ in range(3):
        item = again(strikes.died(item, "died", "its process ended", None))
    lost = strikes.died(item, "died", "its process ended", None)
    assert isinstance(lost, ModmillError)
    assert "photos/0000007: its worker died 4 times" in str(lost)


def test_a_node_that_leaves_costs_no_strike_but_not_forever(plan: CorpusPlan) -> None:
    strikes, item = Strikes({"": 8}), make_item(plan, 0)
    for _ in range(20):
        item = again(strikes.died(item, "left", "its node left the cluster", None))
    assert item.attempt.strikes == 0
    assert isinstance(strikes.died(item, "left", "its node left the cluster", None), ModmillError)


def test_memory_halves_the_batch_first(plan: CorpusPlan) -> None:
    strikes, item = Strikes({"": 8}), make_item(plan, 0)
    for batch in (4, 2, 1):
        item = again(strikes.died(item, "memory", "low on memory", None))
        assert (item.attempt.batch, item.attempt.strikes) == (batch, 0)
    item = again(strikes.died(item, "memory", "low on memory", None))
    assert item.attempt.strikes == 1
    for _ in range(3):
        item = again(strikes.died(item, "memory", "low on memory", Mark(rows=(5,), doing="palette")))
        if item.attempt.killers:
            break
    assert item.attempt.killers[5].class_name == "OutOfMemory"


def test_a_batch_over_its_deadline_is_taken_apart_at_once(plan: CorpusPlan) -> None:
    strikes, item = Strikes({"": 8}), make_item(plan, 0)
    item = again(strikes.died(item, "died", "", Mark(rows=tuple(range(8)), doing="palette", reason="deadline")))
    assert item.attempt.suspects == tuple(range(8))
    item = again(strikes.died(item, "died", "", Mark(rows=(2,), doing="palette", reason="deadline")))
    assert item.attempt.killers[2].class_name == "DeadlineExceeded"


def test_what_raises_is_tried_once_more(plan: CorpusPlan) -> None:
    strikes, item = Strikes({}), make_item(plan, 0)
    error = ShardError("the part holds 3 rows")
    assert strikes.raised(item, error) is item
    assert strikes.raised(item, error) is error
    # Of a first attempt nothing was left aside; the second looks.
    again = strikes.raised(replace(make_item(plan, 1), attempt=Attempt(resumes=False)), error)
    assert isinstance(again, WorkItem)
    assert again.attempt.resumes
    assert not stops_the_run(error)
    assert stops_the_run(ConfigError("no weights"))
    assert stops_the_run(OSError(28, "No space left on device"))


# -- pools ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings() -> WorkerSettings:
    return WorkerSettings(threads=1, batch=32, decode_threads=2, queue_bytes=1 << 20, device="auto")


def node(cpus: float, gpus: float = 0, memory_gb: float = 8, *, alive: bool = True, **labels: str) -> dict:
    resources = {"CPU": cpus, "GPU": gpus, "memory": memory_gb * 2**30}
    return {"Alive": alive, "Resources": resources, "Labels": labels}


def test_workers_are_as_many_as_fit_or_as_were_asked_for(config, settings: WorkerSettings) -> None:
    known = pools(config.engine, settings, has_gpus=False)
    nodes = [node(4), node(4, kind="big"), node(64, alive=False)]
    assert wanted_workers(known, nodes, {"": 100, "big": 0}) == {"": 8, "big": 0}
    # Three of two threads were asked for; two fit beside none on the one node that has the label.
    assert wanted_workers(known, nodes, {"": 100, "big": 100}) == {"": 4, "big": 3}
    assert wanted_workers(known, nodes, {"": 2, "big": 1}) == {"": 2, "big": 1}
    assert wanted_workers(known, [], {"": 2}) == {"": 1, "big": 0}
    assert known["big"].options == {
        **{"num_cpus": 2, "num_gpus": 0, "memory": 1 << 30},
        "label_selector": {"kind": "big"},
    }
    assert has_room(known["big"], nodes)
    assert not has_room(known["big"], nodes[:1])


def test_two_workers_share_a_gpu(config, settings: WorkerSettings) -> None:
    known = pools(config.engine, settings, has_gpus=True)
    assert wanted_workers(known, [node(16, gpus=2), node(16)], {"": 100}) == {"": 4, "big": 0}


def test_folders_of_one_pool_are_refused(config, settings: WorkerSettings) -> None:
    own = config.engine.pools["big"].model_copy(update={"runtime_env": {"py_modules": ["./mine"]}})
    engine = config.engine.model_copy(update={"pools": {"big": own}})
    with pytest.raises(ConfigError, match=r"pools.big.runtime_env.py_modules: ./mine .* engine.runtime_env.py_modules"):
        pools(engine, settings, has_gpus=False)


# -- draining ---------------------------------------------------------------------------------------------------------


def test_the_first_interrupt_asks_and_the_second_one_ends() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Draining() as draining:
        assert not draining.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert draining.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_started_in_the_background_ignores_ctrl_c_and_hears_sigterm() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Draining() as draining:
            os.kill(os.getpid(), signal.SIGINT)
            assert not draining.asked
            os.kill(os.getpid(), signal.SIGTERM)
            assert draining.asked
        with pytest.raises(KeyboardInterrupt), held_back():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
