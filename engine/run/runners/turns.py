"""Taking turns: callers are let through one at a time, in the order in which they came."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Numbered tickets, served in their order. Any thread may take one, wait and go on."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = self._serving = 0

    def take(self) -> tuple[int, bool]:
        """A ticket, and whether others are before it."""
        with self._changed:
            ticket, self._taken = self._taken, self._taken + 1
            return ticket, ticket != self._serving

    def wait(self, ticket: int) -> None:
        """Waits until it is this ticket's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._serving == ticket)

    @contextmanager
    def place(self, ticket: int) -> Iterator[None]:
        """A place in the line: at its end, whatever happened, the turn is waited for and passed on."""
        try:
            yield
        finally:
            with self._changed:
                self._changed.wait_for(lambda: self._serving == ticket)
                self._serving += 1
                self._changed.notify_all()
