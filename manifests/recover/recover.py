"""Rebuilds a lost log from the sidecars.

What comes back: corpora, parts, what was forgotten, recipes, shards, tokenizers and snapshots, each file checked by size and
sha256 first. What does not: runs, the times and versions of the old log, and retirements (retired shards are live again,
of recipes that are not current). Of several files of one place (a retry, a forget) the one with the most forgotten rows
wins, then the fewest failed, the fewest not selected, and the newest by the store's clock. A recipe is current if it is
the only one of its modality and form in a corpus; else the next `modmill run` says which is.
"""

import posixpath
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from manifests.catalog.catalog import Catalog
from manifests.errors import ModmillError, WorkspaceError
from manifests.formats import snapshots as snapshot_files
from manifests.log import entries as log
from manifests.log.actions import (
    Action,
    RecipeAdded,
    RecipeCurrent,
    RunEnded,
    RunStarted,
    SnapshotAdded,
    TokenizerAdded,
    to_json,
)
from manifests.log.lease import writer_lease
from manifests.modality import Form
from manifests.recipe import canonical_json, sha256_hex
from manifests.recover.found import (
    Folder,
    FoundPart,
    FoundShard,
    checked_shard,
    list_folders,
    named,
    read_changes,
    read_dropped,
    read_part,
    read_shard,
    read_snapshot,
    read_tokenizer,
    workspace_id,
)
from manifests.store import paths
from manifests.store.storage import Storage, StoredFile

_BATCH = 1000
_THREADS = 8
_KIND = "recover"
Found = TypeVar("Found")


@dataclass(kw_only=True)
class Recovered:
    """Counts what came back; `left_out` are files that stand but could not be taken, path to why; `notes` what to do next."""

    corpora: int = 0
    parts: int = 0
    recipes: int = 0
    tokenizers: int = 0
    shards: int = 0
    snapshots: int = 0
    size_bytes: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def is_lost(storage: Storage) -> bool:
    """Tells whether a workspace has files but no log, or one that an interrupted recovery began."""
    return not storage.names(paths.LOG) or _is_unfinished(storage)


def recover(storage: Storage, on_file: Callable[[int], None] = lambda done: None) -> Recovered:
    """Rebuilds the log; `on_file` is told how many files of data were read.

    What an interrupted one committed is not committed again. Raises WorkspaceError if a log stands, if
    nothing is there to rebuild one from, and if another writer holds the workspace.
    """
    if not is_lost(storage):
        raise WorkspaceError(
            f"{storage.uri} has a log ({paths.LOG}), which knows more than the files do; if it is damaged, restore "
            f"it from a copy, or move the folder {paths.LOG} to another place and give this command again"
        )
    if not storage.names(paths.DATA):
        raise WorkspaceError(f"{storage.uri} has no folder data: there is nothing to make a log of")
    restore_format(storage)
    run = log.run_name(_KIND)
    with writer_lease(storage, run) as lease:
        stood = {_hash(document) for entry in log.entries(storage) for document in entry.actions}
        with Catalog(storage, lease=lease) as catalog:
            recovery = _Recovery(storage, on_file)
            found = recovery.actions(run, catalog.workspace_id)
            new = (action for action in found if _hash(to_json(action)) not in stood)
            while some := list(islice(new, _BATCH)):
                catalog.commit(some, run=run)
            return recovery.found


def restore_format(storage: Storage) -> None:
    """Makes `_meta/format.json` if it is lost, with the id that the snapshots tell, else a new one."""
    if not storage.exists(paths.FORMAT):
        log.create_workspace(storage, identity=workspace_id(storage))


