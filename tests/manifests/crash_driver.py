"""Drivers that are killed: a program that runs rounds of them, for `test_crashes.py`.

It reads one round a line (JSON of the fields of `Round`) and answers one line: how many lives ended by which kill, and
what a driver said that ended by an error of its own. It has imported all that drivers need (pandas too, which pyarrow
imports when it makes an array) and forks a child for each life, so that a life takes a tenth of a second; DuckDB is
opened in the children only.

Each life commits shards of tasks that the log lacks, until none is left or its kill comes: at the n-th time that it
passes a named point of the commit protocol, or at any moment by a timer. Production code knows nothing of this: the
points are wrapped around its functions here, in the child.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from manifests.catalog import index_checkpoint, replay
from manifests.catalog.catalog import Catalog
from manifests.catalog.index import Index
from manifests.errors import WorkspaceError
from manifests.formats import shards
from manifests.log import actions
from manifests.log import entries as log
from manifests.log.lease import Lease, writer_lease
from manifests.modality import MODALITIES
from manifests.recipe import canonical_json, sha256_hex
from manifests.store import paths, storage
from manifests.store.storage import Storage, open_storage, put_same

CORPUS = "photos"
ROWS = 4
MODALITY_NAMES = ("caption", "metadata")
LIVES = 400
STEPS = ("written", "synced", "linked", "put")
FILES = ("shard", "failed file", "sidecar", "log entry")
FILE_POINTS = tuple(f"{file} {step}" for file in FILES for step in STEPS)
INDEX_POINTS = ("index begun", "index filled", "index committed", "index made")
COMMIT_POINTS = ("before the log", "after the log", "committed", "acknowledged")
LEASE_POINTS = ("lease locked", "lease written")
# Only a writer that holds the lease makes checkpoints; here one after so many entries.
CHECKPOINT_POINTS = ("checkpoint file written", "checkpoint file put", "checkpoint loaded")
CHECKPOINT_ENTRIES = 4
PROTOCOL_POINTS = FILE_POINTS + INDEX_POINTS + COMMIT_POINTS
POINTS = PROTOCOL_POINTS + LEASE_POINTS + CHECKPOINT_POINTS
TIMER = "any moment"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """Drivers at work at the same time until every task is done.

    `cache` is a folder for each driver's index, or for both. `same_bytes` says whether two lives that do one task
    write the same file. `broken` names a fault of the protocol that the checker must find: see `BROKEN`.
    """

    seed: int
    uri: str
    cache: str
    acks: str
    parts: int = 20
    drivers: int = 2
    lease: bool = False
    shared_cache: bool = True
    same_bytes: bool = True
    broken: str | None = None

    def cache_of(self, driver: int) -> Path:
        return Path(self.cache) / ("shared" if self.shared_cache else str(driver))

    def tasks(self) -> set[tuple[int, str]]:
        return {(part, modality) for part in range(self.parts) for modality in MODALITY_NAMES}


def keys_of(part: int) -> list[str]:
    return [f"{part:03d}{row:03d}" for row in range(ROWS)]


# -- a life -----------------------------------------------------------------------------------------------------------


class Kill:
    """When a life ends: the n-th time that it passes a point, or by a timer."""

    def __init__(self, given: Round, driver: int, life: int) -> None:
        generator = random.Random(f"kill {given.seed} {driver} {life}")
        # Those of the lease and of checkpoints come seldom.
        rare = 2 * (LEASE_POINTS + CHECKPOINT_POINTS) if given.lease else ()
        self.point = generator.choice((*PROTOCOL_POINTS, *rare, TIMER, TIMER))
        # These come once in a life.
        once = (*LEASE_POINTS, "index made", "checkpoint loaded")
        self._left = 1 if self.point in once else generator.randint(1, 2)
        self._after_s = generator.uniform(0.005, 0.12)
        self._by_exit = generator.random() < 0.5

    def start(self) -> None:
        """Sets the timer, if it is one."""
        if self.point == TIMER:
            # The default action of SIGALRM ends a process at once, wherever it is.
            signal.setitimer(signal.ITIMER_REAL, self._after_s)

    def passes(self, point: str) -> None:
        if point != self.point:
            return
        self._left -= 1
        if self._left == 0:
            if self._by_exit:
                os._exit(137)
            os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner: Any, name: str, before: Callable[..., None] | None, after: Callable[..., None] | None) -> None:
    """Puts calls around a function of a module or class; both get its arguments."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*arguments: Any, **named: Any) -> Any:
        if before is not None:
            before(*arguments, **named)
        answer = inner(*arguments, **named)
        if after is not None:
            after(*arguments, **named)
        return answer

    setattr(owner, name, outer)


