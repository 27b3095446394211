"""Folds the events of a run into what is known of it at a moment, the same in the driver and for whoever watches.

Everything is a sum or is of what is at work now, so that its size grows with workers and modalities, never with items.
Times are the events' `t`: seconds since the run began, by the driver's monotonic clock.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_WINDOW_S = 60.0
_POINT_EVERY_S = 5.0


@dataclass
class Rate:
    """Measures the rate of a counter over the last minute, and since it first moved."""

    points: list[list[float]] = field(default_factory=list)
    began: float | None = None

    def begin(self, t: float) -> None:
        """Starts the counter at 0, as it is about to move: what waits for a worker has no rate yet."""
        if self.began is None:
            self.began = t
            self.points.append([t, 0.0])

    def is_due(self, t: float) -> bool:
        """Tells whether `point` would keep the counter's value."""
        return self.began is not None and t - self.points[-1][0] >= _POINT_EVERY_S

    def point(self, t: float, value: float) -> None:
        """Notes the counter's value; kept every five seconds."""
        if not self.is_due(t):
            return
        self.points.append([t, value])
        while self.points[1][0] <= t - _WINDOW_S:
            self.points.pop(0)

    def last_minute(self, t: float, value: float) -> float | None:
        """Units a second over the last minute; None before the first second is over."""
        if self.began is None or t - self.points[0][0] < 1:
            return None
        return max(value - self.points[0][1], 0.0) / (t - self.points[0][0])

    def overall(self, t: float, value: float) -> float | None:
        """Units a second since the counter first moved."""
        return None if self.began is None or t - self.began < 1 else value / (t - self.began)


STILL_S = 120.0

Event = Mapping[str, Any]


@dataclass
class StageState:
    """Holds a stage that counts units, such as an ingest, a tokenizer's fit, a copy."""

    total: int
    unit: str
    done: int = 0
    note: str = ""
    rate: Rate = field(default_factory=Rate)


@dataclass
class ModalityState:
    """Holds a modality in the making. `total`, `parts` and `lost` (items that failed for good) count parts, `rows` samples.

    `failed` counts rows over all its shards. `seconds` is the time that workers gave it; an item's is split evenly among
    its modalities.
    """

    total: int
    parts: int = 0
    lost: int = 0
    rows: int = 0
    failed: int = 0
    seconds: float = 0.0
    pool: str = ""
    ended: float | None = None
    rate: Rate = field(default_factory=Rate)

    @property
    def finished(self) -> bool:
        return self.parts + self.lost >= self.total


@dataclass
class PoolState:
    """Holds how many workers of one pool answer, and how many are wanted."""

    ready: int
    wanted: int


@dataclass
class AtWork:
    """Holds a worker and its item. `since` and `moved` are when it began with it, and when it last got on (rows or stage)."""

    item: str
    pool: str
    since: float
    moved: float
    modalities: list[str]
    rows: int = 0
    stage: str = ""
    busy: float = 0.0
    queue_fill: float = 0.0
    rss_bytes: int = 0


