"""Takes samples out of a workspace for good, and retires recipes that are superseded (`modmill forget`).

Each part is done by one entry of the log. It records new files, with null rows, for the samples and every live shard of
the part, and names the files that hold the forgotten rows: a collection (`engine/upkeep/collect.py`) deletes those. What
is done is in the log, so the same command goes on where it was killed.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.ingest import stats
from engine.progress.record import Execution, recorded
from engine.upkeep import dropped
from engine.upkeep.receipt import Receipt, expected, make_receipt
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, nearest
from manifests.formats import rewrite, shards
from manifests.locked import locked
from manifests.log.actions import Forgotten, ShardsRetired
from manifests.queries import retention
from manifests.queries.retention import NO_BYTES, DroppedRow, ForgottenRow, RecipeShards
from manifests.recipe import sha256_hex
from manifests.snapshots import successor
from manifests.store.storage import open_storage, read_same

_THREADS = 4
_NAME_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class OptOut:
    """Holds what lines ask for: rows that are still there, rows that were forgotten before, and lines that name nothing.

    `dropped` are the rows of the view `dropped` that lines name, or that have the bytes or the key of one of these rows.
    `names` maps the digest of each line that is neither a corpus/key nor a hash to the rows that it names. The log may
    keep the digest, but not the line; by it a second try knows what the first one forgot.
    """

    rows: list[ForgottenRow]
    earlier: list[ForgottenRow]
    dropped: list[DroppedRow]
    unknown: list[str]
    names: dict[str, list[str]]


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a file that ask for something, each once. Raises ConfigError if there is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--keys {path} cannot be read: {error}; expected a text file, a sample a line") from error
    lines = [line.strip() for line in text.splitlines()]
    asked = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not asked:
        raise ConfigError(
            f"--keys {path} names nothing; expected a line for each sample: corpus/key, sha256, or source"
        )
    return asked


def preview(
    uri: str, lines: Sequence[str], *, ignore_unknown: bool = False
) -> tuple[OptOut, list[tuple[str, str, str]]]:
    """Returns what lines ask for and what `forget` would take for them, as rows of what, item, detail; changes nothing.

    Raises ConfigError as `forget` does.
    """
    with Catalog.open(uri) as catalog:
        asked = _known(catalog, lines, ignore_unknown)
        return asked, expected(catalog, asked.rows, asked.dropped)


def forget(uri: str, lines: Sequence[str], *, ignore_unknown: bool = False, quiet: bool = False) -> Receipt | None:
    """Takes the samples that lines name out of the workspace at `uri`, and all others of the same source bytes.

    A line is `corpus/key`, the sha256 of the source bytes, or the sample's `source` or `url`; it may also name a row of the
    view `dropped`, which goes with all samples of its bytes. Returns None if no line names anything. Raises ConfigError
    with the lines that name nothing, unless `ignore_unknown`; raises ShardError if a file that must be rewritten is not
    the one that was committed.
    """
    with Catalog.open(uri) as catalog:
        asked = _known(catalog, lines, ignore_unknown)
    if not asked.rows and not asked.earlier and not asked.dropped:
        return None
    config = {
        "lines": len(lines),
        "unknown": len(asked.unknown),
        "lines_sha256": sha256_hex("\n".join(lines).encode()),
        "names": asked.names,
    }
    with recorded(open_storage(uri), "forget", config, quiet=quiet) as execution:
        # Resolved again under the writer's lease: a part may have been added since.
        asked = _resolve(execution.catalog, lines)
        _forget_rows(execution, asked.rows)
        dropped.take_out(execution, asked.dropped)
        for renewed in successor.renew(execution.catalog, run=execution.done.run):
            execution.done.add("snapshots_replaced", 1)
            execution.progress.say(
                f"snapshot {renewed.snapshot} is replaced by {renewed.successor}, without {renewed.rows:,} of its rows"
            )
        clear_caches(execution.catalog)
        rows = [*asked.earlier, *asked.rows]
        return make_receipt(execution.catalog, execution.done.run, rows, config, dropped_rows=len(asked.dropped))


def _known(catalog: Catalog, lines: Sequence[str], ignore_unknown: bool) -> OptOut:
    """Returns what lines ask for. Raises ConfigError with those that name nothing, unless `ignore_unknown`."""
    asked = _resolve(catalog, lines)
    if asked.unknown and not ignore_unknown:
        named = "\n".join(f"  {line}" for line in asked.unknown)
        raise ConfigError(
            f"{len(asked.unknown):,} of {len(lines):,} lines name no sample of {catalog.storage.uri}; expected corpus/key, "
            "the sha256 of the source bytes, or the source as `samples` has it; mend them, or pass over them with "
            f"--ignore-unknown:\n{named}"
        )
    return asked


def _resolve(catalog: Catalog, lines: Sequence[str]) -> OptOut:
    found = retention.find_rows(catalog, lines)
    listed = retention.find_dropped(catalog, lines)
    of_bytes: dict[str, list[ForgottenRow]] = {}
    for row in retention.rows_of_bytes(catalog, {row.sha256 for rows in listed.values() for row in rows if row.sha256}):
        of_bytes.setdefault(row.sha256, []).append(row)
    gone: dict[str, list[ForgottenRow]] = {}
    for row in retention.every_forgotten_row(catalog):
        gone.setdefault(f"{row.corpus}/{row.key}", []).append(row)
        gone.setdefault(row.sha256, []).append(row)
    names = _names_of_earlier_runs(catalog)
    asked: dict[ForgottenRow, None] = {}
    earlier: dict[ForgottenRow, None] = {}
    unknown, own_names = [], {}
    for line in lines:
        digest = sha256_hex(line.encode())[:_NAME_DIGITS]
        same = [row.sha256 for row in listed.get(line, ()) if row.sha256 and row.sha256 != NO_BYTES]
        keys = [line, line.lower(), *names.get(digest, ()), *same]
        before = [row for key in dict.fromkeys(keys) for row in gone.get(key, ())]
        now = [*found.get(line, ()), *(row for sha256 in same for row in of_bytes.get(sha256, ()))]
        earlier.update(dict.fromkeys(before))
        asked.update(dict.fromkeys(now))
        if not (now or before or line in listed or digest in names):
            unknown.append(line)
        elif line not in gone:
            rows = dict.fromkeys(f"{row.corpus}/{row.key}" for row in [*before, *now])
            if line not in rows and not re.fullmatch("[0-9a-fA-F]{64}", line):
                own_names[digest] = list(rows)
    asked.update(dict.fromkeys(retention.rows_of_bytes(catalog, [row.sha256 for row in asked])))
    dropped_rows = dict.fromkeys(row for rows in listed.values() for row in rows)
    dropped_rows.update(dict.fromkeys(retention.dropped_of(catalog, [*earlier, *asked])))
    return OptOut(rows=list(asked), earlier=list(earlier), dropped=list(dropped_rows), unknown=unknown, names=own_names)


def _names_of_earlier_runs(catalog: Catalog) -> dict[str, list[str]]:
    rows = catalog.sql("SELECT config FROM runs WHERE kind = 'forget'")
    found: dict[str, list[str]] = {}
    for text in rows["config"].to_pylist():
        found.update(json.loads(text).get("names", {}))
    return found


# -- rows -------------------------------------------------------------------------------------------------------------


def _forget_rows(execution: Execution, rows: Iterable[ForgottenRow]) -> None:
    by_part: dict[tuple[str, int], list[ForgottenRow]] = {}
    for row in sorted(rows, key=lambda row: (row.corpus, row.part, row.row)):
        by_part.setdefault((row.corpus, row.part), []).append(row)
    if not by_part:
        return
    frozen: dict[tuple[str, int], set[str]] = {}
    for snapshot in successor.standing(execution.catalog):
        for shard in snapshot.shards:
            frozen.setdefault((shard.corpus, shard.part), set()).add(shard.path)
    earlier = retention.forgotten(execution.catalog)
    execution.progress.stage("forget", len(by_part), "parts")
    for done, (place, of_part) in enumerate(by_part.items(), start=1):
        before = [action for action in earlier if (action.corpus, action.part) == place]
        _forget_of_part(execution, of_part, before, frozen.get(place, set()))
        execution.done.add("forgotten_rows", len(of_part))
        execution.progress.update("forget", done)


def _forget_of_part(
    execution: Execution, rows: Sequence[ForgottenRow], earlier: Sequence[Forgotten], frozen: set[str]
) -> None:
    """Takes rows out of one part, in one entry of the log. `frozen` are the part's files that snapshots name."""
    catalog, storage = execution.catalog, execution.catalog.storage
    corpus, part, live = retention.part_records(catalog, rows[0].corpus, rows[0].part)
    named_before = {path for action in earlier for path in action.files}
    held = {*retention.files_of_part(catalog, part.corpus, part.part), *frozen} - named_before
    numbers = {row.row for row in rows}
    forgotten = Forgotten(
        corpus=part.corpus,
        part=part.part,
        rows=[row.row for row in rows],
        keys=[row.key for row in rows],
        sources_sha256=[row.sha256 for row in rows],
        files=[path for file in sorted(held) for path in rewrite.files_of(file)],
    )
    samples = shards.read_samples(read_same(storage, part.path, part.sha256))
    dropped.redact_events(
        catalog, execution.done.run, [source for number in numbers if (source := samples[number].source)]
    )
    new_part = rewrite.rewrite_part(storage, part, corpus, forgotten, earlier)
    documents = catalog.recipes()
    with ThreadPoolExecutor(_THREADS) as pool:
        new_shards = list(
            pool.map(lambda shard: rewrite.rewrite_shard(storage, shard, documents[shard.fingerprint], numbers), live)
        )
    catalog.commit([new_part, *new_shards, forgotten], run=execution.done.run)
    execution.done.add("shards_rewritten", len(new_shards))


