"""Tells of alarms while a run is at work: shards that depart from the history of their recipe.

The rules stand in `manifests/catalog/views.sql`, as those of the view `alarms`; here they are asked about the newest shards
alone, whatever the size of the history.
"""

import time
from dataclasses import asdict, dataclass

from engine.progress.progress import Progress
from manifests.catalog.catalog import Catalog
from manifests.queries import quality

# If everything changes at once, more lines than these say no more.
_MOST_TOLD = 8
# The share of a run's time that questions about alarms may take: one costs as much as the commits of some ten items.
_MOST_TIME = 0.01


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Holds a metric of a shard that is not as those of its recipe were before: fields are columns of the view `alarms`.

    `mean` is None if the shard is the first.
    """

    corpus: str
    part: int
    crop: int | None
    modality: str
    form: str
    recipe: str
    alarm: str
    metric: str
    value: float
    mean: float | None
    deviations: float | None
    shards_before: int

    @property
    def kind(self) -> tuple[str, ...]:
        """Returns what a person is told of once: the same alarm of other parts says nothing new."""
        return self.corpus, self.modality, self.form, self.alarm, self.metric

    def __str__(self) -> str:
        crop = "" if self.crop is None else f" crop {self.crop}"
        before = (
            "the first shard of its recipe"
            if self.mean is None
            else f"{self.mean:.4g} in {self.shards_before:,} shards before"
        )
        return (
            f"alarm ({self.alarm}): {self.modality} {self.form}s of {self.corpus} part {self.part}{crop} have {self.metric} "
            f"{self.value:.4g}, {before}"
        )


class Alarms:
    """Compares the shards that a run commits with all that were made by the same recipes before."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._histories = quality.histories(catalog)
        self._version = catalog.version
        self._next = 0.0
        self._told: set[tuple[str, ...]] = set()

    def tell(self, progress: Progress, *, at_once: bool = False) -> int:
        """Tells of the alarms of new shards, and returns how many there are.

        Each is an event, the first of a kind a line, of some kinds. Unless `at_once`, it waits until asking costs little
        of the run's time, which is seconds.
        """
        began = time.monotonic()
        if began < self._next and not at_once:
            return 0
        found = self.new()
        now = time.monotonic()
        self._next = now + (now - began) / _MOST_TIME
        for alarm in found:
            is_new = alarm.kind not in self._told
            self._told.add(alarm.kind)
            progress.alarm(str(alarm), is_new=is_new and len(self._told) <= _MOST_TOLD, **asdict(alarm))
            if is_new and len(self._told) == _MOST_TOLD + 1:
                progress.say("there are alarms of more kinds: they are counted, and in the view `alarms`")
        return len(found)

    def new(self) -> list[Alarm]:
        """Returns the alarms of shards that were committed since it was last asked, which then are part of the history."""
        version = self._catalog.version
        if version == self._version:
            return []
        rows = quality.alarms_after(self._catalog, self._version, self._histories)
        self._histories = quality.histories(self._catalog, self._version, self._histories)
        self._version = version
        return [Alarm(**row) for row in rows]
