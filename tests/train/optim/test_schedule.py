"""Learning rates: a function of the step alone, in DeepSpeed's shapes."""

import math

import pytest

from train.optim.schedule import Schedule


def test_a_linear_warm_up_ends_at_the_peak() -> None:
    rates = [Schedule(peak=0.4, start=0.1, warmup_steps=3, warmup="linear").rate(step, 9) for step in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_a_logarithmic_warm_up_rises_fast_and_then_slowly() -> None:
    schedule = Schedule(peak=1.0, warmup_steps=8)
    assert schedule.rate(0, 9) == 0.0
    assert schedule.rate(3, 9) == pytest.approx(math.log(4) / math.log(8))
    assert schedule.rate(7, 9) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("decay", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.55, 0.1)]
)
def test_decays_end_where_they_say(decay: str, middle: float, end: float) -> None:
    schedule = Schedule(peak=1.0, end=0.1, warmup_steps=2, warmup="linear", total_steps=12, decay=decay)  # type: ignore[arg-type]
    assert schedule.rate(2, 99) == pytest.approx(1.0)
    assert schedule.rate(7, 99) == pytest.approx(middle)
    assert schedule.rate(12, 99) == schedule.rate(50, 99) == pytest.approx(end)


def test_a_decay_without_an_end_of_its_own_ends_with_the_run() -> None:
    schedule = Schedule(peak=1.0, warmup_steps=0, decay="linear")
    assert (schedule.rate(5, 10), schedule.rate(5, 20)) == (0.5, 0.75)
