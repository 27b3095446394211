"""Estimates what the work to do takes, by what a probe of some samples measured (`engine/run/probe.py`)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from manifests import units


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Holds what a labeler takes for one sample on this machine.

    `label_s` is of its own calls; `rest_s` is what its group took beside the calls of labelers: decoding, crops, tokens,
    files. `bytes_by_form` are written bytes by "modality/form".
    """

    label_s: float
    rest_s: float
    bytes_by_form: Mapping[str, float]
    on_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Holds what some work takes: hours of one worker, bytes written."""

    hours: float
    size_bytes: float
    on_gpu: bool

    @property
    def hours_words(self) -> str:
        """Returns the hours as a person reads them: "1,234", "5.6", "<0.01"."""
        return "<0.01" if self.hours < 0.01 else f"{self.hours:,.2f}" if self.hours < 100 else f"{self.hours:,.0f}"

    def words(self, price: float | None) -> str:
        """Returns the cost in words, as in "1.2 GPU-hours, 3.4 GB written, 2.40 dollars"."""
        said = [
            f"{self.hours_words} {'GPU' if self.on_gpu else 'worker'}-hours",
            f"{units.size(self.size_bytes)} written",
        ]
        if price is not None:
            said.append(f"{self.hours * price:,.2f} dollars")
        return ", ".join(said)

    def wall(self, workers: int) -> str:
        """Returns the time that some workers take together, as in "0:12:00 at 10 workers"."""
        return f"{units.span(3600 * self.hours / workers)} at {workers:,} worker{'s' * (workers != 1)}"


def total(costs: Iterable[Cost]) -> Cost:
    """Returns the sum of some costs."""
    found = list(costs)
    return Cost(
        hours=sum(cost.hours for cost in found),
        size_bytes=sum(cost.size_bytes for cost in found),
        on_gpu=any(cost.on_gpu for cost in found),
    )
