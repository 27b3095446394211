"""Writes and reads the events of a run, one JSON document a line: the driver writes, whoever watches reads.

In a local workspace they are appended to `runs/<run>/events.jsonl`. On an object store they stand in segments
`runs/<run>/events-000001.jsonl`, of which the newest is written again every 15 s while it grows. Every now and then comes
an event `state` that holds the fold of all before it, and a segment begins with one: who comes late reads from the newest.

Each event has `time` (UTC), `t` (seconds since the run began, monotonic), and `event`, its kind:

    run          run, kind, host, pid                            the run began
    message      text                                            one line for people
    stage        stage, total, unit                              a stage that counts units begins
    progress     stage, done, total, note                        how far it is, every 10 s and at its end
    plan         modalities {name: parts}, workers, price        labeling begins: the parts of each modality to be made
    workers      pool, ready, wanted                             workers of a pool came or went
    started      worker, pool, item, rows, modalities [name]     a worker took an item up
    beat         worker, item, rows, stage, stage_s, busy,       a sign of life of a worker; of many workers each is
                 queue_fill, rss_bytes                           written more seldom: 20 a second in all, at most
    item         item, pool, rows, shards, failed, seconds,      an item is done and in the log; failed counts rows
                 busy, modalities {name: failed rows}
    failed_item  item, error, message, modalities [name]         an item failed for good; it stays to be done
    strike       item, worker, reason, strikes                   a worker was lost at an item
    alarm        text                                            a shard departs from the history of its recipe
    error        error, message, trace                           what ended the run
    ended        status, counts                                  done, failed, over_budget or interrupted
    state        state                                           everything so far; its fields are not promised

Kinds and fields stay; others may join them.
"""

import io
import json
import logging
import mmap
import re
import time
from pathlib import Path
from typing import IO, Any

from manifests.errors import ModmillError
from manifests.store import paths
from manifests.store.storage import Storage

_STORE_EVERY_S = 15.0
_STATE = b'"event": "state"'

_log = logging.getLogger(__name__)


class EventSink:
    """Takes the lines of one run. One thread at a time."""

    def write(self, lines: bytes) -> None:
        raise NotImplementedError

    def begin(self) -> None:
        """Says that what is written next is a `state`: a place to begin reading at."""

    def flush(self, *, now: bool) -> None:
        """Lets others see what was written, at once or when it is due."""


def sink(storage: Storage, run: str) -> EventSink:
    """Returns a writer for the events of a run that begins."""
    return _EventFile(Path(storage.full(paths.events(run)))) if storage.is_local else _SegmentWriter(storage, run)


class _EventFile(EventSink):
    """Writes the events of a local workspace; a full disk costs events, not the run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told = False
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, lines: bytes) -> None:
        try:
            with open(self._path, "ab") as file:
                file.write(lines)
        except OSError as error:
            if not self._told:
                _log.warning("%s: events are lost: %s", self._path, error)
            self._told = True


class _SegmentWriter(EventSink):
    """Writes events to an object store: what a segment has so far is kept, and put again as it grows."""

    def __init__(self, storage: Storage, run: str) -> None:
        self._storage = storage
        self._run = run
        self._number = 1
        self._held = b""
        self._put = 0
        self._next = time.monotonic()

    def begin(self) -> None:
        self.flush(now=True)
        self._number += 1
        self._held, self._put = b"", 0

    def write(self, lines: bytes) -> None:
        self._held += lines

    def flush(self, *, now: bool) -> None:
        if len(self._held) == self._put or (not now and time.monotonic() < self._next):
            return
        try:
            self._storage.replace(paths.events_segment(self._run, self._number), self._held)
            self._put = len(self._held)
        except (ModmillError, OSError) as error:
            _log.info("events were not written, it is tried again: %s", error)
        self._next = time.monotonic() + _STORE_EVERY_S


class EventReader:
    """Follows the events of a run from its newest `state` on. Raises FileNotFoundError if it has no events."""

    def __init__(self, storage: Storage, run: str) -> None:
        self._storage = storage
        self._run = run
        self._at = -1
        self._segment = 0

    def read(self) -> list[dict[str, Any]]:
        """Returns the events since the last call."""
        return self._read_file() if self._storage.is_local else self._read_segments()

    def _read_file(self) -> list[dict[str, Any]]:
        with open(self._storage.full(paths.events(self._run)), "rb") as file:
            if self._at < 0:
                self._at = _newest_state(file)
            file.seek(self._at)
            return self._whole(file.read())

    def _read_segments(self) -> list[dict[str, Any]]:
        found = (paths.EVENTS_SEGMENT.parse(path) for path in files(self._storage, self._run))
        newest = max((fields["segment"] for fields in found if fields), default=0)
        if not newest:
            raise FileNotFoundError(self._storage.location(paths.run(self._run)))
        events = []
        if self._at < 0:
            self._segment, self._at = newest, 0
        for number in range(self._segment, newest + 1):
            if number > self._segment:
                self._segment, self._at = number, 0
            data = self._storage.read(paths.events_segment(self._run, number))
            events += self._whole(data[self._at :])
        return events

    def _whole(self, data: bytes) -> list[dict[str, Any]]:
        """Returns the events of whole lines; the rest is read again next time."""
        end = data.rfind(b"\n") + 1
        self._at += end
        return [event for line in data[:end].splitlines() if (event := _parsed(line)) is not None]


def files(storage: Storage, run: str) -> list[str]:
    """Returns the files that hold the events of a run, in order; empty if it has no events."""
    found = (f"{paths.run(run)}/{name}" for name in storage.names(paths.run(run)))
    return [path for path in found if path == paths.events(run) or paths.EVENTS_SEGMENT.match(path)]


def redact(storage: Storage, named: re.Pattern[str], *, but: str) -> None:
    """Replaces texts that match a pattern by "(forgotten)" in the events of all runs but one."""
    for run in storage.names(paths.RUNS):
        for path in files(storage, run) if run != but else []:
            text = storage.read(path).decode()
            left = "".join(_redacted(line, named) for line in text.splitlines(keepends=True))
            if left != text:
                storage.replace(path, left.encode())


def _redacted(line: str, named: re.Pattern[str]) -> str:
    def without(value: Any) -> Any:
        if isinstance(value, str):
            return named.sub("(forgotten)", value)
        if isinstance(value, dict):
            return {name: without(one) for name, one in value.items()}
        return [without(one) for one in value] if isinstance(value, list) else value

    event = _parsed(line)
    changed = without(event)
    return line if changed == event else json.dumps(changed) + "\n"


def _newest_state(file: IO[bytes]) -> int:
    """Returns the position of the newest `state` line in a file of events; 0 if there is no such line."""
    if not file.seek(0, io.SEEK_END):
        return 0
    # Mapped, a long file is read from its end only as far as is needed.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.rfind(_STATE)
        return data.rfind(b"\n", 0, at) + 1 if at >= 0 else 0


def _parsed(line: bytes | str) -> dict[str, Any] | None:
    """Parses an event; returns None for a line that is not one (a disk was full)."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "t" in event and "event" in event else None
