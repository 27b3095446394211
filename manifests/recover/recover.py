"""Rebuilds a lost log from the sidecars.

What comes back: corpora, parts, what was forgotten, recipes, shards, tokenizers and snapshots, each file checked by size and
sha256 first. What does not: runs, the times and versions of the old log, and retirements (retired shards are live again,
of recipes that are not current). Of several files of one place (a retry, a forget) the one with the most forgotten rows
wins, then the fewest failed, the fewest not selected, and the newest by the store's clock. A recipe is current if it is
the only one of its modality and form in a corpus; else the next `modmill run` says which is.
"""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from manifests.catalog.catalog import Catalog
from manifests.errors import ModmillError, WorkspaceError
from manifests.formats import snapshots as snapshot_files
from manifests.log import entries as log
from manifests.log.actions import Action, RecipeAdded, RecipeCurrent, RunEnded, RunStarted, TokenizerAdded, to_json
from manifests.log.lease import writer_lease
from manifests.modality import Form
from manifests.recipe import canonical_json, sha256_hex
from manifests.recover.found import (
    FolderListing,
    FoundPart,
    FoundShard,
    check_shard,
    list_folders,
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
            return _Recovery(catalog, run, stood, on_file).all()


def restore_format(storage: Storage) -> None:
    """Makes `_meta/format.json` if it is lost, with the id that the snapshots tell, else a new one."""
    if not storage.exists(paths.FORMAT):
        log.create_workspace(storage, identity=workspace_id(storage))


class _Recovery:
    """Carries out one recovery; holds what came back, and what later steps need of earlier ones."""

    def __init__(self, catalog: Catalog, run: str, stood: set[bytes], on_file: Callable[[int], None]) -> None:
        self._catalog = catalog
        self._storage = catalog.storage
        self._run = run
        self._stood = stood
        self._on_file = on_file
        self._files = 0
        self._waiting: list[Action] = []
        self._recipes: set[str] = set()
        self._found = Recovered()
        # What a tokenizer's own folder may not say: the vocabulary of the tokens that it made, by digest.
        self._vocabularies: dict[str, int] = {}

    def all(self) -> Recovered:
        config = {"workspace": self._catalog.workspace_id}
        started = RunStarted(
            run=self._run,
            kind=_KIND,
            time=log.now(),
            host=socket.gethostname(),
            commit=None,
            versions={},
            config=config,
        )
        self._commit([started])
        with ThreadPoolExecutor(_THREADS) as pool:
            for corpus in self._storage.names(paths.DATA):
                folders = list_folders(self._storage, paths.corpus_folder(corpus))
                samples = folders.pop(paths.samples_folder(corpus), None)
                # The sources that were packed; their parts' sidecars and samples name them.
                folders.pop(paths.source_folder(corpus), None)
                parts = {} if samples is None else self._parts(pool, corpus, samples)
                self._shards(pool, corpus, list(folders.values()), parts)
        self._tokenizers()
        self._snapshots()
        self._found.recipes = len(self._recipes)
        counts = {name: value for name, value in vars(self._found).items() if isinstance(value, int)}
        self._commit([RunEnded(run=self._run, time=log.now(), status="done", counts=counts)])
        self._flush()
        return self._found

    def _commit(self, found: Sequence[Action]) -> None:
        """Takes actions for the next entry of the log, but those that an interrupted recovery committed."""
        self._waiting += (action for action in found if _hash(to_json(action)) not in self._stood)
        if len(self._waiting) >= _BATCH:
            self._flush()

    def _flush(self) -> None:
        for first in range(0, len(self._waiting), _BATCH):
            self._catalog.commit(self._waiting[first : first + _BATCH], run=self._run)
        self._waiting = []

    # -- parts --------------------------------------------------------------------------------------------------------

    def _parts(self, pool: ThreadPoolExecutor, corpus: str, folder: FolderListing) -> dict[int, FoundPart]:
        """Recovers a corpus and its parts; the parts by number."""

        def read(file: StoredFile) -> FoundPart | None:
            return self._taken(file.path, lambda: read_part(self._storage, corpus, folder, file))

        found = [part for part in pool.map(read, folder.named("part-", ".parquet")) if part is not None]
        # Of two of one part (before and after a forget) the last one stays.
        found.sort(key=lambda part: (part.part.part, len(part.forgotten), part.file.modified, part.file.path))
        chosen = {part.part.part: part for part in found}
        if not chosen:
            return {}
        corpora = [part.sidecar.corpus for part in chosen.values() if part.sidecar.corpus is not None]
        if corpora:
            self._found.corpora += 1
            self._commit([corpora[-1]])
        else:
            self._found.notes.append(
                f"{corpus}: no sidecar tells its configuration; `modmill run FILE` with its pipeline file records it"
            )
        parts = [part.part for part in chosen.values()]
        forgotten = [action for part in chosen.values() for action in part.sidecar.forgotten]
        changes = read_changes(self._storage, corpus, folder)
        dropped = read_dropped(self._storage, corpus, folder)
        self._commit([*parts, *forgotten, *changes, *dropped])
        self._found.parts += len(parts)
        self._found.size_bytes += sum(part.size_bytes for part in parts)
        missing = sorted(set(range(parts[-1].part)) - chosen.keys())
        if missing:
            self._found.notes.append(
                f"{corpus}: part {missing[0]} is missing ({len(missing)} in all): restore its samples file, move "
                f"{paths.LOG} away and recover again; else the next run takes its samples in as a new part"
            )
        return chosen

    def _taken(self, path: str, read: Callable[[], Found]) -> Found | None:
        """Returns what a reader makes of a file, None if it says why that cannot be taken."""
        try:
            return read()
        except (ModmillError, OSError) as error:
            self._found.left_out[path] = str(error)
            return None

    # -- shards -------------------------------------------------------------------------------------------------------

    def _shards(
        self, pool: ThreadPoolExecutor, corpus: str, folders: Sequence[FolderListing], parts: Mapping[int, FoundPart]
    ) -> None:
        """Recovers the shards of a corpus, folder by folder, and says which recipes are current."""
        recipes: dict[tuple[str, Form], list[RecipeCurrent]] = {}
        for folder in folders:
            by_recipe: dict[str, list[FoundShard]] = {}
            for found in self._whole_shards(pool, folder, parts):
                by_recipe.setdefault(found.shard.fingerprint, []).append(found)
            for fingerprint, found in by_recipe.items():
                recipe, shards = found[0].recipe, [each.shard for each in found]
                if fingerprint not in self._recipes:
                    self._recipes.add(fingerprint)
                    self._commit([RecipeAdded(fingerprint=fingerprint, document=recipe)])
                self._commit(shards)
                self._found.shards += len(shards)
                self._found.size_bytes += sum(shard.size_bytes for shard in shards)
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
                self._commit(known)
            else:
                self._found.notes.append(
                    f"{corpus}: {modality} has {len(known)} recipes of {form}s, ambiguous: run your pipeline file, it says "
                    "which is current"
                )

    def _whole_shards(
        self, pool: ThreadPoolExecutor, folder: FolderListing, parts: Mapping[int, FoundPart]
    ) -> Iterator[FoundShard]:
        """Yields the shards of a folder that are what their sidecars say, one of each place."""

        def read(file: StoredFile) -> FoundShard | None:
            return self._taken(file.path, lambda: read_shard(self._storage, folder, file, parts))

        def first_whole(candidates: Sequence[FoundShard]) -> FoundShard | None:
            for found in candidates:
                shard = found.shard
                if self._taken(shard.path, lambda: check_shard(self._storage, shard) or found):  # noqa: B023
                    return found
            return None

        for file in folder.without_sidecar():
            self._found.left_out[file.path] = "it has no sidecar; the next run makes it again"
        places: dict[tuple[Any, ...], list[FoundShard]] = {}
        for found in pool.map(read, folder.named("part-", ".json")):
            if found is not None:
                places.setdefault(found.place, []).append(found)
        ranked = [sorted(candidates, key=lambda found: found.rank) for candidates in places.values()]
        for found in pool.map(first_whole, ranked):
            self._files += 1
            self._on_file(self._files)
            if found is not None:
                yield found

    # -- tokenizers and snapshots -------------------------------------------------------------------------------------

    def _tokenizers(self) -> None:
        """Recovers tokenizers, the newest of a name last, so that it is in use."""
        found: list[tuple[Any, str, TokenizerAdded]] = []
        for path, folder in list_folders(self._storage, paths.TOKENIZERS).items():
            if path == paths.TOKENIZERS:  # The sidecars.
                continue
            read = partial(read_tokenizer, self._storage, folder, self._vocabularies)
            tokenizer = self._taken(path, read)
            if tokenizer is not None:
                found.append((max(file.modified for file in folder.files.values()), path, tokenizer))
        tokenizers = [tokenizer for *_, tokenizer in sorted(found, key=lambda each: each[:2])]
        self._commit(tokenizers)
        self._found.tokenizers = len(tokenizers)
        of_name: dict[str, list[str]] = {}
        for tokenizer in tokenizers:
            of_name.setdefault(tokenizer.name, []).append(tokenizer.path)
        self._found.notes += (
            f"tokenizer {name}: {len(known)} were found; the newest by the store's clock, {known[-1]}, is in use"
            for name, known in of_name.items()
            if len(known) > 1
        )

    def _snapshots(self) -> None:
        for name in snapshot_files.names(self._storage):
            record = self._taken(paths.snapshot(name), partial(read_snapshot, self._storage, name))
            if record is not None:
                self._commit([record])
                self._found.snapshots += 1


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
