"""Chooses what of a workspace a copy holds: which actions of its log, and so which files."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, nearest
from manifests.log.actions import (
    Action,
    CorpusAdded,
    Forgotten,
    PartAdded,
    RecipeAdded,
    RecipeCurrent,
    RunEnded,
    RunStarted,
    SamplesDropped,
    ShardAdded,
    ShardsRetired,
    SnapshotAdded,
    SourcesChanged,
    TokenizerAdded,
)
from manifests.modality import Form
from manifests.queries import retention
from manifests.snapshots import snapshot as snapshots
from manifests.snapshots.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class ExportChoice:
    """Says what is exported: some corpora, modalities and forms, or one snapshot. None stands for all."""

    corpora: Sequence[str] | None = None
    modalities: Sequence[str] | None = None
    form: Form | None = None
    snapshot: str | None = None

    @property
    def is_everything(self) -> bool:
        return (self.corpora, self.modalities, self.form, self.snapshot) == (None, None, None, None)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Holds what of the log is copied: shards and parts by path, the rest by name.

    `kinds` are (corpus, modality, form); they and `runs` are None if all are copied. `forgotten` are files that hold what
    was forgotten.
    """

    corpora: Collection[str]
    shards: Collection[str]
    parts: Collection[str]
    kinds: Collection[tuple[str, str, str]] | None
    recipes: Collection[str]
    tokenizers: Collection[tuple[str, str]]
    snapshots: Collection[str]
    runs: Collection[str] | None
    forgotten: Collection[str]

    def holds(self, action: Action) -> bool:
        """Tells whether an action of the source's log goes into the copy's."""
        match action:
            case ShardAdded():
                return action.path in self.shards
            case PartAdded():
                return action.path in self.parts
            case RecipeAdded():
                return action.fingerprint in self.recipes
            case RecipeCurrent():
                return action.fingerprint in self.recipes and self._has(action.corpus, action.modality, action.form)
            case TokenizerAdded():
                return (action.name, action.digest) in self.tokenizers
            case SnapshotAdded():
                return action.snapshot in self.snapshots
            case RunStarted() | RunEnded():
                return self.runs is None or action.run in self.runs
            case SourcesChanged() | SamplesDropped():
                return action.corpus in self.corpora and action.path not in self.forgotten
            case ShardsRetired():
                return self._has(action.corpus, action.modality, action.form)
            case CorpusAdded() | Forgotten():
                return action.corpus in self.corpora

    def _has(self, corpus: str, modality: str, form: str) -> bool:
        return corpus in self.corpora if self.kinds is None else (corpus, modality, form) in self.kinds


def choose(source: Catalog, asked: ExportChoice) -> Chosen:
    """Returns what of the source's log is asked for. Raises ConfigError for a modality or a snapshot that is missing."""
    if asked.snapshot is not None and (asked.modalities, asked.corpora, asked.form) != (None, None, None):
        raise ConfigError(
            "--snapshot says by itself which corpora and modalities: leave --corpora, --modalities and --form out"
        )
    forgotten = {path for action in retention.forgotten(source) for path in action.files}
    forgotten |= retention.replaced_lists(source)
    frozen = _frozen(source, asked, forgotten)
    frozen_shards = [shard for snapshot in frozen for shard in snapshot.shards]
    parts = source.sql(
        "SELECT p.corpus, p.part, p.path, t.run FROM parts p JOIN timeline t USING (version)"
    ).to_pylist()
    if asked.snapshot is None:
        corpora = [row["corpus"] for row in source.corpora() if asked.corpora is None or row["corpus"] in asked.corpora]
        live = _live_shards(source, asked, corpora)
        parts = [part for part in parts if part["corpus"] in corpora]
    else:
        # The shards of a snapshot need not be live: tokens of a later recipe may have replaced them.
        kept = {(part.corpus, part.part) for snapshot in frozen for part in snapshot.parts}
        corpora = sorted({corpus for corpus, _ in kept})
        live = []
        parts = [part for part in parts if (part["corpus"], part["part"]) in kept]
    kinds = {(row["corpus"], row["modality"], row["form"]) for row in live}
    kinds |= {(shard.corpus, shard.modality, "token") for shard in frozen_shards}
    recipes = {row["recipe"] for row in live} | {shard.fingerprint[:12] for shard in frozen_shards}
    if asked.is_everything:
        # A recipe may be current before it has a shard.
        current = [recipe for corpus in corpora for recipe in source.current_recipes(corpus).values()]
        recipes |= {recipe.fingerprint[:12] for recipe in current}
    needed, tokenizers = _lineage(source, recipes)
    if asked.is_everything:
        tokenizers |= {(tokenizer.name, tokenizer.digest) for tokenizer in source.tokenizers()}
    return Chosen(
        corpora=corpora,
        shards={row["path"] for row in live} | {shard.path for shard in frozen_shards},
        parts={part["path"] for part in parts},
        kinds=None if asked.is_everything else kinds,
        recipes=needed,
        tokenizers=tokenizers,
        snapshots={snapshot.name for snapshot in frozen},
        runs=None if asked.is_everything else {row["run"] for row in (*live, *parts)},
        forgotten=forgotten,
    )


