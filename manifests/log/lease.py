"""Keeps one writer at a time: the lease of a workspace.

On a local disk it is a flock on `_meta/lease.json`, which the kernel drops with the process. On an object store it is the
newest of `_meta/lease/<20-digit epoch>.json`, each created if absent, so that of two takers exactly one gets an epoch:

    {"epoch": 7, "run": "<run>", "host": "mill", "pid": 812, "machine": "<boot and pid namespace, or null>",
     "nonce": "<32 hex digits>", "since": "<UTC>", "renewed_at": "<UTC>", "released": false}

Its holder alone writes it again, every RENEW_S, and takes the older ones away. No clock of another machine is trusted: a
lease that looks old is watched by the taker's own clock for two renewals before it is taken over. What keeps two writers
that both think they hold the workspace from losing or doubling anything is put-if-absent of log entries, not this.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from manifests.errors import ModmillError, WorkspaceError
from manifests.log.entries import now
from manifests.recipe import canonical_json
from manifests.store import paths
from manifests.store.storage import Storage, writing

RENEW_S = 15.0
TTL_S = 60.0

_log = logging.getLogger(__name__)


@final
class Lease:
    """Holds the right to write a workspace. `check` raises WorkspaceError once another writer has taken it over."""

    def __init__(self, renew: Callable[[], str | None]) -> None:
        """Takes `renew`, which renews the lease and returns None, or says who took it over."""
        self._renew = renew
        self._renewing = threading.Lock()
        self._renewed = _clock()
        self._lost: str | None = None

    def check(self) -> None:
        """Raises WorkspaceError if this process is no longer the writer.

        Asks the store only if the last renewal is so old that the lease may have been taken over since: the process
        stood still, or the store was away.
        """
        if self._lost is None and _clock() - self._renewed > 1.5 * RENEW_S:
            self.renew()
        if self._lost is not None:
            raise WorkspaceError(self._lost)

    def renew(self) -> bool:
        """Shows that this process lives; False if the lease is lost. Raises WorkspaceError if the store fails."""
        with self._renewing:
            before = _clock()
            if self._lost is None:
                self._lost = self._renew()
            if self._lost is None:
                self._renewed = before
            return self._lost is None


@contextmanager
def writer_lease(storage: Storage, run: str) -> Iterator[Lease]:
    """Holds the workspace as its one writer. Raises WorkspaceError that names the holder if there is one."""
    with _flock(storage, run) if storage.is_local else _epoch(storage, run) as lease:
        yield lease


def holder(storage: Storage) -> str | None:
    """Returns the run that holds the lease now, as far as can be told; None if none does.

    On a local disk the kernel knows. On an object store it is the last to say so, unless it gave no sign of life for TTL_S
    by the clocks of two machines, or is known to be dead.
    """
    if storage.is_local:
        return _flock_holder(Path(storage.full(paths.LEASE)))
    newest = _newest(storage)
    found = _parsed(_bytes(storage, newest)) if newest else {}
    age_s = _age_s(found.get("renewed_at"))
    if _is_over(found) or age_s is None or age_s > TTL_S:
        return None
    return found.get("run")


# -- on a local disk --------------------------------------------------------------------------------------------------


def _flock_holder(path: Path) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # Held for no longer than it takes to ask; a writer that comes in this moment tries again.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _parsed(path.read_bytes()).get("run")
    finally:
        os.close(descriptor)
    return None


@contextmanager
def _flock(storage: Storage, run: str) -> Iterator[Lease]:
    path = Path(storage.full(paths.LEASE))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _locked(descriptor):
            found = _parsed(path.read_bytes())
            raise WorkspaceError(f"{storage.uri} is being written by {_named(found)}; wait for it or stop it")
        document = {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "since": now()}
        with writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, canonical_json(document), 0)
        yield Lease(lambda: None)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Tells whether the lock is ours; who only asks for its holder has it for a moment."""
    for _ in range(3):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


# -- on an object store -----------------------------------------------------------------------------------------------


