"""Copies a workspace, or a part of it, to another store: a workspace of its own.

The source's log is read entry by entry: the files that an entry's actions name are copied, each checked against its
sha256 on the way, and then the actions are committed to the copy's log under their own run. So the copy is a whole
workspace at any moment. After a kill it goes on with the first missing entry, and the same command brings what the source
has gained since. Files that no version in use needs stay behind, and so does all that was forgotten.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, cast

from engine.export.choice import Chosen, ExportChoice, choose
from engine.export.tokenizers import TokenizerFolder
from engine.progress.progress import Progress
from engine.progress.record import recorded
from manifests import units
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, ShardError, WorkspaceError
from manifests.formats import sidecars
from manifests.formats import snapshots as snapshot_files
from manifests.log import actions
from manifests.log import entries as log
from manifests.log.actions import (
    Action,
    PartAdded,
    RunStarted,
    SamplesDropped,
    ShardAdded,
    SnapshotAdded,
    SourcesChanged,
    TokenizerAdded,
)
from manifests.recipe import canonical_json, sha256_hex
from manifests.store import paths
from manifests.store.storage import Storage, put_same

_THREADS = 4
_AHEAD = 32  # entries whose files are being copied while earlier ones are committed
_RESTORE = "restore it from a copy; see `modmill verify`"


@dataclass
class Copied:
    """Counts what a copy did: files copied, files that stood already, log entries; shards whose sidecar is missing."""

    files: int = 0
    size_bytes: int = 0
    stood: int = 0
    entries: int = 0
    without_sidecar: list[str] = field(default_factory=list)


def copy_workspace(source: Catalog, target: Storage, asked: ExportChoice, *, quiet: bool = False) -> Copied:
    """Copies what is asked for to `target`, which is empty or an earlier copy of the same workspace.

    Raises ConfigError for what is missing in the source and if the target holds anything else, ShardError if a file is not
    the one that was committed.
    """
    choice = choose(source, asked)
    _check_target(source, target)
    log.create_workspace(target)
    config = {
        "workspace": source.workspace_id,
        "version": source.version,
        "corpora": asked.corpora,
        "modalities": asked.modalities,
        "form": asked.form,
        "snapshot": asked.snapshot,
    }
    with recorded(target, "export", config, quiet=quiet) as execution:
        copy = _Copy(source, execution.catalog, choice, execution.progress)
        copy.run()
        execution.done.add("files", copy.copied.files)
        if copy.copied.without_sidecar:
            execution.progress.say(f"{len(copy.copied.without_sidecar):,} shards of the source have no sidecar to copy")
    return copy.copied


def _check_target(source: Catalog, target: Storage) -> None:
    if not target.exists(paths.FORMAT):
        if names := target.names(""):
            raise ConfigError(f"{target.uri} is no workspace and not empty ({names[0]}, ...); copy to a new folder")
        return
    first = log.read_entry(target, 1)
    if first is None:
        return
    begun = actions.from_json(first.actions[0]) if first.actions else None
    if not (
        isinstance(begun, RunStarted)
        and begun.kind == "export"
        and begun.config.get("workspace") == source.workspace_id
    ):
        raise ConfigError(f"{target.uri} is a workspace, but no copy of {source.storage.uri}; copy to a new folder")


class _Copy:
    """Copies what is chosen of the source's log, up to the version it was opened at, into the target's."""

    def __init__(self, source: Catalog, target: Catalog, choice: Chosen, progress: Progress) -> None:
        self.copied = Copied()
        self._source, self._target = source, target
        self._choice = choice
        self._progress = progress
        self._done = 0
        self._stood: Counter[bytes] = Counter()
        # A shard that was made again may have the bytes it had: two records, one file.
        self._begun: set[str] = set()

    def run(self) -> None:
        self._progress.stage("copy", len(self._choice.shards) + len(self._choice.parts), "files")
        for entry in log.entries(self._target.storage):
            self._stood.update(_identity(action) for action in _actions(self._target.storage, entry))
        waiting: deque[tuple[str, list[Action], list[Future[list[int | None]]]]] = deque()
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                for run, wanted in self._entries():
                    waiting.append((run, wanted, [pool.submit(self._copy_files, action) for action in wanted]))
                    if len(waiting) == _AHEAD:
                        self._commit(*waiting.popleft())
                while waiting:
                    self._commit(*waiting.popleft())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _entries(self) -> Iterator[tuple[str, list[Action]]]:
        """Yields the run of each entry of the source, with its chosen actions that are not in the target yet."""
        done = 0
        for entry in log.entries(self._source.storage):
            if entry.version > self._source.version:
                return
            wanted = []
            for action in _actions(self._source.storage, entry):
                if not self._choice.holds(action):
                    continue
                identity = _identity(action)
                if self._stood[identity]:
                    self._stood[identity] -= 1
                    done += isinstance(action, ShardAdded | PartAdded)
                else:
                    wanted.append(action)
            self._progress.update("copy", done, item="before")
            if wanted:
                yield entry.run, wanted

    def _commit(self, run: str, wanted: list[Action], futures: Sequence[Future[list[int | None]]]) -> None:
        for action, future in zip(wanted, futures, strict=True):
            for size_bytes in future.result():
                self.copied.stood += size_bytes is None
                self.copied.files += size_bytes is not None
                self.copied.size_bytes += size_bytes or 0
            self._done += isinstance(action, ShardAdded | PartAdded)
        self._target.commit(wanted, run=run)
        self.copied.entries += 1
        self._progress.update("copy", self._done, item="now", note=units.size(self.copied.size_bytes))

    def _copy_files(self, action: Action) -> list[int | None]:
        """Copies the files that an action names; returns what `_copy_file` returns for each."""
        files: list[tuple[str | None, str | None]] = []
        match action:
            case ShardAdded():
                files = [(action.path, action.sha256), (action.failed_path, action.failed_sha256)]
            case PartAdded():
                files = [(action.path, action.sha256), (action.pack_path, action.pack_sha256)]
            case SourcesChanged() | SamplesDropped():
                files = [(action.path, None)]
            case TokenizerAdded():
                found = TokenizerFolder(path=action.path, digest=action.digest).read(self._source.storage)
                files = [(f"{action.path}/{name}", sha256_hex(data)) for name, data in found.items()]
            case SnapshotAdded():
                # SHA256SUMS is written last: without it there is no snapshot. All were checked against it when chosen.
                names = self._source.storage.names(action.path)
                names.sort(key=lambda name: name == snapshot_files.SUMS)
                files = [(f"{action.path}/{name}", None) for name in names]
            case _:
                pass
        if isinstance(action, sidecars.Described) and self._has_sidecar(action):
            files.append((sidecars.path_of(action), None))
        wanted = {path: sha256 for path, sha256 in files if path is not None and path not in self._begun}
        self._begun.update(wanted)
        return [self._copy_file(path, sha256) for path, sha256 in wanted.items()]

    def _has_sidecar(self, described: sidecars.Described) -> bool:
        """Tells whether a file has a sidecar. Raises ShardError if that describes another file."""
        storage = self._source.storage
        try:
            has_sidecar = sidecars.check(storage, described)
        except ShardError as error:
            raise ShardError(f"{storage.location(sidecars.path_of(described))}: {error}; {_RESTORE}") from error
        if not has_sidecar and isinstance(described, ShardAdded):
            self.copied.without_sidecar.append(described.path)
        return has_sidecar

    def _read(self, path: str) -> bytes:
        try:
            return self._source.storage.read(path)
        except FileNotFoundError:
            raise ShardError(f"{self._source.storage.location(path)} is missing; {_RESTORE}") from None

    def _copy_file(self, path: str, sha256: str | None) -> int | None:
        """Copies one file; returns its size in bytes, None if it stood in the target already.

        Raises ShardError if it is not of that sha256, at either end. With None the target's must be as the source's.
        """
        source, target = self._source.storage, self._target.storage
        sha256 = sha256 or sha256_hex(self._read(path))
        try:
            with source.open(path) as file:
                checked = cast(IO[bytes], _Checked(file, sha256, source.location(path)))
                is_new = put_same(target, path, checked, sha256, remedy="delete it and copy again")
            return source.size(path) if is_new else None
        except FileNotFoundError:
            raise ShardError(f"{source.location(path)} is missing; {_RESTORE}") from None


class _Checked:
    """Reads a file as a stream, and raises ShardError at its end if its sha256 is not the one expected.

    The writer creates whole files or none, so it never creates a wrong one.
    """

    def __init__(self, file: IO[bytes], sha256: str, location: str) -> None:
        self._file = file
        self._sha256 = sha256
        self._location = location
        self._digest = hashlib.sha256()

    def seek(self, offset: int) -> int:
        """Goes to the start, which is all that a writer needs."""
        self._digest = hashlib.sha256()
        return self._file.seek(offset)

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        if not data and self._digest.hexdigest() != self._sha256:
            raise ShardError(
                f"{self._location} has sha256 {self._digest.hexdigest()[:12]}, the log says {self._sha256[:12]}: it was "
                f"altered or truncated; {_RESTORE}"
            )
        return data


def _actions(storage: Storage, entry: log.Entry) -> Iterator[Action]:
    for document in entry.actions:
        action = actions.from_json(document)
        if action is None:
            raise WorkspaceError(
                f"{storage.location(paths.log_entry(entry.version))} has an action {document.get('action')!r} that this "
                "modmill does not know, so it cannot be copied; install a newer modmill"
            )
        yield action


def _identity(action: Action) -> bytes:
    return hashlib.sha256(canonical_json(actions.to_json(action))).digest()