class _Recovery:
    """Carries out one recovery; holds what came back, and what later steps need of earlier ones."""

    def __init__(self, storage: Storage, on_file: Callable[[int], None]) -> None:
        self.found = Recovered()
        self._storage = storage
        self._on_file = on_file
        self._files = 0
        self._recipes: set[str] = set()
        # What a tokenizer's own folder may not say: the vocabulary of the tokens that it made, by digest.
        self._vocabularies: dict[str, int] = {}

    def actions(self, run: str, workspace: str) -> Iterator[Action]:
        """Yields what the log is to hold, in its order, with the run of the recovery around it."""
        yield RunStarted(
            run=run,
            kind=_KIND,
            time=log.now(),
            host=socket.gethostname(),
            commit=None,
            versions={},
            config={"workspace": workspace},
        )
        with ThreadPoolExecutor(_THREADS) as pool:
            for corpus in self._storage.names(paths.DATA):
                folders = list_folders(self._storage, paths.corpus_folder(corpus))
                samples = folders.pop(paths.samples_folder(corpus), None)
                # The sources that were packed; their parts' sidecars and samples name them.
                folders.pop(paths.source_folder(corpus), None)
                parts = {} if samples is None else self._parts(pool, corpus, samples)
                if samples is not None and parts:
                    yield from self._corpus(corpus, samples, parts)
                yield from self._shards(pool, corpus, list(folders.values()), parts)
        yield from self._tokenizers()
        yield from self._snapshots()
        self.found.recipes = len(self._recipes)
        counts = {name: value for name, value in vars(self.found).items() if isinstance(value, int)}
        yield RunEnded(run=run, time=log.now(), status="done", counts=counts)

    def _taken(self, path: str, read: Callable[..., Found], *arguments: Any) -> Found | None:
        """Returns what a reader makes of a file, None if it says why that cannot be taken."""
        try:
            return read(*arguments)
        except (ModmillError, OSError) as error:
            self.found.left_out[path] = str(error)
            return None

    # -- parts --------------------------------------------------------------------------------------------------------

    def _parts(self, pool: ThreadPoolExecutor, corpus: str, folder: Folder) -> dict[int, FoundPart]:
        """Returns the parts of a corpus by number."""

        def read(file: StoredFile) -> FoundPart | None:
            return self._taken(file.path, read_part, self._storage, corpus, folder, file)

        found = [part for part in pool.map(read, named(folder, "part-", ".parquet")) if part is not None]
        # Of two of one part (before and after a forget) the last one stays.
        found.sort(key=lambda part: (part.part.part, len(part.forgotten), part.file.modified, part.file.path))
        return {part.part.part: part for part in found}

    def _corpus(self, corpus: str, folder: Folder, chosen: Mapping[int, FoundPart]) -> Iterator[Action]:
        """Yields a corpus, its parts, what was forgotten of them, and the lists of changes and dropped samples."""
        corpora = [part.sidecar.corpus for part in chosen.values() if part.sidecar.corpus is not None]
        if corpora:
            self.found.corpora += 1
            yield corpora[-1]
        else:
            self.found.notes.append(
                f"{corpus}: no sidecar tells its configuration; `modmill run FILE` with its pipeline file records it"
            )
        yield from (part.part for part in chosen.values())
        for part in chosen.values():
            yield from part.sidecar.forgotten
        yield from read_changes(self._storage, corpus, folder)
        yield from read_dropped(self._storage, corpus, folder)
        self.found.parts += len(chosen)
        self.found.size_bytes += sum(part.part.size_bytes for part in chosen.values())
        missing = sorted(set(range(max(chosen))) - chosen.keys())
        if missing:
            self.found.notes.append(
                f"{corpus}: part {missing[0]} is missing ({len(missing)} in all): restore its samples file, move "
                f"{paths.LOG} away and recover again; else the next run takes its samples in as a new part"
            )

    # -- shards -------------------------------------------------------------------------------------------------------

    def _shards(
        self, pool: ThreadPoolExecutor, corpus: str, folders: Sequence[Folder], parts: Mapping[int, FoundPart]
    ) -> Iterator[Action]:
        """Yields the shards of a corpus and their recipes, folder by folder, then which recipes are current."""
        recipes: dict[tuple[str, Form], list[RecipeCurrent]] = {}
        for folder in folders:
            by_recipe: dict[str, list[FoundShard]] = {}
            for found in self._whole_shards(pool, folder, parts):
                by_recipe.setdefault(found.shard.fingerprint, []).append(found)
            for fingerprint, found in by_recipe.items():
                recipe, shards = found[0].recipe, [each.shard for each in found]
                if fingerprint not in self._recipes:
                    self._recipes.add(fingerprint)
                    yield RecipeAdded(fingerprint=fingerprint, document=recipe)
                yield from shards
                self.found.shards += len(shards)
                self.found.size_bytes += sum(shard.size_bytes for shard in shards)
                modality, form, vocabulary = shards[0].modality, shards[0].form, shards[0].vocabulary
                crops = max((shard.crop + 1 for shard in shards if shard.crop is not None), default=None)
                current = RecipeCurrent(
                    corpus=corpus, modality=modality, form=form, fingerprint=fingerprint, crops=crops
                )
                recipes.setdefault((modality, form), []).append(current)
                if recipe.get("weights") is not None and vocabulary is not None:
                    self._vocabularies[recipe["weights"]] = vocabulary
        for (modality, form), known in sorted(recipes.items()):
            if len(known) == 1:
                yield known[0]
            else:
                self.found.notes.append(
                    f"{corpus}: {modality} has {len(known)} recipes of {form}s, ambiguous: run your pipeline file, it says "
                    "which is current"
                )

    def _whole_shards(
        self, pool: ThreadPoolExecutor, folder: Folder, parts: Mapping[int, FoundPart]
    ) -> Iterator[FoundShard]:
        """Yields the shards of a folder that are what their sidecars say, one of each place."""

        def read(file: StoredFile) -> FoundShard | None:
            return self._taken(file.path, read_shard, self._storage, folder, file, parts)

        def first_whole(candidates: Sequence[FoundShard]) -> FoundShard | None:
            checked = (self._taken(found.shard.path, checked_shard, self._storage, found) for found in candidates)
            return next((found for found in checked if found is not None), None)

        for file in folder.values():
            if paths.SHARD.match(file.path) and posixpath.basename(paths.sidecar(file.path)) not in folder:
                self.found.left_out[file.path] = "it has no sidecar; the next run makes it again"
        places: dict[tuple[Any, ...], list[FoundShard]] = {}
        for found in pool.map(read, named(folder, "part-", ".json")):
            if found is not None:
                places.setdefault(found.place, []).append(found)
        ranked = [sorted(candidates, key=lambda found: found.rank) for candidates in places.values()]
        for found in pool.map(first_whole, ranked):
            self._files += 1
            self._on_file(self._files)
            if found is not None:
                yield found

    # -- tokenizers and snapshots -------------------------------------------------------------------------------------

    def _tokenizers(self) -> Iterator[TokenizerAdded]:
        """Yields tokenizers, the newest of a name last, so that it is in use."""
        found: list[tuple[Any, str, TokenizerAdded]] = []
        for path, folder in list_folders(self._storage, paths.TOKENIZERS).items():
            if path == paths.TOKENIZERS:  # The sidecars.
                continue
            tokenizer = self._taken(path, read_tokenizer, self._storage, path, folder, self._vocabularies)
            if tokenizer is not None:
                found.append((max(file.modified for file in folder.values()), path, tokenizer))
        tokenizers = [tokenizer for *_, tokenizer in sorted(found, key=lambda each: each[:2])]
        yield from tokenizers
        self.found.tokenizers = len(tokenizers)
        of_name: dict[str, list[str]] = {}
        for tokenizer in tokenizers:
            of_name.setdefault(tokenizer.name, []).append(tokenizer.path)
        self.found.notes += (
            f"tokenizer {name}: {len(known)} were found; the newest by the store's clock, {known[-1]}, is in use"
            for name, known in of_name.items()
            if len(known) > 1
        )

    def _snapshots(self) -> Iterator[SnapshotAdded]:
        for name in snapshot_files.names(self._storage):
            record = self._taken(paths.snapshot(name), read_snapshot, self._storage, name)
            if record is not None:
                yield record
                self.found.snapshots += 1


def _is_unfinished(storage: Storage) -> bool:
    """Tells whether all that stands in the log is a recovery that did not come to its end."""
    first = log.read_entry(storage, 1)
    begun = first.actions[0] if first is not None and first.actions else {}
    if (begun.get("action"), begun.get("kind")) != (RunStarted.action, _KIND):
        return False
    return not any(
        action.get("action") == RunEnded.action for entry in log.entries(storage) for action in entry.actions
    )


def _hash(document: Mapping[str, Any]) -> bytes:
    return bytes.fromhex(sha256_hex(canonical_json(dict(document))))
