"""Ctrl-C waits where work must not be cut in two."""

import signal
import threading
import time

import pytest

from manifests.catalog import replay
from manifests.catalog.catalog import Catalog
from manifests.log.interrupts import heard, held_back
from manifests.store.storage import Storage


def test_ctrl_c_counts_at_the_end_of_the_block() -> None:
    reached = []

    def disturbed() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            reached.append("after the signal")

    with pytest.raises(KeyboardInterrupt):
        disturbed()
    assert reached == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_ctrl_c_nothing_happens_and_errors_pass() -> None:
    with pytest.raises(ValueError, match="own"), held_back():
        raise ValueError("own")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_are_left_alone() -> None:
    done = []

    def work() -> None:
        with held_back():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]


def test_a_commit_that_ctrl_c_meets_is_whole(workspace: Storage, make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    insert = replay._insert

    def disturbed(*arguments: object, **named: object) -> None:
        signal.raise_signal(signal.SIGINT)
        insert(*arguments, **named)  # type: ignore[arg-type]

    with Catalog(workspace) as catalog:
        catalog.commit([make.corpus()], run="r")  # type: ignore[attr-defined]
        monkeypatch.setattr(replay, "_insert", disturbed)
        with pytest.raises(KeyboardInterrupt):
            catalog.corpora()
        monkeypatch.setattr(replay, "_insert", insert)
        assert catalog.version == 1
        assert len(catalog.corpora()) == 1


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count(*) FROM range(10000000000000)",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
    ],
)
def test_ctrl_c_ends_a_query_that_never_ends(workspace: Storage, query: str) -> None:
    with Catalog(workspace) as catalog:
        threading.Timer(0.5, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            catalog.fetch(query)
        assert time.monotonic() - began < 10
        assert catalog.fetch("SELECT 1 AS one") == (["one"], [(1,)])


def test_work_that_is_heard_gives_its_result_and_its_error() -> None:
    assert heard(lambda: 3, lambda: None) == 3
    with pytest.raises(ValueError, match="own"):
        heard(lambda: int("own"), lambda: None)
