"""Drives a runner on the thread that commits: hands items out, hears what became of them, gives it on, ends in order."""

import contextlib
import time
from collections.abc import Generator
from typing import Any, Protocol

from engine.progress.progress import Progress
from manifests.log.interrupts import handled

_TICK_S = 0.1
# Results are given to be committed so often, many in one log entry; workers go on meanwhile.
_GATHER_S = 0.25


class Driven(Protocol):
    """Says what the loop asks of a runner. `done` gathers items with their results, or the errors they failed with."""

    done: list[tuple[Any, Any]]

    @property
    def at_work(self) -> int:
        """Returns how many items are at work."""
        ...

    @property
    def is_over(self) -> bool:
        """Tells whether nothing is left to be done and nothing is at work."""
        ...

    def hand_out(self) -> None:
        """Gives items to the workers that are free for one."""
        ...

    def hear(self, timeout_s: float) -> None:
        """Sees to the answers that came, after waiting for the first at most so long."""
        ...

    def drain(self) -> None:
        """Begins nothing more: items that wait in workers stay to be done."""
        ...


def drive(runner: Driven, progress: Progress, drain_s: float | None) -> Generator[list[Any], None, None]:
    """Yields lists of the items that are done, each with its result or the error that it failed with for good.

    The first Ctrl-C stops handing out, waits up to `drain_s` for what is at work, and ends in KeyboardInterrupt; None: it
    interrupts at once.
    """
    draining = Draining()
    until: float | None = None
    yielded = 0.0
    with draining if drain_s is not None else contextlib.nullcontext():
        try:
            while True:
                if drain_s is not None and draining.asked and until is None:
                    until = time.monotonic() + drain_s
                    runner.drain()
                    if count := runner.at_work:
                        progress.say(
                            f"interrupted: waiting up to {drain_s:g} s for {count} item{'s' * (count > 1)} at work; "
                            "again to stop at once"
                        )
                if until is None:
                    runner.hand_out()
                if runner.is_over or (until is not None and time.monotonic() > until):
                    break
                runner.hear(_TICK_S)
                if runner.done and time.monotonic() - yielded >= _GATHER_S:
                    done, runner.done = runner.done, []
                    yield done
                    yielded = time.monotonic()
        except Exception:
            # What is done is not lost because something else went wrong.
            if runner.done:
                yield runner.done
            raise
        if runner.done:
            yield runner.done
        if draining.asked:
            raise KeyboardInterrupt


class Draining(contextlib.AbstractContextManager["Draining"]):
    """Makes the first Ctrl-C or SIGTERM within it ask for an end (`asked`); a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._handled = handled(self._hear)

    def __enter__(self) -> "Draining":
        self._handled.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._handled.__exit__(*raised)

    def _hear(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
