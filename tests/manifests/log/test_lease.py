"""One writer at a time, on a disk and on object stores, whatever clocks say and whoever stands still."""

import datetime
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manifests.catalog.catalog import Catalog
from manifests.errors import WorkspaceError
from manifests.log import entries as log
from manifests.log import lease
from manifests.log.lease import writer_lease
from manifests.recipe import canonical_json
from manifests.store import paths
from manifests.store.storage import Storage, open_storage

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys
from manifests.log.lease import writer_lease
from manifests.store.storage import open_storage
with writer_lease(open_storage(sys.argv[1]), "r-holder"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdin=-1, stdout=-1, text=True, cwd=ROOT)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


# -- on a local disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def holder(workspace: Storage) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease."""
    process = start(HOLDER, workspace.uri)
    assert said(process) == "held"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_and_told_who_writes(workspace: Storage, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(WorkspaceError) as refusal, writer_lease(workspace, "r-second"):
        pass
    for part in (
        workspace.uri,
        "by r-holder",
        f"on {socket.gethostname()}",
        f"pid {holder.pid}",
        "since 20",
        " s ago",
    ):
        assert part in str(refusal.value)
    with pytest.raises(WorkspaceError, match="r-holder"), writer_lease(workspace, "r-third"):
        pass


def test_readers_need_no_lease(workspace: Storage, holder: subprocess.Popen[str]) -> None:
    with Catalog(workspace) as catalog:
        assert catalog.corpora() == []


def test_the_lease_is_free_after_its_holder_ends(workspace: Storage, holder: subprocess.Popen[str]) -> None:
    holder.communicate("done\n")
    with writer_lease(workspace, "r-next") as held:
        held.check()
        assert json.loads(workspace.read(paths.LEASE))["run"] == "r-next"


def test_the_lease_is_free_after_its_holder_is_killed(workspace: Storage, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with writer_lease(workspace, "r-next"):
        document = json.loads(workspace.read(paths.LEASE))
    assert (document["run"], document["pid"], document["host"]) == ("r-next", os.getpid(), socket.gethostname())


def test_a_lease_that_was_written_halfway_does_not_hide_that_it_is_held(workspace: Storage) -> None:
    with writer_lease(workspace, "r-one"):
        Path(workspace.full(paths.LEASE)).write_text('{"run": "r-o')
        with pytest.raises(WorkspaceError, match="written by another process"), writer_lease(workspace, "r-two"):
            pass


# -- on every store ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["disk", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, quick: None) -> Storage:
    """A workspace on a kind of store."""
    if request.param == "disk":
        made = open_storage(tmp_path / "work")
    elif request.param == "memory":
        made = open_storage(f"memory://{secrets.token_hex(8)}/work")
    else:
        made = open_storage(f"{request.getfixturevalue('s3_bucket')}/{secrets.token_hex(8)}")
    log.create_workspace(made)
    return made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals more than twice a second."""
    monkeypatch.setattr(lease, "RENEW_S", 0.4)
    monkeypatch.setattr(lease, "TTL_S", 1.4)


def test_the_lease_is_free_after_an_exception(storage: Storage) -> None:
    with pytest.raises(KeyError), writer_lease(storage, "r-a-very-long-name-of-a-run"):
        raise KeyError
    with writer_lease(storage, "r") as held:
        held.check()


def test_two_writers_in_one_process_exclude_each_other(storage: Storage) -> None:
    with writer_lease(storage, "r-one") as held:
        with pytest.raises(WorkspaceError, match=r"by r-one on .*pid \d+.* s ago.*wait for it or stop it"):
            with writer_lease(storage, "r-two"):
                pass
        held.check()
    with writer_lease(storage, "r-two"):
        pass


@pytest.mark.parametrize("round_number", range(20))
@pytest.mark.parametrize("storage", ["s3"], indirect=True)
def test_of_takers_that_race_exactly_one_holds(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, round_number: int
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 15.0)
    monkeypatch.setattr(lease, "TTL_S", 60.0)
    if round_number % 2:  # On an epoch that is over as well as on none.
        with writer_lease(storage, "r-before"):
            pass
    line, over = threading.Barrier(3), threading.Barrier(3)
    ends: list[str] = []

    def take(name: str) -> None:
        line.wait()
        try:
            with writer_lease(storage, name) as held:
                ends.append("held")
                over.wait()
                held.check()
        except WorkspaceError as error:
            ends.append(str(error))
            over.wait()

    threads = [threading.Thread(target=take, args=(f"r-{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends.count("held") == 1
    assert sum("is being written by r-" in end for end in ends) == 2


# -- on an object store: epochs ---------------------------------------------------------------------------------------

PAUSED = """
import sys
from manifests.log import lease
from manifests.log.actions import RunEnded
from manifests.catalog.catalog import Catalog
from manifests.errors import WorkspaceError
from manifests.log.entries import now
from manifests.store.storage import open_storage
lease.RENEW_S, lease.TTL_S = 0.4, 1.4
storage = open_storage(sys.argv[1])
with lease.writer_lease(storage, "r-paused") as held, Catalog(storage, lease=held) as catalog:
    for line in sys.stdin:
        try:
            print(catalog.commit([RunEnded(run="r", time=now(), status="done", counts={})], run="r-paused"), flush=True)
        except WorkspaceError as error:
            print(f"refused: {error}", flush=True)
"""


@pytest.fixture
def bucket(s3_bucket: str, quick: None) -> Storage:
    """An empty workspace on S3."""
    made = open_storage(f"{s3_bucket}/{secrets.token_hex(8)}")
    log.create_workspace(made)
    return made


def epochs(storage: Storage) -> list[int]:
    return [int(name.removesuffix(".json")) for name in storage.names(paths.LEASES)]


def put_epoch(storage: Storage, epoch: int, age_s: float = 0.0, **fields: Any) -> None:
    """The lease of a writer on another machine that was last seen alive so long ago by its clock."""
    renewed_at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s)
    document = {"epoch": epoch, "run": "r-far", "host": "far", "pid": 7, "machine": "another", "nonce": "00" * 16}
    document |= {"since": "2026-11-24T10:00:00.000000Z", "released": False}
    document |= {"renewed_at": renewed_at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), **fields}
    storage.replace(paths.lease_epoch(epoch), canonical_json(document))


@pytest.fixture
def renewing() -> Iterator[Callable[..., None]]:
    """Keeps the lease of another machine alive, by a clock that is wrong by some seconds."""
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def keep(storage: Storage, epoch: int, age_s: float) -> None:
        def work() -> None:
            while not ended.wait(lease.RENEW_S):
                put_epoch(storage, epoch, age_s)

        put_epoch(storage, epoch, age_s)
        threads.append(threading.Thread(target=work))
        threads[-1].start()

    yield keep
    ended.set()
    for thread in threads:
        thread.join()


def test_each_holder_has_an_epoch_and_takes_older_ones_away(bucket: Storage) -> None:
    for number in (1, 2, 3):
        with writer_lease(bucket, f"r-{number}"):
            assert epochs(bucket) == [number]
            document = json.loads(bucket.read(paths.lease_epoch(number)))
            assert (document["run"], document["epoch"], document["released"]) == (f"r-{number}", number, False)
            assert (document["host"], document["pid"]) == (socket.gethostname(), os.getpid())
        assert json.loads(bucket.read(paths.lease_epoch(number)))["released"] is True


def test_a_holder_shows_that_it_lives(bucket: Storage) -> None:
    with writer_lease(bucket, "r") as held:
        first = bucket.read(paths.lease_epoch(1))
        for _ in range(50):
            if bucket.read(paths.lease_epoch(1)) != first:
                break
            threading.Event().wait(0.1)
        later = bucket.read(paths.lease_epoch(1))
        held.check()
    assert json.loads(later)["renewed_at"] > json.loads(first)["renewed_at"]


def test_a_killed_holder_of_this_machine_is_replaced_at_once(bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(HOLDER, bucket.uri)
    assert said(process) == "held"
    with pytest.raises(WorkspaceError, match=f"r-holder on .*pid {process.pid}.*last seen alive"):
        with writer_lease(bucket, "r-next"):
            pass
    process.kill()
    process.communicate()
    monkeypatch.setattr(lease, "RENEW_S", 1000.0)  # Nothing is waited for.
    with writer_lease(bucket, "r-next"):
        assert epochs(bucket) == [2]


def test_a_writer_of_another_machine_that_lives_is_never_replaced(bucket: Storage, renewing) -> None:
    day = 86_400.0
    for epoch, age_s in enumerate((0.0, 0.5, day, -day), 1):
        renewing(bucket, epoch, age_s)
        with pytest.raises(WorkspaceError, match=r"by r-far on far \(pid 7, since 2026"):
            with writer_lease(bucket, "r-here"):
                pass
        assert epochs(bucket)[-1] == epoch


@pytest.mark.parametrize("age_s", [2.0, 86_400.0, -86_400.0])
def test_a_writer_of_another_machine_that_is_silent_is_replaced(
    bucket: Storage, age_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    put_epoch(bucket, 41, age_s)
    with writer_lease(bucket, "r-here") as held:
        held.check()
        assert epochs(bucket) == [42]
    assert "is taken over if that gives no sign of life" in caplog.text


def test_one_that_was_silent_a_moment_ago_is_given_its_time(bucket: Storage) -> None:
    put_epoch(bucket, 1, 0.3)
    with pytest.raises(WorkspaceError, match=r"last seen alive 0 s ago.*taken over by a run that starts 1 s after"):
        with writer_lease(bucket, "r-here"):
            pass


def test_a_lease_that_cannot_be_read_is_watched_and_replaced(bucket: Storage) -> None:
    bucket.replace(paths.lease_epoch(3), b'{"run": "r-')
    with writer_lease(bucket, "r-here"):
        assert epochs(bucket) == [4]


def test_a_pid_of_another_machine_says_nothing(bucket: Storage) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    put_epoch(bucket, 1, pid=process.pid, host=socket.gethostname())
    with pytest.raises(WorkspaceError, match="r-far"), writer_lease(bucket, "r-here"):
        pass


def test_an_epoch_whose_name_became_free_again_is_not_held(bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    # This taker saw epoch 1 and stood still; meanwhile 2 came and went, and 3 lives and has taken 1 and 2 away.
    put_epoch(bucket, 3)
    newest = lease._newest
    answers = iter([1])
    monkeypatch.setattr(lease, "_newest", lambda storage: next(answers, None) or newest(storage))
    with pytest.raises(WorkspaceError, match="r-far"), writer_lease(bucket, "r-here"):
        pass
    assert epochs(bucket) == [3]


def test_a_holder_that_is_replaced_is_told_by_whom(bucket: Storage) -> None:
    with writer_lease(bucket, "r-old") as held:
        put_epoch(bucket, 2)
        for _ in range(100):
            try:
                held.check()
            except WorkspaceError as error:
                refusal = str(error)
                break
            threading.Event().wait(0.05)
        else:
            pytest.fail("the holder did not notice")
        assert "is written by r-far on far (pid 7" in refusal
        assert "took over from r-old" in refusal
    # What ends then does not touch the lease of the other.
    assert json.loads(bucket.read(paths.lease_epoch(2)))["run"] == "r-far"
    assert json.loads(bucket.read(paths.lease_epoch(2)))["released"] is False


def test_a_holder_that_stood_still_is_replaced_and_its_next_commit_refused(bucket: Storage, make) -> None:
    process = start(PAUSED, bucket.uri)
    try:
        tell(process, "commit")
        assert said(process) == "1"
        process.send_signal(signal.SIGSTOP)
        threading.Event().wait(lease.TTL_S + 0.3)
        with writer_lease(bucket, "r-next") as held, Catalog(bucket, lease=held) as catalog:
            assert catalog.commit([make.run_started()], run="r-next") == 2
            process.send_signal(signal.SIGCONT)
            for _ in range(2):
                tell(process, "commit")
                refusal = said(process)
                assert refusal.startswith("refused: ")
                assert f"is written by r-next on {socket.gethostname()} (pid {os.getpid()}" in refusal
            held.check()
            assert catalog.commit([make.run_started()], run="r-next") == 3
        assert [entry.run for entry in log.entries(bucket)] == ["r-paused", "r-next", "r-next"]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_jumps_changes_nothing(bucket: Storage, monkeypatch: pytest.MonkeyPatch, make, days: int) -> None:
    class Jumped(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return datetime.datetime.now(tz) + datetime.timedelta(days=days)

    with writer_lease(bucket, "r-one") as held, Catalog(bucket, lease=held) as catalog:
        assert catalog.commit([make.run_started()], run="r-one") == 1
        shim = types.SimpleNamespace(datetime=Jumped, UTC=datetime.UTC)
        with monkeypatch.context() as patch:
            patch.setattr(log, "datetime", shim)
            assert catalog.commit([make.run_started()], run="r-one") == 2
            with pytest.raises(WorkspaceError, match="r-one"), writer_lease(bucket, "r-two"):
                pass
        assert catalog.commit([make.run_started()], run="r-one") == 3
        with pytest.raises(WorkspaceError, match="r-one"), writer_lease(bucket, "r-two"):
            pass
    entries = list(log.entries(bucket))
    assert [entry.version for entry in entries] == [1, 2, 3]
    assert [entry.time[:10] for entry in entries] != sorted(entry.time[:10] for entry in entries)
    with Catalog(bucket) as reader:
        assert reader.version == 3
    with writer_lease(bucket, "r-two"):
        pass