def file_of(path: str | os.PathLike[str]) -> str:
    """What a path of the workspace holds, in the words of `FILES`; empty for what is none of them."""
    text = str(path)
    if "/_meta/log/" in text:
        return "log entry"
    if "/_meta/checkpoints/" in text:
        return "checkpoint file"
    if "/data/" in text and ".failed.parquet" in text:
        return "failed file"
    if "/data/" in text and ".json" in text:
        return "sidecar"
    return "shard" if "/data/" in text and ".parquet" in text else ""


def is_lease(descriptor: int) -> bool:
    return os.readlink(f"/proc/self/fd/{descriptor}").endswith(paths.LEASE)


def place(kill: Kill) -> None:
    """Wraps the points around the functions of the commit protocol."""
    passes = kill.passes

    def of_descriptor(step: str) -> Callable[..., None]:
        return lambda descriptor: passes(f"{file_of(os.readlink(f'/proc/self/fd/{descriptor}'))} {step}")

    wrap(os, "fsync", of_descriptor("written"), of_descriptor("synced"))
    wrap(os, "link", None, lambda _, target: passes(f"{file_of(target)} linked"))
    wrap(storage, "_put_local", None, lambda target, _: passes(f"{file_of(target)} put"))
    wrap(log, "append", lambda *_, **__: passes("before the log"), lambda *_, **__: passes("after the log"))
    wrap(replay, "_insert", lambda *_, **__: passes("index begun"), lambda *_, **__: passes("index filled"))
    wrap(Index, "_apply", None, lambda *_: passes("index committed"))
    wrap(Index, "_start", None, lambda *_: passes("index made"))
    wrap(index_checkpoint, "load", None, lambda *_: passes("checkpoint loaded"))
    wrap(fcntl, "flock", None, lambda file, _: passes("lease locked" if is_lease(file) else ""))
    wrap(os, "pwrite", None, lambda file, *_: passes("lease written" if is_lease(file) else ""))


def put_by_rename(target: Path, data: Any) -> bool:
    """Broken: what another writer made since the look is replaced."""
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    return True


def put_in_place(target: Path, data: Any) -> bool:
    """Broken: a file stands under its name before it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(target, "xb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            os.fsync(file.fileno())
            file.write(data[len(data) // 2 :])
    except FileExistsError:
        return False
    return True


BROKEN = {"put by rename": put_by_rename, "put in place": put_in_place, "early acknowledgement": None}


def live(given: Round, driver: int, life: int) -> None:
    """Commits what is missing, until nothing is."""
    generator = random.Random(f"work {given.seed} {driver} {life}")
    if (put := BROKEN.get(given.broken or "")) is not None:
        storage._put_local = put
    kill = Kill(given, driver, life)
    place(kill)
    kill.start()
    index_checkpoint._ENTRIES = CHECKPOINT_ENTRIES
    run = f"d{driver}.{life}"
    # Some lives are of a machine that never saw the workspace.
    is_new = kill.point in ("index made", "checkpoint loaded") or generator.random() < 0.1
    os.environ["MODMILL_CACHE"] = str(Path(given.cache) / run if is_new else given.cache_of(driver))
    work = open_storage(given.uri)
    with held(work, run) if given.lease else contextlib.nullcontext() as lease, Catalog(work, lease=lease) as catalog:
        while True:
            catalog.refresh()
            todo = sorted(given.tasks() - {(shard.part, shard.modality) for shard in catalog.live_shards()})
            if not todo:
                return
            chosen = generator.sample(todo, min(len(todo), generator.randint(1, 2)))
            records = [write_shard(work, *task, "" if given.same_bytes else run) for task in chosen]
            ack = {"version": catalog.version + 1, "run": run, "paths": [record.path for record in records]}
            if given.broken == "early acknowledgement":
                acknowledge(given.acks, ack)
                catalog.commit(records, run=run)
            else:
                ack["version"] = catalog.commit(records, run=run)
                kill.passes("committed")
                acknowledge(given.acks, ack)
                kill.passes("acknowledged")


@contextlib.contextmanager
def held(work: Storage, run: str) -> Iterator[Lease]:
    """Holds the lease, after as many refusals as it takes."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                lease = stack.enter_context(writer_lease(work, run))
            except WorkspaceError as refusal:
                if "is being written by" not in str(refusal):
                    raise
                time.sleep(0.002)
                continue
            yield lease
            return


