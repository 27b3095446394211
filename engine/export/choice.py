"""What of a workspace a copy holds: which actions of its log, and so which files."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from engine.export.picked_rows import taken_out
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
from manifests.snapshots import snapshot as snapshots
from manifests.snapshots.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class ExportChoice:
    """What a copy holds: of some corpora, modalities and forms what is current, or one snapshot; all None is everything."""

    corpora: Sequence[str] | None
    modalities: Sequence[str] | None
    form: Form | None
    snapshot: str | None

    @property
    def is_everything(self) -> bool:
        return (self.corpora, self.modalities, self.form, self.snapshot) == (None, None, None, None)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What of the log is copied: shards and parts by path, the rest by name; `kinds` (corpus, modality, form) or None for all.

    `forgotten` are files that hold what was forgotten. `files` and `size_bytes` count shards and parts.
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
    files: int
    size_bytes: int

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
    """What of the source's log is asked for. Raises ConfigError for modalities and snapshots that are not there."""
    if asked.snapshot is not None and (asked.modalities, asked.corpora, asked.form) != (None, None, None):
        raise ConfigError(
            "--snapshot says by itself which corpora and modalities: leave --corpora, --modalities and --form out"
        )
    out = taken_out(source)
    frozen = _frozen(source, asked, out.files)
    corpora = [row["corpus"] for row in source.corpora() if asked.corpora is None or row["corpus"] in asked.corpora]
    shards: dict[str, int] = {}
    kinds: set[tuple[str, str, str]] = set()
    recipes: set[str] = set()
    runs: set[str] = set()
    parts = source.sql("SELECT p.*, t.run FROM parts p JOIN timeline t USING (version)").to_pylist()
    if asked.snapshot is None:
        for row in _live_shards(source, asked, corpora):
            shards[row["path"]] = row["size_bytes"]
            kinds.add((row["corpus"], row["modality"], row["form"]))
            recipes.add(row["recipe"])
            runs.add(row["run"])
        parts = [part for part in parts if part["corpus"] in corpora]
    else:
        kept = {(part.corpus, part.part) for snapshot in frozen for part in snapshot.parts}
        corpora = sorted({corpus for corpus, _ in kept})
        parts = [part for part in parts if (part["corpus"], part["part"]) in kept]
    for snapshot in frozen:
        for shard in snapshot.shards:
            shards[shard.path] = shard.size_bytes
            kinds.add((shard.corpus, shard.modality, "token"))
            recipes.add(shard.fingerprint[:12])
    if asked.snapshot is None:
        recipes |= {
            recipe.fingerprint[:12]
            for corpus in corpora
            for (modality, form), recipe in source.current_recipes(corpus).items()
            if asked.is_everything or (corpus, modality, form) in kinds
        }
    runs |= {part["run"] for part in parts}
    known, tokenizers = _lineage(source, recipes)
    if asked.is_everything:
        tokenizers |= {(tokenizer.name, tokenizer.digest) for tokenizer in source.tokenizers()}
    return Chosen(
        corpora=corpora,
        shards=shards.keys(),
        parts={part["path"] for part in parts},
        kinds=None if asked.is_everything else kinds,
        recipes=known,
        tokenizers=tokenizers,
        snapshots={snapshot.name for snapshot in frozen},
        runs=None if asked.is_everything else runs,
        forgotten=out.files,
        files=len(shards) + len(parts),
        size_bytes=sum(shards.values()) + sum(part["size_bytes"] for part in parts),
    )


def _live_shards(source: Catalog, asked: ExportChoice, corpora: Sequence[str]) -> list[dict[str, Any]]:
    """The live shards asked for: all of them, of every recipe, for a copy of everything, else the current ones."""
    rows = source.sql(
        "SELECT path, size_bytes, corpus, modality, form, recipe, run FROM shards "
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


def _frozen(source: Catalog, asked: ExportChoice, forgotten: frozenset[str]) -> list[Snapshot]:
    """The snapshots to copy: the one that is named, all for a copy of everything; none that holds what was forgotten."""
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
    recorded_there = {row["snapshot"] for row in source.snapshots().to_pylist()}
    every = [
        snapshots.read(storage, name, even_replaced=True) for name in snapshots.names(storage) if name in recorded_there
    ]
    return [one for one in every if forgotten.isdisjoint(shard.path for shard in one.shards)]


def _lineage(source: Catalog, prefixes: Collection[str]) -> tuple[set[str], set[tuple[str, str]]]:
    """Fingerprints of recipes and of all they are made from, and name and digest of the tokenizers among them."""
    known = {
        row["fingerprint"]: row
        for row in source.sql("SELECT fingerprint, recipe, form, parameters, weights, inputs FROM recipes").to_pylist()
    }
    found: set[str] = set()
    waiting = [fingerprint for fingerprint, row in known.items() if row["recipe"] in prefixes]
    while waiting:
        fingerprint = waiting.pop()
        if fingerprint not in found:
            found.add(fingerprint)
            waiting += [
                made_from for made_from in json.loads(known[fingerprint]["inputs"]).values() if made_from in known
            ]
    of_tokens = [known[fingerprint] for fingerprint in found if known[fingerprint]["form"] == "token"]
    return found, {(json.loads(row["parameters"]).get("tokenizer"), row["weights"]) for row in of_tokens}
