"""Finds the files of a workspace that nothing needs any more, and deletes them (`modmill forget --collect`).

Needed are the files of every record that was live at any moment of the retention, and of every snapshot that nothing
replaces. Files with forgotten rows go at once. Files that no record names may be those of a writer at work: they go
after a day.
"""

import datetime
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.progress.record import recorded
from engine.upkeep.forget import clear_caches
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
    needs = _Kept(catalog, retention.version_before(catalog, moment - datetime.timedelta(days=retention_days)))
    found = [*_of_files(catalog.storage, needs, moment), *_checkpoints(catalog.storage)]
    return sorted(found, key=lambda deletion: deletion.path)


def collect(uri: str, *, retention_days: float = RETENTION_DAYS, quiet: bool = False) -> list[Deletion]:
    """Deletes what nothing needs, and returns what was deleted. Raises what `plan` raises."""
    storage = open_storage(uri)
    with recorded(storage, "collect", {"retention_days": retention_days}, quiet=quiet) as execution:
        catalog = execution.catalog
        # A forget that was killed may have left snapshots of files that go now.
        for renewed in successor.renew(catalog, run=execution.done.run):
            execution.progress.say(f"snapshot {renewed.snapshot} is replaced by {renewed.successor}")
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


class _Kept:
    """Tells which files are needed, by `paths.stem`: a shard, its failed file and its sidecar go together."""

    def __init__(self, catalog: Catalog, since: int) -> None:
        ends = retention.ends_of_files(catalog)
        live = {paths.stem(path) for path, end in ends.items() if end is None}
        self._ended = {paths.stem(path): end for path, end in ends.items() if end is not None}
        self.forgotten = {paths.stem(path) for action in retention.forgotten(catalog) for path in action.files} - live
        frozen = {paths.stem(shard.path) for snapshot in successor.standing(catalog) for shard in snapshot.shards}
        recent = {stem for stem, end in self._ended.items() if end > since}
        self._needed = (live | recent | frozen) - self.forgotten

    def why_not(self, stem: str, *, is_old: bool) -> str | None:
        """Returns why a file of this stem is not needed, None if it is or may be. `is_old` tells whether its day is over."""
        if stem in self._needed:
            return None
        if stem in self.forgotten:
            return "holds rows that are forgotten"
        if stem in self._ended:
            return f"replaced or retired at version {self._ended[stem]}"
        return "no record names it" if is_old else None


def _of_files(storage: Storage, needs: _Kept, moment: datetime.datetime) -> Iterator[Deletion]:
    for folder in (paths.DATA, paths.META):
        for file in storage.walk(folder):
            is_old = moment - file.modified > _ORPHANS_AFTER
            if paths.is_temporary(file.path):
                if is_old:
                    yield _deletion(file, "a writer that was killed left it")
            elif (stem := paths.stem(file.path)) != file.path:  # Other files were put there by people: they stay.
                why = needs.why_not(stem, is_old=is_old)
                if why is not None:
                    yield _deletion(file, why)


def _checkpoints(storage: Storage) -> Iterator[Deletion]:
    for version in index_checkpoint.versions(storage)[:-_CHECKPOINTS_KEPT]:
        for file in storage.walk(paths.checkpoint(version)):
            yield _deletion(file, "an old checkpoint of the log")


def _deletion(file: StoredFile, why: str) -> Deletion:
    return Deletion(path=file.path, size_bytes=file.size_bytes, why=why)
