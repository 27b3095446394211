"""Makes Ctrl-C wait while work must not be cut in two, and hears it while DuckDB would not listen."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

Result = TypeVar("Result")


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Has `handler` hear Ctrl-C and SIGTERM within the block, instead of what Python calls for them outside it.

    A signal that is ignored stays so (a shell has what it starts in the background ignore Ctrl-C), and so does one that
    ends the process. Python runs signal handlers in the main thread alone: in another one nothing changes.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(known := signal.getsignal(number)) and not isinstance(known, signal.Handlers):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back to the end of the block.

    DuckDB looks for signals inside its calls and may swallow the interrupt that it finds, or leave a transaction open.
    """
    came: list[int] = []
    try:
        with handled(lambda number, _: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


def heard(work: Callable[[], Result], interrupt: Callable[[], None]) -> Result:
    """Returns the result of work that looks for signals too seldom; at Ctrl-C it is told to end by `interrupt()`.

    DuckDB does not look in the middle of a recursion or of one long scan. The work is done in another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    result: Future[Result] = Future()
    threading.Thread(target=_do, args=(work, result), daemon=True).start()
    try:
        return result.result()
    except KeyboardInterrupt:
        interrupt()
        wait([result])
        raise


def _do(work: Callable[[], Any], result: "Future[Any]") -> None:
    try:
        result.set_result(work())
    except BaseException as error:
        result.set_exception(error)
    finally:
        # An error holds this frame, which would hold the error: what it keeps open would stay so.
        del result
