"""Ctrl-C waits where work must not be cut in two."""

import signal
import threading

import pytest

from manifests.catalog import Catalog
from manifests.interrupts import held_back
from manifests.storage import Storage


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
    with Catalog(workspace) as catalog:
        index = catalog._index
        insert = index._insert

        def disturbed(*arguments: object, **named: object) -> None:
            signal.raise_signal(signal.SIGINT)
            insert(*arguments, **named)

        monkeypatch.setattr(index, "_insert", disturbed)
        with pytest.raises(KeyboardInterrupt):
            catalog.commit([make.corpus()], run="r")  # type: ignore[attr-defined]
        monkeypatch.setattr(index, "_insert", insert)
        assert catalog.version == 1
        assert len(catalog.corpora()) == 1
