"""Finds the files of a workspace that nothing needs any more, and deletes them (`modmill forget --collect`).

Needed are the files of every record that was live at any moment of the retention, and of every snapshot that nothing
replaces. Files with forgotten rows go at once. Files that no record names may be those of a writer at work: they go
after a day.
"""

import datetime
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.progress.record import recorded
from engine.upkeep import dropped
from engine.upkeep.forget import clear_caches
from engine.upkeep.leftovers import Leftover, leftovers
from manifests.catalog import index_checkpoint
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError
from manifests.queries import retention
from manifests.snapshots import successor
from manifests.store import paths
from manifests.store.storage import Storage, StoredFile, open_storage

RETENTION_DAYS = 7.0
_ORPHANS_AFTER = datetime.timedelta(hours=24)
_CHECKPOINTS_KEPT = 2
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """Holds a file that nothing needs, and why."""

    path: str
    size_bytes: int
    why: str


def plan(catalog: Catalog, *, retention_days: float, now: datetime.datetime | None = None) -> list[Deletion]:
    """Returns what a collection deletes, by path; `now` is this moment by default.

    Raises ShardError if a snapshot cannot be read, as it is not known then which files it needs.
    """
    if not retention_days >= 0:
        raise ConfigError(f"--retention {retention_days:g}: expected a number of days from 0 up")
    moment = now or datetime.datetime.now(datetime.UTC)
    since = retention.version_before(catalog, moment - datetime.timedelta(days=retention_days))
    frozen = {paths.stem(shard.path) for snapshot in successor.standing(catalog) for shard in snapshot.shards}
    found = [_deletion(file, "an old checkpoint of the log") for file in _checkpoints(catalog.storage)]
    for left in leftovers(catalog):
        if (why := _why(left, since, frozen, moment)) is not None:
            found.append(_deletion(left.file, why))
    return sorted(found, key=lambda deletion: deletion.path)


def collect(uri: str, *, retention_days: float = RETENTION_DAYS, quiet: bool = False) -> list[Deletion]:
    """Deletes what nothing needs, and returns what was deleted. Raises what `plan` raises."""
    storage = open_storage(uri)
    with recorded(storage, "collect", {"retention_days": retention_days}, quiet=quiet) as execution:
        catalog = execution.catalog
        # A forget that was killed, or of an older modmill, may have left snapshots and lists of what goes now.
        for renewed in successor.renew(catalog, run=execution.done.run):
            execution.progress.say(f"snapshot {renewed.snapshot} is replaced by {renewed.successor}")
        dropped.take_out(execution)
        deletions = plan(catalog, retention_days=retention_days)
        execution.progress.stage("collect", len(deletions), "files")
        with ThreadPoolExecutor(_THREADS) as pool:
            removed = pool.map(storage.remove, (deletion.path for deletion in deletions))
            for done, _ in enumerate(removed, start=1):
                execution.progress.update("collect", done)
        clear_caches(catalog)
        execution.done.add("files_deleted", len(deletions))
        execution.done.add("bytes_deleted", sum(deletion.size_bytes for deletion in deletions))
    return deletions


def _why(left: Leftover, since: int, frozen: Collection[str], moment: datetime.datetime) -> str | None:
    """Returns why a file is not needed, None if it is or may be. `frozen` are the stems of files that snapshots name."""
    is_old = moment - left.file.modified > _ORPHANS_AFTER
    stem = paths.stem(left.file.path)
    if left.is_temporary:
        return "a writer that was killed left it" if is_old else None
    if left.named is not None and left.named.is_forgotten:
        return "holds rows that are forgotten"
    if stem in frozen or stem == left.file.path:  # Files without a stem were put there by people: they stay.
        return None
    if left.named is None:
        return "no record names it" if is_old else None
    return f"replaced or retired at version {left.named.ended}" if left.named.ended <= since else None


def _checkpoints(storage: Storage) -> Iterator[StoredFile]:
    for version in index_checkpoint.versions(storage)[:-_CHECKPOINTS_KEPT]:
        yield from storage.walk(paths.checkpoint(version))


def _deletion(file: StoredFile, why: str) -> Deletion:
    return Deletion(path=file.path, size_bytes=file.size_bytes, why=why)