@dataclass
class RunState:
    """Folds events. `apply` takes them in the order of their times."""

    t: float = 0.0
    stages: dict[str, StageState] = field(default_factory=dict)
    modalities: dict[str, ModalityState] = field(default_factory=dict)
    pools: dict[str, PoolState] = field(default_factory=dict)
    at_work: dict[str, AtWork] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    workers: int = 0
    price: float | None = None
    worker_s: float = 0.0
    work_began: float | None = None
    items: int = 0
    failed_items: int = 0
    strikes: int = 0
    alarms: int = 0
    last_alarm: str = ""
    error: str = ""
    status: str | None = None

    def apply(self, event: Event) -> None:
        """Takes one event in; unknown kinds are passed over."""
        t = max(float(event["t"]), self.t)
        self.worker_s += (t - self.t) * self.ready
        self.t = t
        take = getattr(self, f"_on_{event['event']}", None)
        if take is not None:
            take(t, event)
        for name, modality in self.modalities.items():
            if modality.rate.is_due(t):
                modality.rate.point(t, self.rows_of(name))

    # -- questions ----------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> int:
        """Returns how many workers are paid for now."""
        if self.work_began is None or self.status is not None:
            return 0
        return sum(pool.ready for pool in self.pools.values()) if self.pools else self.workers

    def rows_of(self, modality: str) -> int:
        """Counts the samples of a modality that are done, those of items at work included."""
        going = sum(one.rows for one in self.at_work.values() if modality in one.modalities)
        return self.modalities[modality].rows + going

    def rates_of(self, name: str) -> tuple[float | None, float | None]:
        """Returns samples a second of a modality: over the last minute (None if it is finished), and overall."""
        modality, rows = self.modalities[name], self.rows_of(name)
        if modality.finished:
            return None, modality.rate.overall(modality.ended or self.t, rows)
        return modality.rate.last_minute(self.t, rows), modality.rate.overall(self.t, rows)

    def rows_left(self, name: str) -> float | None:
        """Estimates the samples of a modality that are to be done, by the mean of its parts so far; None before one is done."""
        modality = self.modalities[name]
        if modality.finished:
            return 0.0
        if not modality.parts:
            return None
        return max(modality.rows / modality.parts * (modality.total - modality.lost) - self.rows_of(name), 0.0)

    def eta_of(self, name: str) -> float | None:
        """Returns seconds until a modality is done at its rate of the last minute (or overall); None if unknown."""
        left, (recent, overall) = self.rows_left(name), self.rates_of(name)
        rate = recent or overall
        return None if left is None or not rate else left / rate

    def eta(self) -> tuple[float, bool] | None:
        """Returns seconds until all is done, and whether every modality is in it; None if unknown.

        A pool has the worker-seconds that each modality took a sample, times its samples left, over its workers that are
        ready; all is done when the last pool is.
        """
        by_pool: dict[str, float] = {}
        unknown = False
        for name, modality in self.modalities.items():
            left = self.rows_left(name)
            if left is None or (left and not modality.rows):
                unknown = True
            elif left and (ready := self.ready_of(modality.pool)):
                seconds = left * modality.seconds / modality.rows / ready
                by_pool[modality.pool] = by_pool.get(modality.pool, 0.0) + seconds
        return (max(by_pool.values()), not unknown) if by_pool else None

    def ready_of(self, pool: str) -> int:
        """Returns how many workers of a pool are ready; those of the plan if nobody told."""
        known = self.pools.get(pool)
        return self.workers if known is None else known.ready

    @property
    def parts(self) -> tuple[int, int]:
        """Returns parts done and to be done, each counted once a modality."""
        found = self.modalities.values()
        return sum(min(one.parts, one.total) for one in found), sum(one.total for one in found)

    @property
    def failed_rows(self) -> int:
        return sum(one.failed for one in self.modalities.values())

    @property
    def cost(self) -> float | None:
        """Returns price x workers x hours so far; None if no price is given."""
        return None if self.price is None else self.price * self.worker_s / 3600

    # -- events -------------------------------------------------------------------------------------------------------

    def _on_plan(self, t: float, event: Event) -> None:
        for name, parts in event["modalities"].items():
            self.modalities.setdefault(name, ModalityState(0)).total += parts
        self.workers, self.price = event["workers"], event["price"]
        self.work_began = t

    def _on_stage(self, t: float, event: Event) -> None:
        self.stages[event["stage"]] = StageState(event["total"], event["unit"])

    def _on_progress(self, t: float, event: Event) -> None:
        stage = self.stages.get(event["stage"])
        if stage is None:
            return
        stage.rate.begin(t)
        stage.done, stage.total, stage.note = event["done"], event["total"], event["note"]
        stage.rate.point(t, stage.done)

    def _on_workers(self, t: float, event: Event) -> None:
        self.pools[event["pool"]] = PoolState(event["ready"], event["wanted"])

    def _on_started(self, t: float, event: Event) -> None:
        one = self.at_work.get(event["worker"])
        if one is not None and one.item == event["item"]:
            return  # A beat told it before: it was begun while the one before it was written.
        self._take_up(t, event["worker"], event["item"], event["pool"], event["modalities"])

    def _on_beat(self, t: float, event: Event) -> None:
        one = self.at_work.get(event["worker"])
        if one is None or one.item != event["item"]:
            # What a group makes is known once it has made some.
            names = self.groups.get(_group(event["item"]), [])
            pool = self.modalities[names[0]].pool if names else ""
            one = self._take_up(t, event["worker"], event["item"], pool, names)
        if (event["rows"], event["stage"]) != (one.rows, one.stage):
            one.moved = t
        one.rows, one.stage, one.busy = event["rows"], event["stage"], event["busy"]
        one.queue_fill, one.rss_bytes = event["queue_fill"], event["rss_bytes"]

    def _take_up(self, t: float, worker: str, item: str, pool: str, modalities: list[str]) -> AtWork:
        self._put_down(item)  # Another worker may have had it, and left.
        for name in modalities:
            self.modalities.setdefault(name, ModalityState(0)).rate.begin(t)
        one = AtWork(item=item, pool=pool, since=t, moved=t, modalities=modalities)
        if (before := self.at_work.get(worker)) is not None:
            # Until its first beat: between two items a worker is no less busy.
            one.busy, one.queue_fill, one.rss_bytes = before.busy, before.queue_fill, before.rss_bytes
        self.at_work[worker] = one
        return one

    def _on_item(self, t: float, event: Event) -> None:
        self._put_down(event["item"])
        self.items += 1
        self.groups[_group(event["item"])] = list(event["modalities"])
        for name, failed in event["modalities"].items():
            modality = self.modalities.setdefault(name, ModalityState(0))
            modality.rate.begin(max(t - event["seconds"], self.work_began or 0.0))
            modality.parts += 1
            modality.rows += event["rows"]
            modality.failed += failed
            modality.seconds += event["seconds"] / len(event["modalities"])
            modality.pool, modality.ended = event["pool"], t

    def _on_failed_item(self, t: float, event: Event) -> None:
        self._put_down(event["item"])
        self.failed_items += 1
        for name in event["modalities"]:
            self.modalities.setdefault(name, ModalityState(0)).lost += 1

    def _on_strike(self, t: float, event: Event) -> None:
        self._put_down(event["item"])
        self.at_work.pop(event["worker"], None)
        self.strikes += 1

    def _put_down(self, item: str) -> None:
        for worker in [worker for worker, one in self.at_work.items() if one.item == item]:
            del self.at_work[worker]

    def _on_alarm(self, t: float, event: Event) -> None:
        self.alarms += 1
        self.last_alarm = event["text"]

    def _on_error(self, t: float, event: Event) -> None:
        self.error = f"{event['error']}: {event['message']}"

    def _on_ended(self, t: float, event: Event) -> None:
        self.status = event["status"]
        self.at_work.clear()

    def _on_state(self, t: float, event: Event) -> None:
        """Returns everything so far in one event: whoever reads from here on knows all."""
        for name, value in loaded(event["state"]).__dict__.items():
            setattr(self, name, value)
        self.t = t


def _group(item: str) -> str:
    """Returns the group in an item's name, `corpus/part/group`."""
    return "".join(item.split("/", 2)[2:])


def document(state: RunState) -> dict[str, Any]:
    """Returns a state as plain JSON values."""
    return asdict(state)


def loaded(document: Mapping[str, Any]) -> RunState:
    """Returns the state that a document holds."""
    from pydantic import TypeAdapter

    return TypeAdapter(RunState).validate_python(document)