def clear_caches(catalog: Catalog) -> None:
    """Takes what was forgotten out of this user's caches on this machine."""
    everything = retention.forgotten(catalog)
    held = {path for action in everything for path in action.files}
    of_snapshots = {
        shard.sha256 for snapshot in successor.every(catalog) for shard in snapshot.shards if shard.path in held
    }
    try:
        # Training keeps the tokens of shards on this machine. What is forgotten must not stay there, and only `train` knows
        # where its cache lies.
        from train.data import token_cache
    except ModuleNotFoundError:  # Without the extra nothing was trained on this machine.
        pass
    else:
        token_cache.forget_shards({*retention.sha256_of_shards(catalog, held), *of_snapshots})
    sources: dict[str, set[str]] = {}
    for action in everything:
        sources.setdefault(action.corpus, set()).update(action.sources_sha256)
    for corpus, sources_sha256 in sources.items():
        stats.SourceStats(catalog.workspace_id, corpus).forget(sources_sha256 - {NO_BYTES})
    if everything or retention.replaced_lists(catalog):
        locked.clear(catalog.workspace_id)


# -- recipes ----------------------------------------------------------------------------------------------------------


def retire(
    uri: str, *, recipe: str | None, modality: str | None, corpus: str | None, quiet: bool = False
) -> list[RecipeShards]:
    """Retires the live shards of one recipe (by its first digits), or of all recipes of a modality that are not current.

    Their files stay until they are collected. Raises ConfigError if a current recipe is named, or if nothing is to retire.
    """
    storage = open_storage(uri)
    with Catalog(storage) as catalog:
        _superseded(catalog, recipe, modality, corpus)
    config: Mapping[str, Any] = {"recipe": recipe, "modality": modality, "corpus": corpus}
    with recorded(storage, "retire", config, quiet=quiet) as execution:
        found = _superseded(execution.catalog, recipe, modality, corpus)
        actions = [
            ShardsRetired(
                corpus=each.corpus,
                modality=each.modality,
                form=each.form,
                fingerprint=each.fingerprint,
                reason="superseded",
            )
            for each in found
        ]
        execution.catalog.commit(actions, run=execution.done.run)
        execution.done.add("shards_retired", sum(each.shards for each in found))
    return found


