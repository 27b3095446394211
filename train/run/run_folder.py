"""Names the folders of runs, finds the one that a run goes on in, and lets only one process write there."""

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from manifests.errors import ConfigError, ShardError, UserError
from manifests.log.entries import run_name
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
    """Returns the sha256 of all that decides a run's losses, except its length and the place of its snapshots."""
    document = {name: value for name, value in config.document().items() if name not in _FREE}
    for entry, snapshot in zip(document["mixture"], snapshots, strict=True):
        entry["snapshot"] = snapshot.sha256
    return sha256_hex(canonical_json(document))


def new(out: str, config: TrainConfig) -> Storage:
    """Returns the folder of a new run; nothing is created."""
    return open_storage(f"{out}/{run_name(config.name)}")


def to_resume(
    resume: str | None, out: str, config: TrainConfig, wanted: str, say: Callable[[str], None]
) -> Saved | None:
    """Returns the checkpoint to go on from, or None to begin.

    `resume` is None, a folder, or `auto`: the last checkpoint of the newest run in `out` that has the configuration's name
    and the `wanted` identity. Raises ConfigError if there is no checkpoint in the folder.
    """
    if resume is None:
        return None
    if resume != "auto":
        try:
            return checkpoint.find(resume)
        except ShardError as error:
            raise ConfigError(f"--resume {resume}: {error}") from error
    mine = re.compile(f"{re.escape(config.name)}-{_STAMP}")
    for name in filter(mine.fullmatch, reversed(open_storage(out).names(""))):
        saved = checkpoint.latest(open_storage(f"{out}/{name}"), say)
        if saved is not None and saved.document.get("identity") == wanted:
            return saved
    say(f"{config.name}: a new run begins, since none in {out} has this configuration and a checkpoint")
    return None


@contextmanager
def only_writer(storage: Storage) -> Iterator[None]:
    """Locks a run's local folder. Raises UserError if another process holds it."""
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
