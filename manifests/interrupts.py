"""Ctrl-C waits where work must not be cut in two."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Ctrl-C during the block counts at its end.

    DuckDB looks for signals inside its calls and may swallow the interrupt that it finds, or leave a transaction open.
    """
    if threading.current_thread() is not threading.main_thread():
        # Python runs signal handlers in the main thread alone.
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
