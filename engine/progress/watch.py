"""Shows a run to another process (`modmill status`), by its events and the lease of its workspace."""

import contextlib
import datetime
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from engine.progress import events, table
from engine.progress.state import RunState
from manifests import units
from manifests.errors import WorkspaceError
from manifests.log import entries as log
from manifests.log import lease
from manifests.store import paths
from manifests.store.storage import Storage

if TYPE_CHECKING:
    from rich.console import Group

_RUN = re.compile(r".+-(\d{8}T\d{6})-[0-9a-f]{6}")
# Silent so long, a run is looked for by the lease of its workspace; so long, it is said even if that is held.
_ASK_S = 5.0
_ASK_STORE_S = 15.0
_SILENT_S = 60.0
_GO_ON = "The same command again goes on from there"
_LINE_EVERY_S = 10.0
_READ_EVERY_S = 1.0
_READ_STORE_EVERY_S = 5.0


class Watched:
    """Follows one run. Raises FileNotFoundError if it has no events."""

    def __init__(self, storage: Storage, run: str) -> None:
        self.run = run
        self.state = RunState()
        self._storage = storage
        self._reader = events.EventReader(storage, run)
        # The run's own time at its last event, seconds since it began.
        self.t = 0.0
        # How old the newest event is when we come the clocks of two machines must tell; from there on our own does.
        self._seen = time.monotonic() - self._take(self._reader.read())

    def read(self) -> None:
        """Takes in what the run told since the last time."""
        found = self._reader.read()
        if found:
            self._take(found)
            self._seen = time.monotonic()
        if self.state.status is None and self.silent_s < _SILENT_S:
            # Rates, ETA and cost go on between events.
            self.state.apply({"t": self.t + self.silent_s, "event": "tick"})

    def _take(self, found: list[dict[str, Any]]) -> float:
        for event in found:
            self.state.apply(event)
            self.t = event["t"]
        return _age_s(found[-1].get("time")) if found else 0.0

    @property
    def silent_s(self) -> float:
        """Returns seconds since the run's last event."""
        return time.monotonic() - self._seen

    @property
    def killed(self) -> bool:
        """Tells whether it ended without a word: it holds the workspace no more."""
        if self.state.status is not None or lease.holder(self._storage) == self.run:
            return False
        # It may have ended since it was read: its last words come before it lets go.
        self.read()
        return self.state.status is None

    def word(self) -> str:
        """Returns how it ended, or that nothing is heard of it; empty if it simply runs."""
        if self.silent_s >= (_ASK_S if self._storage.is_local else _ASK_STORE_S) and self.killed:
            silent = units.clock(self.silent_s)
            return f"{self.run} was killed: no sign of life for {silent}, and it holds the workspace no more. {_GO_ON}"
        if self.state.status is not None:
            why = f" ({self.state.error})" if self.state.error else ""
            return f"{self.run} ended: {self.state.status.replace('_', ' ')}{why}"
        if self.silent_s < _SILENT_S:
            return ""
        return (
            f"{self.run}: no sign of life for {units.clock(self.silent_s)}, but its process holds the workspace: "
            "it waits for something long, or hangs"
        )


def newest(storage: Storage) -> Watched | None:
    """Returns the run of a workspace that began last, None if no run has told anything."""
    found = ((_RUN.fullmatch(name), name) for name in storage.names(paths.RUNS))
    for _, run in sorted(((match[1], name) for match, name in found if match), reverse=True):
        try:
            return Watched(storage, run)
        except FileNotFoundError:
            continue  # A run that trained, or tells its first event in a moment.
    return None


def head(storage: Storage) -> str:
    """Returns a line on the run that works in a workspace now, or was killed there last; empty if there is neither."""
    watched = newest(storage)
    if watched is None or watched.state.status is not None:
        return ""
    if watched.killed:
        return f"{watched.run} was killed at {units.clock(watched.t)} of its time. {_GO_ON}"
    return "" if watched.state.status is not None else f"{watched.run} is running: {_line(watched.state)}"


def watch(storage: Storage) -> None:
    """Shows the newest run until it ends, was killed, or Ctrl-C: its table on a terminal, else a line every 10 s.

    Raises WorkspaceError if there is no workspace, or no run.
    """
    log.workspace_id(storage)
    watched = newest(storage)
    if watched is None:
        raise WorkspaceError(f"{storage.uri}: no run has told anything yet; begin one with `modmill run PIPELINE.yaml`")
    with contextlib.suppress(KeyboardInterrupt):
        (_watch_table if sys.stdout.isatty() else _watch_lines)(storage, watched)


def _watch_lines(storage: Storage, watched: Watched) -> None:
    while True:
        over, word = _over(watched)
        sys.stdout.write(f"{watched.run}  {_line(watched.state)}\n" + (f"{word}\n" if word else ""))
        sys.stdout.flush()
        if over:
            return
        until = time.monotonic() + _LINE_EVERY_S
        while time.monotonic() < until and watched.state.status is None:
            time.sleep(_every_s(storage))
            watched.read()


def _watch_table(storage: Storage, watched: Watched) -> None:
    from rich.live import Live

    over, word = _over(watched)
    with Live(get_renderable=lambda: _drawn(watched, word), refresh_per_second=2) as live:
        while not over:
            time.sleep(_every_s(storage))
            watched.read()
            over, word = _over(watched)
        live.refresh()


def _drawn(watched: Watched, word: str) -> "Group":
    from rich.console import Group
    from rich.text import Text

    return Group(Text(watched.run, style="bold"), table.table(watched.state), Text(word, style="yellow"))


def _over(watched: Watched) -> tuple[bool, str]:
    word = watched.word()
    return watched.state.status is not None or " was killed: " in word, word


def _line(state: RunState) -> str:
    """Returns the state on one line: of labeling once that began, before it of the stage that is at work."""
    if state.work_began is not None or not state.stages:
        return table.line(state)
    name, stage = list(state.stages.items())[-1]
    return table.stage_line(name, stage, state.t)


def _every_s(storage: Storage) -> float:
    return _READ_EVERY_S if storage.is_local else _READ_STORE_EVERY_S


def _age_s(time_utc: str | None) -> float:
    """Returns seconds since a time, by two clocks; 0 if they say that it is to come."""
    try:
        then = datetime.datetime.fromisoformat(time_utc or "")
    except ValueError:
        return 0.0
    return max((datetime.datetime.now(datetime.UTC) - then).total_seconds(), 0.0)
