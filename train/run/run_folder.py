"""The folders of runs: their names, which one a run goes on in, and that only one process writes there."""

import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from manifests.errors import ConfigError, ShardError, UserError
from manifests.log.entries import now
from manifests.recipe import canonical_json, sha256_hex
from manifests.snapshots.snapshot import Snapshot
from manifests.store.storage import Storage, open_storage
from train.run import checkpoint
from train.run.checkpoint import Saved
from train.settings.trainer import TrainConfig

_STAMP = r"\d{8}T\d{6}-[0-9a-f]{6}"
# What may change between two sittings of one run.
_FREE = ("out", "steps", "log_every", "validation", "checkpoint", "threads", "device", "workers")


def identity(config: TrainConfig, snapshots: Sequence[Snapshot]) -> str:
    """The sha256 of everything that decides a run's losses but how long it is; wherever the snapshots lie."""
    document = {name: value for name, value in config.document().items() if name not in _FREE}
    for entry, snapshot in zip(document["mixture"], snapshots, strict=True):
        entry["snapshot"] = snapshot.sha256
    return sha256_hex(canonical_json(document))


def new(out: str, config: TrainConfig) -> Storage:
    """The folder of a run that begins; nothing is created."""
    stamp = now()[:19].replace(":", "").replace("-", "")
    return open_storage(f"{out}/{config.name}-{stamp}-{secrets.token_hex(3)}")


def newest(out: str, config: TrainConfig, wanted: str, say: Callable[[str], None]) -> Saved | None:
    """The last checkpoint of the newest run of this name and identity, None where there is none."""
    mine = re.compile(f"{re.escape(config.name)}-{_STAMP}")
    runs = [name for name in open_storage(out).names("") if mine.fullmatch(name)]
    for name in reversed(runs):
        saved = checkpoint.latest(open_storage(f"{out}/{name}"), say)
        if saved is not None and saved.document.get("identity") == wanted:
            return saved
    return None


def named(uri: str) -> Saved:
    """The checkpoint that a person named. Raises ConfigError where there is none."""
    try:
        return checkpoint.find(uri)
    except ShardError as error:
        raise ConfigError(f"--resume {uri}: {error}") from error


@contextmanager
def only_writer(storage: Storage) -> Iterator[None]:
    """Holds a run's folder of this machine. Raises UserError where another process does."""
    if not storage.is_local:
        yield
        return
    folder = Path(storage.root)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another process trains this run; wait for it, or end it") from None
    finally:
        os.close(descriptor)