@contextmanager
def _epoch(storage: Storage, run: str) -> Iterator[Lease]:
    document = _taken(storage, run)
    epoch = document["epoch"]

    def renew(*, released: bool = False) -> str | None:
        newest = _newest(storage)
        if newest > epoch:
            winner = _named(_parsed(_bytes(storage, newest)))
            return (
                f"{storage.uri} is written by {winner} now, which took over from {run} when that gave no sign of life; "
                "what run committed stays: wait for the other, then give the same command again"
            )
        storage.replace(
            paths.lease_epoch(epoch), canonical_json({**document, "renewed_at": now(), "released": released})
        )
        return None

    lease = Lease(renew)
    ended = threading.Event()
    thread = threading.Thread(target=_renew_often, args=(lease, ended), name="modmill-lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        # A store that is away by now must not hide how the run ended; the lease runs out by itself.
        with contextlib.suppress(ModmillError, OSError):
            renew(released=True)


def _renew_often(lease: Lease, ended: threading.Event) -> None:
    wait_s = RENEW_S
    while not ended.wait(wait_s):
        try:
            if not lease.renew():
                return
            wait_s = RENEW_S
        except (ModmillError, OSError) as error:
            _log.info("the lease could not be renewed: %s", error)
            wait_s = RENEW_S / 5


def _taken(storage: Storage, run: str) -> dict[str, Any]:
    """Takes the next epoch; its document. Raises WorkspaceError if a writer lives."""
    document = {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "released": False}
    document |= {"nonce": secrets.token_hex(16), "since": now(), "renewed_at": now()}
    while True:
        newest = _newest(storage)
        if newest:
            _wait_until_free(storage, newest)
        document |= {"epoch": newest + 1, "renewed_at": now()}
        created = storage.put(paths.lease_epoch(newest + 1), canonical_json(document))
        # An object store says "taken" of our own object too, if its first answer got lost and the request went again.
        if not created and _parsed(_bytes(storage, newest + 1)).get("nonce") != document["nonce"]:
            continue
        # A holder takes older objects away: this epoch may have been over, and its name free again, before we came.
        epochs = _epochs(storage)
        if epochs[-1:] != [newest + 1]:
            storage.remove(paths.lease_epoch(newest + 1))
            continue
        for older in epochs[:-1]:
            storage.remove(paths.lease_epoch(older))
        return document


def _wait_until_free(storage: Storage, epoch: int) -> None:
    """Returns when the lease of an epoch may be taken over. Raises WorkspaceError if its holder lives."""
    seen = _bytes(storage, epoch)
    holder = _parsed(seen)
    if seen is None or _is_over(holder):
        return
    age_s = _age_s(holder.get("renewed_at"))
    if age_s is None or not -RENEW_S <= age_s <= TTL_S:
        # Its holder is gone, or one of two clocks is wrong: only what our own clock measures tells which.
        _log.warning(
            "%s is held by %s; it is taken over if that gives no sign of life for %.0f s",
            storage.uri,
            _named(holder),
            2 * RENEW_S,
        )
        until = _clock() + 2 * RENEW_S
        while (found := _bytes(storage, epoch)) == seen:
            if _clock() > until:
                return
            time.sleep(RENEW_S / 5)
        holder = _parsed(found)
        if found is None or holder.get("released") is True:
            return
    raise WorkspaceError(
        f"{storage.uri} is being written by {_named(holder)}; wait for it or stop it; one that was killed "
        f"is taken over by a run that starts {TTL_S:.0f} s after its last sign of life"
    )


def _is_over(holder: dict[str, Any]) -> bool:
    """Tells whether a holder said that it ended, or was a process of this machine and lives no more."""
    is_here = _machine() is not None and holder.get("machine") == _machine()
    return holder.get("released") is True or (is_here and not _lives(holder.get("pid")))


def _newest(storage: Storage) -> int:
    """Returns the newest epoch, 0 if there was none yet."""
    return max(_epochs(storage), default=0)


def _epochs(storage: Storage) -> list[int]:
    """Returns the epochs that have an object, in order."""
    found = (paths.LEASE_EPOCH.parse(f"{paths.LEASES}/{name}") for name in storage.names(paths.LEASES))
    return [fields["version"] for fields in found if fields]


def _bytes(storage: Storage, epoch: int) -> bytes | None:
    """Returns the object of an epoch, None if a later holder took it away."""
    try:
        return storage.read(paths.lease_epoch(epoch))
    except FileNotFoundError:
        return None


# -- who, where, when -------------------------------------------------------------------------------------------------


def _parsed(data: bytes | None) -> dict[str, Any]:
    """Returns a lease as it was written; nothing if it cannot be read."""
    try:
        document = json.loads(data or b"")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    """Returns the holder of a lease in words, with its age, or on an object store that of its last sign of life."""
    try:
        since = f"{str(holder['since'])[:19]}Z"
        name = f"{holder['run']} on {holder['host']} (pid {holder['pid']}, since {since}"
    except KeyError:
        return "another process"
    age_s = _age_s(holder.get("renewed_at", holder["since"]))
    if age_s is None or age_s < 0:
        return f"{name})"
    return f"{name}, {'last seen alive ' if 'renewed_at' in holder else ''}{age_s:.0f} s ago)"


def _age_s(time_utc: Any) -> float | None:
    """Returns seconds from a time to now by the clocks of two machines: negative if they differ; None for no time."""
    try:
        return (datetime.datetime.fromisoformat(now()) - datetime.datetime.fromisoformat(time_utc)).total_seconds()
    except (TypeError, ValueError):
        return None


def _clock() -> float:
    """Returns seconds that only go on, through a suspension of the machine too if the system can tell."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _machine() -> str | None:
    """Returns what pids of one meaning share: this boot of this machine and the pid namespace; None if the system hides it."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _lives(pid: Any) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError, OverflowError):
        return True
    return True