def _superseded(catalog: Catalog, recipe: str | None, modality: str | None, corpus: str | None) -> list[RecipeShards]:
    there = retention.recipe_shards(catalog)
    for option, asked, known in (
        ("--corpus", corpus, {each.corpus for each in there}),
        ("--modality", modality, {each.modality for each in there}),
    ):
        if asked is not None and asked not in known:
            raise ConfigError(f"{option} {asked}: no live shards are of it; {nearest(asked, known)}")
    found = [
        each
        for each in there
        if corpus in (None, each.corpus)
        and modality in (None, each.modality)
        and each.fingerprint.startswith((recipe or "").lower())
    ]
    fingerprints = sorted({each.fingerprint for each in found})
    if recipe is not None and len(fingerprints) != 1:
        begun = f": {', '.join(digits[:16] for digits in fingerprints)}" if fingerprints else ""
        raise ConfigError(
            f"--recipe {recipe}: {len(fingerprints)} recipes with live shards begin so{begun}; the view `shards` has them"
        )
    if recipe is not None and (current := [each for each in found if each.is_current]):
        raise ConfigError(
            f"--recipe {recipe} is the current recipe of {current[0].modality} in {current[0].corpus}, which is in use; "
            "change the pipeline file and run it first, or name another corpus with --corpus"
        )
    found = [each for each in found if not each.is_current]
    if not found:
        raise ConfigError(f"nothing to retire: all live shards of {modality} are of its current recipe")
    return found