def _live_shards(source: Catalog, asked: ExportChoice, corpora: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the live shards asked for: those of every recipe for a copy of everything, or else the current ones."""
    rows = source.sql(
        "SELECT path, corpus, modality, form, recipe, run FROM shards "
        "WHERE (? OR is_current) AND list_contains(?::VARCHAR[], corpus)",
        [asked.is_everything, list(corpora)],
    ).to_pylist()
    there = {row["modality"] for row in rows}
    for name in asked.modalities or ():
        if name not in there:
            raise ConfigError(f"no shards of a modality {name!r} in {', '.join(corpora)}; {nearest(name, there)}")
    rows = [
        row
        for row in rows
        if (asked.modalities is None or row["modality"] in asked.modalities) and asked.form in (None, row["form"])
    ]
    if not rows and not asked.is_everything:
        raise ConfigError(
            f"no {asked.form or 'live'} shards of that choice in {', '.join(corpora)}; see `modmill status`"
        )
    return rows


def _frozen(source: Catalog, asked: ExportChoice, forgotten: set[str]) -> list[Snapshot]:
    """Returns the snapshots to copy: the one that is named, or all of them for a copy of everything.

    One that holds what was forgotten is not copied; ConfigError is raised if that is the one named.
    """
    storage = source.storage
    if asked.snapshot is not None:
        snapshot = snapshots.read(storage, asked.snapshot)
        if not forgotten.isdisjoint(shard.path for shard in snapshot.shards):
            raise ConfigError(
                f"rows of the snapshot {snapshot.name!r} were forgotten since it was made; copy the one that replaces it"
            )
        return [snapshot]
    if not asked.is_everything:
        return []
    recorded = source.snapshots()["snapshot"].to_pylist()
    every = [snapshots.read(storage, name, even_replaced=True) for name in snapshots.names(storage) if name in recorded]
    return [one for one in every if forgotten.isdisjoint(shard.path for shard in one.shards)]


def _lineage(source: Catalog, prefixes: Collection[str]) -> tuple[set[str], set[tuple[str, str]]]:
    """Returns the fingerprints of recipes and of all that they are made from, and (name, digest) of their tokenizers."""
    known = source.recipes()
    found: set[str] = set()
    waiting = [fingerprint for fingerprint in known if fingerprint[:12] in prefixes]
    while waiting:
        fingerprint = waiting.pop()
        if fingerprint not in found:
            found.add(fingerprint)
            waiting += [made_from for made_from in known[fingerprint]["inputs"].values() if made_from in known]
    of_tokens = [known[fingerprint] for fingerprint in found if known[fingerprint]["form"] == "token"]
    return found, {(recipe["parameters"].get("tokenizer"), recipe["weights"]) for recipe in of_tokens}
