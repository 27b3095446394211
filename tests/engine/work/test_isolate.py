"""Bisecting a batch, and the budget of failures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.run.commit import FailureBudget
from engine.work.isolate import MicroBatch, isolate
from manifests.errors import TooManyFailures
from manifests.formats.shards import Status


@given(
    rows=st.lists(st.integers(0, 63), unique=True), bad=st.sets(st.integers(0, 63)), none=st.sets(st.integers(0, 63))
)
def test_isolate_finds_exactly_the_rows_that_raise(rows: list[int], bad: set[int], none: set[int]) -> None:
    def call(asked: list[int]) -> list[int | None]:
        if bad & set(asked):
            raise ValueError("bad row")
        return [None if row in none else row * 10 for row in asked]

    outcomes = isolate(call, rows, "label")
    assert set(outcomes) == set(rows)
    for row, outcome in outcomes.items():
        if row in bad:
            assert outcome.status is Status.FAILED
            assert outcome.failure is not None
            assert (outcome.failure.stage, outcome.failure.class_name) == ("label", "ValueError")
        elif row in none:
            assert outcome.status is Status.ABSENT
        else:
            assert (outcome.status, outcome.value) == (Status.OK, row * 10)


def test_too_few_results_fail_the_rows() -> None:
    outcomes = isolate(lambda rows: [1] * (len(rows) - 1), [4, 5], "tokenize")
    assert {outcome.status for outcome in outcomes.values()} == {Status.FAILED}


@pytest.mark.parametrize("fits", [0, 1, 5, 40])
def test_lack_of_memory_halves_until_calls_fit(fits: int) -> None:
    rows = [30, 2, 3]
    micro = MicroBatch(32)

    def call(asked: list[int]) -> list[int]:
        if micro.size > fits:
            raise MemoryError
        return asked

    outcomes = isolate(call, rows, "label", micro)
    assert {outcome.status for outcome in outcomes.values()} == {Status.OK if fits else Status.FAILED}
    assert micro.size == max(size for size in (1, 2, 4, 8, 16, 32) if size <= max(fits, 1))


def test_budget_is_judged_from_a_hundred_rows_on() -> None:
    budget = FailureBudget(0.25)
    budget.add(99, 99)
    with pytest.raises(TooManyFailures, match=r"100 of 100 rows.*max_failed_fraction = 0.25"):
        budget.add(1, 1)


def test_budget_allows_its_fraction() -> None:
    budget = FailureBudget(0.25)
    budget.add(400, 100)
    with pytest.raises(TooManyFailures):
        budget.add(0, 1)
