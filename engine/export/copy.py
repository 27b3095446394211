"""Copies a workspace, or a part of it, to another store: a workspace of its own.

The source's log is walked entry by entry: the files that an entry's actions name are copied, each checked against its
sha256 on the way, and then the actions are committed to the copy's log under their own run. So the copy is a whole
workspace at any moment, a killed one goes on with the first entry that is not there, and the same command brings what the
source has since. Files that no version in use needs stay behind, and so does all that was forgotten.
"""

import hashlib
import io
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any, cast

from engine.export.choice import Chosen, ExportChoice, choose
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
from manifests.recipe import canonical_json, sha256_hex, sha256_of_stream
from manifests.store import paths
from manifests.store.storage import Storage

_THREADS = 4
_AHEAD = 32  # entries whose files are being copied while earlier ones are committed
_RESTORE = "restore it from a copy; see `modmill verify`"


@dataclass
class Copied:
    """What a copy did: files copied, files that stood already, log entries; shards whose sidecar the source lacks."""

    files: int = 0
    size_bytes: int = 0
    stood: int = 0
    entries: int = 0
    without_sidecar: list[str] = field(default_factory=list)


def copy_workspace(source: Catalog, target: Storage, asked: ExportChoice, *, quiet: bool = False) -> Copied:
    """Copies what is asked for to `target`, which is empty or an earlier copy of the same workspace.

    Raises ConfigError for what is not there and where anything else stands in the target, ShardError where a file is not
    the one that was committed.
    """
    choice = choose(source, asked)
    _check_target(source, target)
    log.create_workspace(target)
    config = {
        "workspace": source.workspace_id,
        "version": source.version,
        "corpora": None if asked.corpora is None else list(asked.corpora),
        "modalities": None if asked.modalities is None else list(asked.modalities),
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
    """Brings what is chosen of the source's log, up to the version it was opened at, to the target's."""

    def __init__(self, source: Catalog, target: Catalog, choice: Chosen, progress: Progress) -> None:
        self.copied = Copied()
        self._source, self._target = source, target
        self._choice = choice
        self._progress = progress
        self._done = 0
        self._stood: Counter[bytes] = Counter()

    def run(self) -> None:
        self._progress.stage("copy", self._choice.files, "files")
        for entry in log.entries(self._target.storage):
            self._stood.update(_identity(action) for action in _actions(self._target.storage, entry))
        waiting: deque[tuple[str, list[Action], list[Future[list[_CopiedFile]]]]] = deque()
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
        """Yields the entries of the source with what is chosen of them and not in the target yet."""
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

    def _commit(self, run: str, wanted: list[Action], futures: Sequence["Future[list[_CopiedFile]]"]) -> None:
        for action, future in zip(wanted, futures, strict=True):
            for file in future.result():
                self.copied.stood += not file.is_new
                self.copied.files += file.is_new
                self.copied.size_bytes += file.size_bytes * file.is_new
            self._done += isinstance(action, ShardAdded | PartAdded)
        self._target.commit(wanted, run=run)
        self.copied.entries += 1
        self._progress.update("copy", self._done, item="now", note=units.size(self.copied.size_bytes))

    def _copy_files(self, action: Action) -> list["_CopiedFile"]:
        """Copies the files that an action names."""
        match action:
            case ShardAdded():
                files = [self._copy_file(action.path, action.sha256)]
                if action.failed_path is not None and action.failed_sha256 is not None:
                    files.append(self._copy_file(action.failed_path, action.failed_sha256))
                return [*files, *self._copy_sidecar(action)]
            case PartAdded():
                files = [self._copy_file(action.path, action.sha256)]
                if action.pack_path is not None and action.pack_sha256 is not None:
                    files.append(self._copy_file(action.pack_path, action.pack_sha256))
                return [*files, *self._copy_sidecar(action)]
            case SourcesChanged() | SamplesDropped():
                return [self._copy_file(action.path, sha256_hex(self._read(action.path)))]
            case TokenizerAdded():
                return [*self._copy_tokenizer(action), *self._copy_sidecar(action)]
            case SnapshotAdded():
                sums = self._read(f"{action.path}/{snapshot_files.SUMS}")
                names = [name for name in self._source.storage.names(action.path) if name != snapshot_files.SUMS]
                # Written last: without it there is no snapshot. All were checked against it when they were chosen.
                paths = [f"{action.path}/{name}" for name in names]
                files = [self._copy_file(path, sha256_hex(self._read(path))) for path in paths]
                return [*files, self._copy_file(f"{action.path}/{snapshot_files.SUMS}", sha256_hex(sums))]
            case _:
                return []

    def _copy_sidecar(self, described: sidecars.Described) -> list["_CopiedFile"]:
        storage, path = self._source.storage, sidecars.path_of(described)
        try:
            differences = sidecars.differences(sidecars.read(storage, path).of, described)
        except FileNotFoundError:
            if isinstance(described, ShardAdded):
                self.copied.without_sidecar.append(described.path)
            return []
        except ShardError as error:
            raise ShardError(f"{storage.location(path)}: {error}; {_RESTORE}") from error
        if differences:
            raise ShardError(f"{storage.location(path)} is the sidecar of another file; {_RESTORE}")
        return [self._copy_file(path, sha256_hex(self._read(path)))]

    def _copy_tokenizer(self, tokenizer: TokenizerAdded) -> list["_CopiedFile"]:
        storage = self._source.storage
        sums = {name: sha256_hex(self._read(f"{tokenizer.path}/{name}")) for name in storage.names(tokenizer.path)}
        if sha256_hex(canonical_json(sums)) != tokenizer.digest:
            raise ShardError(
                f"{storage.location(tokenizer.path)}: its files are not those that were committed, or are gone; {_RESTORE}"
            )
        return [self._copy_file(f"{tokenizer.path}/{name}", sha256) for name, sha256 in sums.items()]

    def _read(self, path: str) -> bytes:
        try:
            return self._source.storage.read(path)
        except FileNotFoundError:
            raise ShardError(f"{self._source.storage.location(path)} is missing; {_RESTORE}") from None

    def _copy_file(self, path: str, sha256: str) -> "_CopiedFile":
        """Copies one file, unless it stands there. Raises ShardError if either is not of that sha256."""
        source, target = self._source.storage, self._target.storage
        try:
            size_bytes = source.size(path)
            if not target.exists(path):
                with source.open(path) as file:
                    checked = _Checked(file, sha256, source.location(path))
                    if target.put(path, cast(IO[bytes], checked)):
                        return _CopiedFile(is_new=True, size_bytes=size_bytes)
        except FileNotFoundError:
            raise ShardError(f"{source.location(path)} is missing; {_RESTORE}") from None
        with target.open(path) as standing:
            found = sha256_of_stream(standing)
        if found != sha256:
            raise ShardError(
                f"{target.location(path)} stands with sha256 {found[:12]}, expected {sha256[:12]}: it was altered or "
                "truncated; delete it and copy again"
            )
        return _CopiedFile(is_new=False, size_bytes=size_bytes)


@dataclass(frozen=True, kw_only=True)
class _CopiedFile:
    is_new: bool
    size_bytes: int


class _Checked(io.RawIOBase):
    """Reads a file as a stream, and raises ShardError at its end if its sha256 is not the one expected.

    A writer that puts whole files or none thus never puts a wrong one.
    """

    def __init__(self, file: IO[bytes], sha256: str, location: str) -> None:
        self._file = file
        self._sha256 = sha256
        self._location = location
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """To the start, which is all that a writer needs."""
        self._digest = hashlib.sha256()
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._digest.update(data)
        if not data and self._digest.hexdigest() != self._sha256:
            raise ShardError(
                f"{self._location} has sha256 {self._digest.hexdigest()[:12]}, the log says {self._sha256[:12]}: it was "
                f"altered or truncated; {_RESTORE}"
            )
        return len(data)


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
