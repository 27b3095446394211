"""What the driver asks of the figures of shards: the history of each metric, and the limits beyond which a shard alarms.

The views `quality` and `alarms` (views.sql) hold the definitions; `docs/quality.md` tells of each metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manifests.catalog.catalog import Catalog
from manifests.log.actions import ShardAdded

# corpus, modality, form, fingerprint, metric
Place = tuple[str, str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a shard departs from its recipe's history; the values stand in views.sql alone.

    drift_shards, drift_deviations   from so many earlier shards on, a value so many standard deviations away is a drift
    least_deviation, least_relative_deviation
                                     the deviation counts as at least the one, plus the other times the mean
    least_relative_rows              a shard with fewer of the usual number of rows is not compared
    jump_shards, null_jump, collapse from so many earlier shards on: so much more of the rows null than the mean, and
                                     codebook use below so much of it
    equal_rows, equal_share          from so many rows on all of them equal, where less than this share was so before
    """

    drift_shards: int
    drift_deviations: float
    least_deviation: float
    least_relative_deviation: float
    least_relative_rows: float
    jump_shards: int
    null_jump: float
    collapse: float
    equal_rows: int
    equal_share: float


@dataclass
class History:
    """The values of one metric so far: how many, their mean, the sum of squared distances to it, and mean weight (rows)."""

    shards: int = 0
    mean: float = 0.0
    squares: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float) -> None:
        """Takes one more value in, by Welford's rule."""
        self.shards += 1
        before = value - self.mean
        self.mean += before / self.shards
        self.squares += before * (value - self.mean)
        self.weight += (weight - self.weight) / self.shards


def limits(catalog: Catalog) -> Limits:
    """The limits of alarms."""
    columns, rows = catalog.fetch("SELECT * FROM state.alarm_limit")
    return Limits(**dict(zip(columns, rows[0], strict=True)))


def history(catalog: Catalog, corpora: Sequence[str]) -> dict[Place, History]:
    """The history of each metric that is judged, of the current recipes of some corpora."""
    _, rows = catalog.fetch(
        "SELECT corpus, modality, form, fingerprint, metric, count(*), avg(value), var_pop(value) * count(*), avg(weight) "
        "FROM state.judged_metric WHERE list_contains(?::VARCHAR[], corpus) GROUP BY ALL",
        [list(corpora)],
    )
    return {
        (corpus, modality, form, fingerprint, metric): History(shards, mean, squares, weight)
        for corpus, modality, form, fingerprint, metric, shards, mean, squares, weight in rows
    }


def figures(shard: ShardAdded) -> Mapping[str, float]:
    """All figures of a shard that the view `quality` has, by name; those that nothing is known of are left out."""
    asked = _asked(shard)
    found = {"null_share": 1 - shard.ok / asked, "failed_share": shard.failed / asked} if asked else {}
    if shard.ok:
        found["bytes_per_row"] = shard.size_bytes / shard.ok
        if shard.tokens is not None:
            found["tokens_per_row"] = shard.tokens / shard.ok
    return {**found, **shard.metrics}


def is_judged(metric: str) -> bool:
    """Whether a metric has a history: extremes and histograms have none."""
    return metric not in ("min", "max", "label_min", "label_max") and not metric.startswith("score_hist_")


def weight(metric: str, shard: ShardAdded) -> int:
    """Of how many rows the value of a metric tells."""
    return _asked(shard) if metric in ("null_share", "failed_share") else shard.ok


def _asked(shard: ShardAdded) -> int:
    """The rows that a value was asked of: a row that was left out on purpose is no sign of anything."""
    return shard.rows - shard.not_selected - shard.forgotten
