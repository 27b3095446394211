"""Lets callers through one at a time, in the order in which they came."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """Gives out numbered tickets and serves them in their order. Any thread may take one, and another one use it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = self._serving = 0

    def take(self) -> int:
        """Returns a ticket."""
        with self._changed:
            ticket, self._taken = self._taken, self._taken + 1
            return ticket

    def label(self, ticket: int, prefetch: Callable[[], None], label: Callable[[], Callable[[], T] | None]) -> T | None:
        """Labels an item in its turn and returns its result, which the next item need not wait for.

        `label` returns what waits for the item's shards to be written, or None if the item is not to be begun any more.
        An item that waits for its turn fetches its bytes ahead meanwhile. Whatever happens, the turn is passed on.
        """
        if ticket != self._serving:
            # What cannot be fetched ahead is fetched again, and an error told, when its turn comes.
            with suppress(Exception):
                prefetch()
        with self._changed:
            self._changed.wait_for(lambda: self._serving == ticket)
        try:
            written = label()
        finally:
            # The next item has its turn while this one is written.
            with self._changed:
                self._serving += 1
                self._changed.notify_all()
        return None if written is None else written()
