"""Measures the memory of a worker, for `benchmarks.engine`: with photographs of 100 megapixels, and over 200 parts.

A worker is the `local` runner in a process that does nothing else, so that its resident size is the worker's and the
driver's together: a little more than a worker's on Ray. It is read from /proc every 10 ms.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine.runs import commits


def peak_mb(warm_up: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, float]:
    """Megabytes resident: at the most during a run with huge photographs, and after one without, that came before."""
    from benchmarks.engine.runs import run

    run(warm_up, workers=1)
    before = _resident_mb()
    with _Samples() as samples:
        run(measured, workers=1)
    return {"rss_mb_before": before, "rss_mb_max": max(mb for _, mb in samples.taken)}


def slope_mb_per_100_parts(pipeline: Mapping[str, Any]) -> dict[str, float]:
    """Measures how a worker's resident size grows over many parts, by least squares over the second half of them.

    In the first half caches fill: of the allocator, which keeps some memory, and of the index.
    """
    from benchmarks.engine.runs import run_to_events

    with _Samples() as samples:
        events = run_to_events(pipeline)
    done = np.array(commits(events))
    times, sizes = (np.array(column) for column in zip(*samples.taken, strict=True))
    # The size at the end of each part: what a part itself needs comes and goes.
    at_part = np.interp(done, times, sizes)
    later = slice(len(done) // 2, None)
    slope = np.polyfit(np.arange(len(done))[later], at_part[later], 1)[0]
    return {"mb_per_100_parts": 100 * float(slope), "parts": len(done), "rss_mb_last": float(sizes[-1])}


class _Samples:
    """Samples the resident size of this process, every 10 ms: (seconds since 1970, megabytes)."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, float]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._take, daemon=True)

    def __enter__(self) -> "_Samples":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _take(self) -> None:
        while not self._end.wait(0.01):
            self.taken.append((time.time(), _resident_mb()))


def _resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmRSS")
