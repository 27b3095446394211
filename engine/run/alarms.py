"""Alarms while a run is at work: a shard that departs from the history of its recipe is told at once.

The view `alarms` finds the same from the log later, by the same rules and limits (`manifests/catalog/views.sql`). Each
shard costs a few additions, whatever the size of the history.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from engine.progress.progress import Progress
from manifests.catalog.catalog import Catalog
from manifests.log.actions import ShardAdded
from manifests.queries import quality
from manifests.queries.quality import History

# Where everything changes at once, more lines than these say no more.
_MOST_TOLD = 8


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A metric of a shard that is not as those of its recipe were before: fields as the columns of the view `alarms`.

    `mean` is None where the shard is the first.
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
        """What a person is told of once: the same alarm of other parts says nothing new."""
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
    """Compares shards, as they are committed, with all that were made by the same recipe before."""

    def __init__(self, catalog: Catalog, corpora: Iterable[str]) -> None:
        self._limits = quality.limits(catalog)
        self._histories = quality.history(catalog, list(corpora))
        self._told: set[tuple[str, ...]] = set()

    def tell(self, records: Iterable[ShardAdded], progress: Progress) -> int:
        """As `add`, and says so: an event for each alarm, a line for the first of a kind, of some kinds; how many there are."""
        found = self.add(records)
        for alarm in found:
            is_new = alarm.kind not in self._told
            self._told.add(alarm.kind)
            progress.alarm(str(alarm), is_new=is_new and len(self._told) <= _MOST_TOLD, **asdict(alarm))
            if is_new and len(self._told) == _MOST_TOLD + 1:
                progress.say("there are alarms of more kinds: they are counted, and in the view `alarms`")
        return len(found)

    def add(self, records: Iterable[ShardAdded]) -> list[Alarm]:
        """The alarms of shards that are committed in one entry of the log; they are part of the history from here on."""
        found = []
        for record in sorted(records, key=lambda record: (record.part, record.crop or 0)):
            for metric, value in quality.figures(record).items():
                if not quality.is_judged(metric):
                    continue
                place = (record.corpus, record.modality, record.form, record.fingerprint, metric)
                history = self._histories.setdefault(place, History())
                weight = quality.weight(metric, record)
                alarm = self._judge(record, metric, value, weight, history)
                if alarm is not None:
                    found.append(alarm)
                history.add(value, weight)
        return found

    def _judge(self, record: ShardAdded, metric: str, value: float, weight: int, history: History) -> Alarm | None:
        """The alarm of one value, None where it is as those before; the rules of the view `alarms`."""
        limits, before, mean = self._limits, history.shards, history.mean
        deviation = (history.squares / (before - 1)) ** 0.5 if before > 1 else 0.0
        deviations = (value - mean) / max(
            deviation, limits.least_deviation + limits.least_relative_deviation * abs(mean)
        )
        is_comparable = weight >= limits.least_relative_rows * history.weight
        if metric in ("not_finite", "label_not_finite") and value > 0 and mean == 0:
            alarm = "not finite"
        elif (
            metric in ("duplicates", "label_duplicates")
            and record.ok >= limits.equal_rows
            and value > 1 - 1.5 / record.ok
            and mean < limits.equal_share
        ):
            alarm = "all equal"
        elif (
            metric == "null_share"
            and before >= limits.jump_shards
            and is_comparable
            and value - mean > limits.null_jump
        ):
            alarm = "nulls"
        elif (
            metric == "codebook_use"
            and before >= limits.jump_shards
            and is_comparable
            and value < limits.collapse * mean
        ):
            alarm = "collapse"
        elif before >= limits.drift_shards and is_comparable and abs(deviations) > limits.drift_deviations:
            alarm = "drift"
        else:
            return None
        return Alarm(
            corpus=record.corpus,
            part=record.part,
            crop=record.crop,
            modality=record.modality,
            form=record.form,
            recipe=record.fingerprint[:12],
            alarm=alarm,
            metric=metric,
            value=value,
            mean=mean if before else None,
            deviations=deviations if before else None,
            shards_before=before,
        )
