"""How far a run is: bars on a terminal, plain lines elsewhere, JSON events always."""

import json
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from manifests.log import now

_LINE_EVERY_S = 10.0
_RATE_WINDOW_S = 60.0


class Progress:
    """One stage after another; each has a total, a rate over the last minute and an ETA. Any thread may report."""

    def __init__(self, events: Path | None, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._lock = threading.RLock()
        self._events: TextIO | None = None
        if events is not None:
            events.parent.mkdir(parents=True, exist_ok=True)
            self._events = open(events, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self._quiet = quiet
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, _Stage] = {}
        if not quiet and self._console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=32),
                TextColumn("{task.fields[line]}"),
                console=self._console,
                refresh_per_second=4,
            )
            self._bars.start()

    def event(self, kind: str, **fields: Any) -> None:
        """One line of the event file."""
        if self._events is not None:
            with self._lock:
                self._events.write(json.dumps({"time": now(), "event": kind, **fields}, default=str) + "\n")
                self._events.flush()

    def say(self, text: str) -> None:
        """One line for people, above the bars."""
        self.event("message", text=text)
        if not self._quiet:
            (self._bars.console if self._bars else self._console).print(
                text, markup=False, highlight=False, soft_wrap=True
            )

    def stage(self, name: str, total: int, unit: str) -> None:
        """A stage begins: so many units are to be done."""
        with self._lock:
            self._stages[name] = _Stage(total, unit)
            self.event("stage", stage=name, total=total, unit=unit)
            if self._bars is not None:
                self._tasks[name] = self._bars.add_task(name, total=total, line="")

    def update(self, name: str, done: int, *, item: str = "", failed: int = 0, note: str = "") -> None:
        """So much of a stage is done; of one of its items, where `item` names one."""
        with self._lock:
            stage = self._stages.get(name)
            if stage is None:
                return
            stage.items[item] = done
            stage.failed += failed
            stage.note = note or stage.note
            line, total_done = stage.line()
            if self._bars is not None:
                self._bars.update(self._tasks[name], completed=total_done, line=line)
            elapsed = time.monotonic()
            if elapsed - stage.last_line >= _LINE_EVERY_S or total_done >= stage.total > stage.last_done:
                stage.last_line, stage.last_done = elapsed, total_done
                self.event(
                    "progress", stage=name, done=total_done, total=stage.total, failed=stage.failed, note=stage.note
                )
                if self._bars is None and not self._quiet:
                    self._console.print(f"{name:<12} {line}", markup=False, highlight=False, soft_wrap=True)

    def fit_step(self, name: str, step: int, steps: int, losses: Mapping[str, float]) -> None:
        """A tokenizer's fit is at a step."""
        note = "  ".join(f"{key} {value:.4g}" for key, value in list(losses.items())[:2])
        self.update(f"fit {name}", step, note=note)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        if self._events is not None:
            self._events.close()
            self._events = None


class _Stage:
    """What is known of one stage."""

    def __init__(self, total: int, unit: str) -> None:
        self.total = total
        self.unit = unit
        self.items: dict[str, int] = {}
        self.failed = 0
        self.note = ""
        self.last_line = time.monotonic()
        self.last_done = -1
        # From the first report on: what waits for a worker has no rate yet.
        self._seen: list[tuple[float, int]] = []

    def line(self) -> tuple[str, int]:
        """One line on where the stage is, and the units done."""
        done = min(sum(self.items.values()), self.total)
        moment = time.monotonic()
        self._seen.append((moment, done))
        while len(self._seen) > 2 and moment - self._seen[0][0] > _RATE_WINDOW_S:
            self._seen.pop(0)
        since, before = self._seen[0]
        rate = (done - before) / max(moment - since, 1e-9)
        parts = [f"{done:,}/{self.total:,} {self.unit}", f"{100 * done // max(self.total, 1)} %"]
        if rate > 0:
            parts.append(f"{rate:,.1f}/s")
        if rate > 0 and done < self.total:
            parts.append(f"ETA {_clock((self.total - done) / rate)}")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if self.note:
            parts.append(self.note)
        return "  ".join(parts), done


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def is_terminal() -> bool:
    """Whether a person watches."""
    return sys.stderr.isatty()
