"""Lets callers through one at a time, in the order in which they came."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """Gives out numbered tickets and serves them in their order. Any thread may take one, wait and go on."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = self._serving = 0

    def take(self) -> tuple[int, bool]:
        """Returns a ticket, and whether others are before it."""
        with self._changed:
            ticket, self._taken = self._taken, self._taken + 1
            return ticket, ticket != self._serving

    def wait(self, ticket: int) -> None:
        """Waits until it is this ticket's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._serving == ticket)

    @contextmanager
    def place(self, ticket: int) -> Iterator[None]:
        """Holds a place in the line: at its end, whatever happened, the turn is waited for and passed on."""
        try:
            yield
        finally:
            with self._changed:
                self._changed.wait_for(lambda: self._serving == ticket)
                self._serving += 1
                self._changed.notify_all()

    def label(
        self, ticket: int, waits: bool, prefetch: Callable[[], None], label: Callable[[], Callable[[], T] | None]
    ) -> T | None:
        """Labels an item in its turn and returns its result, which the next item need not wait for.

        `label` returns what waits for the item's shards to be written, or None if the item is not to be begun any more.
        An item that waits for its turn fetches its bytes ahead meanwhile.
        """
        with self.place(ticket):
            if waits:
                # What cannot be fetched ahead is fetched again, and an error told, when its turn comes.
                with suppress(Exception):
                    prefetch()
            self.wait(ticket)
            written = label()
        # The next item has its turn while this one is written.
        return None if written is None else written()