def write_shard(work: Storage, part: int, modality: str, attempt: str) -> actions.ShardAdded:
    """Writes a shard, its failed file and its sidecar, as a worker does; the shard's record."""
    fingerprint = sha256_hex(modality.encode())
    keys = keys_of(part)
    statuses = [1 if (part + row) % 5 == 0 else 0 for row in range(ROWS)]
    value: Any = "a photograph" if modality == "caption" else dict.fromkeys(MODALITIES[modality].fields)
    values = [value if status == 0 else None for status in statuses]
    data = shards.write_labels(keys, statuses, values, MODALITIES[modality], {"part": part, "attempt": attempt})
    sha256 = sha256_hex(data)
    stem = paths.stem(paths.shard(CORPUS, modality, fingerprint, part, None, sha256, is_tar=False))
    put_same(work, f"{stem}.parquet", data, sha256)
    failed = None
    if 1 in statuses:
        failure = {"corpus": CORPUS, "part": part, "row": statuses.index(1), "key": keys[statuses.index(1)]}
        failure |= {"modality": modality, "form": "label", "stage": "label", "class": "ValueError", "message": "no"}
        failed = shards.write_failures([failure])
        put_same(work, f"{stem}.failed.parquet", failed, sha256_hex(failed))
    record = actions.ShardAdded(
        corpus=CORPUS,
        part=part,
        crop=None,
        modality=modality,
        form="label",
        fingerprint=fingerprint,
        path=f"{stem}.parquet",
        format="parquet",
        sha256=sha256,
        size_bytes=len(data),
        rows=ROWS,
        ok=statuses.count(0),
        failed=statuses.count(1),
        absent=0,
        keys_sha256=shards.keys_digest(keys),
        failed_path=f"{stem}.failed.parquet" if failed else None,
        failed_sha256=sha256_hex(failed) if failed else None,
    )
    work.put(f"{stem}.json", canonical_json({"format": 1, "shard": dataclasses.asdict(record)}))
    return record


def acknowledge(acks: str, ack: dict[str, Any]) -> None:
    """Tells the world: one line, whole or not at all."""
    descriptor = os.open(acks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, canonical_json(ack) + b"\n")
    os.close(descriptor)


# -- a round ----------------------------------------------------------------------------------------------------------


def begin(given: Round, driver: int, life: int, said: int) -> int:
    """Forks a life; its process id. What it says when it fails goes to the file `said`."""
    child = os.fork()
    if child:
        return child
    _live_and_die(given, driver, life, said)


def _live_and_die(given: Round, driver: int, life: int, said: int) -> NoReturn:
    status = 1
    try:
        live(given, driver, life)
        status = 0
    except BaseException:
        os.write(said, traceback.format_exc().encode())
    os._exit(status)


def run_round(given: Round) -> dict[str, Any]:
    """Restarts drivers that were killed, until each has ended by itself: kills by how they came, lives, errors."""
    kills: collections.Counter[str] = collections.Counter()
    lives = [0] * given.drivers
    with tempfile.TemporaryFile() as said:
        running = {begin(given, driver, 0, said.fileno()): driver for driver in range(given.drivers)}
        while running:
            child, status = os.wait()
            driver = running.pop(child)
            code = os.waitstatus_to_exitcode(status)
            lives[driver] += 1
            if code in (137, -signal.SIGKILL, -signal.SIGALRM):
                kills[Kill(given, driver, lives[driver] - 1).point] += 1
                if lives[driver] < LIVES and not said.tell():
                    running[begin(given, driver, lives[driver], said.fileno())] = driver
            elif code != 0:
                os.write(said.fileno(), f"driver {driver} ended with {code}\n".encode())
        said.seek(0)
        return {"kills": kills, "lives": lives, "errors": said.read().decode()}


if __name__ == "__main__":
    shards.write_labels(["a"], [0], ["a caption"], MODALITIES["caption"], {})
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run_round(Round(**json.loads(line)))) + "\n")
        sys.stdout.flush()
