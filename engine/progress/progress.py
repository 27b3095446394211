"""Tells how far a run is: a live table on a terminal, plain lines elsewhere, JSON events always."""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live

from engine.progress import state as run_state
from engine.progress import table
from engine.progress.state import RunState
from manifests.log.entries import now

if TYPE_CHECKING:
    from engine.plan.items import Beat, FitItem, ItemResult, WorkItem
    from engine.progress.events import EventSink

_LINE_EVERY_S = 10.0
_FLUSH_EVERY_S = 0.5
_BEAT_EVERY_S = 5.0
_BEATS_A_SECOND = 20
# A state costs its reader as much as the lines since the one before, and the writer a tenth of them.
_STATE_AFTER_BYTES = 256 << 10
_AT_ONCE = frozenset({"run", "plan", "item", "failed_item", "strike", "alarm", "error", "ended"})


class Progress:
    """Takes what a run tells. Any thread may report; a call costs some microseconds, and waits for no disk and no terminal.

    Without events it serves verbs that only show a stage. Lines and events are written by a thread of its own.
    """

    def __init__(self, events: "EventSink | None" = None, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._state = RunState()
        self._lock = threading.RLock()
        self._began = time.monotonic()
        self._quiet = quiet
        self._live: Live | None = None
        self._items: dict[str, dict[str, int]] = {}
        self._told: dict[str, float] = {}
        self._beats_written: dict[str, float] = {}
        self._next_line = 0.0
        self._items_told = -1
        self._sink = events
        self._lines: list[str] = []
        self._since_state = 0
        self._next_state = _STATE_AFTER_BYTES
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        if events is not None:
            self._start_thread()

    # -- for every verb -----------------------------------------------------------------------------------------------

    def event(self, kind: str, /, **fields: Any) -> None:
        """Reports one event, with the fields that engine/progress/events.py names for its kind."""
        with self._lock:
            self._write(self._apply(kind, fields))

    def say(self, text: str) -> None:
        """Prints one line for people, above the table."""
        self.event("message", text=text)
        self._print(text)

    def stage(self, name: str, total: int, unit: str) -> None:
        """Begins a stage of `total` units."""
        with self._lock:
            self._items[name] = {}
            self._told[name] = time.monotonic()
            self.event("stage", stage=name, total=total, unit=unit)
        self._show()

    def update(self, name: str, done: int, *, item: str = "", note: str = "") -> None:
        """Reports how much of a stage is done, or of one of its few items if `item` names one."""
        with self._lock:
            stage = self._state.stages.get(name)
            if stage is None:
                return
            items = self._items[name]
            items[item] = done
            before, stage_done = stage.done, min(sum(items.values()), stage.total)
            told = {"stage": name, "done": stage_done, "total": stage.total, "note": note or stage.note}
            event = self._apply("progress", told)
            ended = stage_done >= stage.total > before
            if not ended and time.monotonic() - self._told[name] < _LINE_EVERY_S:
                return
            self._told[name] = time.monotonic()
            self._write(event)
            line = table.stage_line(name, stage, self._state.t)
        if self._live is None:
            self._print(line)

    def fit_step(self, name: str, step: int, steps: int, losses: Mapping[str, float]) -> None:
        """Reports the step of a tokenizer's fit."""
        note = "  ".join(f"{key} {value:.4g}" for key, value in list(losses.items())[:2])
        self.update(f"fit {name}", step, note=note)

    def close(self) -> None:
        """Draws the last state, and writes what waits. Closing twice is closing once."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._thread is not None:
            self._wake.set()
            self._thread.join()
        self._flush(now=True)
        if self._live is not None:
            self._live.stop()
        elif self._state.work_began is not None and self._state.items != self._items_told:
            self._print(table.line(self._state))

    # -- for labeling -------------------------------------------------------------------------------------------------

    def plan(self, modalities: Mapping[str, int], workers: int, price: float | None = None) -> None:
        """Begins labeling: the parts of each modality to be made, and the price of a worker's hour, if there is one."""
        with self._lock:
            self.event("plan", modalities=dict(modalities), workers=workers, price=price)
            self._next_line = time.monotonic() + _LINE_EVERY_S
        self._show()
        self._start_thread()

    def workers(self, pool: str, ready: int, wanted: int) -> None:
        """Reports how many workers of a pool answer, and how many are wanted."""
        with self._lock:
            known = self._state.pools.get(pool)
            if known is None or (known.ready, known.wanted) != (ready, wanted):
                self.event("workers", pool=pool, ready=ready, wanted=wanted)

    def started(self, item: "WorkItem", worker: str) -> None:
        """Reports that a worker took up an item."""
        self.event(
            "started",
            worker=worker,
            pool=item.pool,
            item=item.name,
            rows=item.part.rows,
            modalities=_modalities(item),
        )

    def beat(self, worker: str, beat: "Beat") -> None:
        """Reports a worker's sign of life."""
        with self._lock:
            event = self._apply("beat", {"worker": worker, **_rounded(vars(beat))})
            workers = len(self._state.at_work)
            every_s = max(_BEAT_EVERY_S, workers / _BEATS_A_SECOND)
            if event["t"] - self._beats_written.get(worker, -every_s) < every_s:
                return
            if len(self._beats_written) > 2 * workers + 100:  # Workers that are gone.
                self._beats_written.clear()
            self._beats_written[worker] = event["t"]
            self._write(event)

    def done_items(self, pairs: "Sequence[tuple[WorkItem, ItemResult]]") -> None:
        """Reports items that are done, with their records in the log."""
        for item, result in pairs:
            modalities = dict.fromkeys(_modalities(item), 0)
            for record in result.records:
                modalities[record.modality] = modalities.get(record.modality, 0) + record.failed
            self.event(
                "item",
                item=item.name,
                pool=item.pool,
                rows=result.rows,
                shards=len(result.records),
                failed=sum(modalities.values()),
                seconds=round(result.seconds.get("total", 0.0), 3),
                busy=round(result.busy, 3),
                modalities=modalities,
            )
        if self._state.work_began is not None and all(one.finished for one in self._state.modalities.values()):
            self._next_line = 0.0
            self._wake.set()

    def failed_item(self, item: "WorkItem", error: BaseException) -> None:
        """Reports that an item failed for good; it stays to be done."""
        self.event(
            "failed_item", item=item.name, error=type(error).__name__, message=str(error), modalities=_modalities(item)
        )
        self._print(f"{item.name} failed, and stays to be done: {error}")

    def strike(self, item: "WorkItem | FitItem", worker: str, reason: str, strikes: int, then: str) -> None:
        """Reports a worker lost at an item with so many strikes by now (a node that left adds none); `then` is what follows."""
        self.event("strike", item=item.name, worker=worker, reason=reason, strikes=strikes)
        self._print(f"{item.name}: worker {worker} is lost ({reason}); {then}")

    def alarm(self, text: str, *, is_new: bool = True, **facts: Any) -> None:
        """Reports that something departs from what it was, so that a person looks; printed only if it is new."""
        self.event("alarm", text=text, **facts)
        if is_new:
            self._print(text)

    @property
    def cost(self) -> float | None:
        """Returns price x hours that workers were ready; None if no price is given."""
        return self._state.cost

    # -- inside -------------------------------------------------------------------------------------------------------

    def _apply(self, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Takes an event into the state; the event."""
        event = {"time": now(), "t": round(time.monotonic() - self._began, 3), "event": kind, **fields}
        self._state.apply(event)
        return event

    def _write(self, event: Mapping[str, Any]) -> None:
        if self._sink is None or self._closed:
            return
        self._lines.append(json.dumps(event, default=str))
        if event["event"] in _AT_ONCE:
            self._wake.set()

    def _start_thread(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="modmill-progress", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while not self._closed:
            self._wake.wait(_FLUSH_EVERY_S)
            self._wake.clear()
            self._tick()
            self._flush(now=False)

    def _tick(self) -> None:
        """Prints a plain line if one is due, and writes the same facts as an event for those who read only some."""
        with self._lock:
            state = self._state
            if state.work_began is None or state.status is not None or time.monotonic() < self._next_line:
                return
            self._next_line = time.monotonic() + _LINE_EVERY_S
            self._apply("tick", {})
            self._items_told = state.items
            text = table.line(state)
        if self._live is None:
            self._print(text)

    def _flush(self, *, now: bool) -> None:
        if self._sink is None:
            return
        with self._lock:
            lines, self._lines = self._lines, []
        data = "".join(f"{line}\n" for line in lines).encode()
        self._sink.write(data)
        self._since_state += len(data)
        if self._since_state >= self._next_state:
            self._write_state()
        self._sink.flush(now=now)

    def _write_state(self) -> None:
        assert self._sink is not None
        with self._lock:
            # What was applied since the lines were taken is in the state, and not written again behind it.
            event = self._apply("tick", {})
            lines, self._lines = self._lines, []
            text = json.dumps({**event, "event": "state", "state": run_state.document(self._state)})
        self._sink.write("".join(f"{line}\n" for line in lines).encode())
        self._sink.begin()
        data = f"{text}\n".encode()
        self._sink.write(data)
        self._since_state, self._next_state = 0, max(_STATE_AFTER_BYTES, 10 * len(data))

    def _show(self) -> None:
        """Shows the table if a person watches."""
        with self._lock:
            if self._live is not None or self._quiet or not self._console.is_terminal:
                return
            self._live = Live(get_renderable=self._drawn, console=self._console, refresh_per_second=2)
        # Never with the lock held: whoever draws holds rich's lock, and then asks for ours.
        self._live.start()

    def _drawn(self) -> Group:
        with self._lock:
            if not self._closed:
                self._apply("tick", {})
            return table.table(self._state)

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _rounded(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in fields.items()}


def _modalities(item: "WorkItem") -> list[str]:
    return list(dict.fromkeys(target.modality for target in item.targets))
