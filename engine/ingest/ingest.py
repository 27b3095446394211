"""Turns a corpus's source into samples: appends new keys as new parts, in the source's order; rows of a part never change."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from engine.ingest.again import read_again
from engine.ingest.filters import OTHER_KIND, Filter, other_kinds
from engine.ingest.intake import Chunk, Intake, reader
from engine.ingest.part import known_types, write_changes, write_part
from engine.ingest.stats import SourceStats
from engine.pipeline import config
from engine.sources import listing
from engine.sources import scan as sources
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError
from manifests.formats import dropped_lists, sidecars
from manifests.log.actions import Action, CorpusAdded
from manifests.queries import retention
from manifests.recipe import sha256_hex


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """Holds what an ingest found: where the corpus is, what is new, gone or altered, and what to tell the user.

    `suffixes` are those of the names of all samples of the corpus; None if its source is gone.
    """

    corpus: str
    root: str
    samples: int
    new: int
    new_parts: int
    vanished: int = 0
    changed: int = 0
    dropped: int = 0
    notes: list[str] = field(default_factory=list)
    suffixes: frozenset[str] | None = None


def ingest(
    catalog: Catalog,
    corpus: str,
    section: config.CorpusConfig,
    *,
    run: str,
    retry: Collection[str] | None = None,
    scan: sources.Scan | None = None,
    on_new: Callable[[int], None] = lambda new: None,
    on_rows: Callable[[int], None] = lambda done: None,
) -> Ingested:
    """Appends the corpus's new samples as parts; `on_new` is told how many there are, `on_rows` how many are read.

    `retry` has the classes of errors with which sources are read once more that could not be read before, empty: any, None:
    no source. `scan` is the source as it was listed before; if it is None, it is listed now.
    Raises ConfigError if the source holds nothing, or if seed or part_rows are not those of the corpus.
    """
    known = check_unchanged(catalog, corpus, section)
    parts = catalog.parts(corpus)
    try:
        scan = scan or sources.scan(section)
    except ConfigError as error:
        if parts and _is_packed(section):
            note = f"its source is not there any more, its {len(parts)} parts are packed: {error}"
            return Ingested(
                corpus=corpus,
                root="",
                samples=sum(part.rows for part in parts),
                new=0,
                new_parts=0,
                notes=[note],
            )
        raise
    added = corpus_added(corpus, section)
    read_now = _read_again(catalog, added, scan, section, retry, run) if parts else []
    # Not `if known`: a log that was rebuilt from files without sidecars has parts alone.
    before = _rows_before(catalog, corpus, with_offsets=not _is_packed(section)) if parts else {}
    dropped = catalog.sql("SELECT key, reason FROM dropped WHERE corpus = ?", [corpus]).to_pylist()
    # What was of no kind that could be read then may be by now.
    left_out = {row["key"] for row in dropped if row["reason"] != OTHER_KIND}
    fresh = [listed for listed in scan.samples if listed.key not in before and listed.key not in left_out]
    stats = SourceStats(catalog.workspace_id, corpus)
    if known is None or known["source"] != added.source:
        catalog.commit([added], run=run)
    told = {row["key"] for row in dropped}
    if others := [row for row in other_kinds(scan.findings) if row["key"] not in told]:
        catalog.commit([dropped_lists.write(catalog.storage, corpus, others)], run=run)
    if fresh:
        on_new(len(fresh))
    new = _New(first_part=parts[-1].part + 1 if parts else 0)
    judge = Filter(section.filter, catalog, corpus)
    with closing(Intake(scan, section, retention.forgotten_bytes(catalog), judge)) as intake:
        for chunk in intake.chunks(fresh):
            _commit(catalog, added, scan, intake, chunk, new, run)
            if section.has_pixels and section.url is None:
                for taken in chunk.rows:
                    stats.put(taken.listed, taken.sha256)
            on_rows(new.rows + new.left_out.total())
        refused = intake.refused
    if refused or new.left_out:
        on_rows(len(fresh))
    vanished, changed = _compare(scan, before, stats, section)
    stats.save(scan.samples)
    if (vanished or changed) and (
        known is None or (known["vanished"], known["changed"]) != (len(vanished), len(changed))
    ):
        catalog.commit([write_changes(catalog, corpus, vanished, changed)], run=run)
    return Ingested(
        corpus=corpus,
        root=scan.root,
        samples=len(before) + new.rows,
        new=new.rows,
        new_parts=new.parts,
        vanished=len(vanished),
        changed=len(changed),
        dropped=new.left_out.total(),
        notes=[*read_now, *scan.notes, *_left_out_notes(new.left_out, refused)],
        suffixes=new.suffixes | listing.suffixes_of(row["source"] for row in before.values() if row["source"]),
    )


def _read_again(
    catalog: Catalog,
    added: CorpusAdded,
    scan: sources.Scan,
    section: config.CorpusConfig,
    retry: Collection[str] | None,
    run: str,
) -> list[str]:
    """Reads what could not be read before, if that is asked for and the corpus keeps bytes; returns a note of it."""
    if retry is None or not _is_packed(section):
        return []
    tried, read = read_again(catalog, added, scan, section, retry, run=run)
    return [f"{read:,} of {tried:,} sources that could not be read are read now"] if tried else []


@dataclass
class _New:
    """Counts the parts and rows that an ingest has committed, and the samples that the filter left out by reason."""

    first_part: int
    parts: int = 0
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    types: dict[str, pa.DataType] | None = None
    suffixes: frozenset[str] = frozenset()


def _commit(
    catalog: Catalog, added: CorpusAdded, scan: sources.Scan, intake: Intake, chunk: Chunk, new: _New, run: str
) -> None:
    """Commits one part and the samples that were dropped on the way to it in one entry."""
    corpus = added.corpus
    records: list[Action] = [dropped_lists.write(catalog.storage, corpus, chunk.dropped)] if chunk.dropped else []
    if chunk.rows:
        if new.types is None:
            new.types = known_types(catalog, corpus)
        part = write_part(catalog, corpus, scan, intake, chunk.rows, new.first_part + new.parts, new.types)
        catalog.storage.put(sidecars.path_of(part), sidecars.of_part(part, added))
        records.append(part)
        new.parts += 1
        new.rows += len(chunk.rows)
        new.suffixes |= listing.suffixes_of(taken.listed.source for taken in chunk.rows)
    catalog.commit(records, run=run)
    new.left_out.update(row["reason"] for row in chunk.dropped)


def corpus_added(corpus: str, section: config.CorpusConfig) -> CorpusAdded:
    """Returns the record of a corpus, as its section of the pipeline file has it, without credentials."""
    document = config.document(section)
    return CorpusAdded(
        corpus=corpus,
        kind=section.kind,
        source=document["source"],
        seed=section.seed,
        part_rows=section.part_rows,
        config=document,
    )


def _left_out_notes(left_out: Counter[str], refused: int) -> list[str]:
    """Tells of the samples that the filter dropped, by reason, and of those that were forgotten before."""
    notes = []
    if left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))
        notes.append(
            f"{left_out.total():,} samples are left out by the filter ({reasons}); the view `dropped` has them"
        )
    if refused:
        # Without their names: what a run tells is kept in the workspace.
        notes.append(
            f"{refused:,} samples are left out: their source bytes were forgotten and are never taken in again"
        )
    return notes


def check_unchanged(catalog: Catalog, corpus: str, section: config.CorpusConfig) -> Mapping[str, Any] | None:
    """Returns the row of `corpora` of a corpus, None if it is new.

    Raises ConfigError if its seed, rows a part or kind are not those that it was made with.
    """
    known = {row["corpus"]: row for row in catalog.corpora()}.get(corpus)
    if known is None:
        return None
    for name in ("seed", "part_rows", "kind"):
        if getattr(section, name) != known[name]:
            raise ConfigError(
                f"corpora.{corpus}.{name} is {getattr(section, name)!r}, but the corpus was made with {known[name]!r}, "
                "which cannot change; put it back, or give the corpus another name"
            )
    return known


def root_of(catalog: Catalog, corpus: str, section: config.CorpusConfig) -> str:
    """Returns where the source of a corpus that was ingested before is. Raises ConfigError if it never was."""
    if not catalog.parts(corpus):
        raise ConfigError(f"corpora.{corpus} was never ingested; run without --only, or with --only ingest first")
    try:
        root = listing.list_source(section.source, listing.Notes(), follow_links=section.follow_links).root
    except ConfigError:
        if _is_packed(section):
            return ""
        raise
    return "" if section.url is not None else root


def _is_packed(section: config.CorpusConfig) -> bool:
    return section.pack or section.url is not None


def _rows_before(catalog: Catalog, corpus: str, *, with_offsets: bool) -> dict[str, dict[str, Any]]:
    """Returns what is known of each sample of the corpus, by key."""
    columns = "key, source, size_bytes, sha256"
    if with_offsets and "source_offset" in catalog.sql("SELECT * FROM samples LIMIT 0").column_names:
        columns += ", source_offset"
    rows = catalog.sql(f"SELECT {columns} FROM samples WHERE corpus = ?", [corpus]).to_pylist()
    return {row["key"]: row for row in rows}


def _compare(
    scan: sources.Scan, before: Mapping[str, Mapping[str, Any]], stats: SourceStats, section: config.CorpusConfig
) -> tuple[list[str], list[str]]:
    """Returns the keys of samples whose source is gone, and of those whose source is not the one that was ingested.

    Files are hashed again only if their size or modification time changed; workers check the hash of all that they read.
    """
    now = {listed.key: listed for listed in scan.samples}
    # A row without a hash is forgotten: what becomes of its source does not matter.
    vanished = [key for key, row in before.items() if key not in now and row["sha256"] is not None]
    changed, touched = [], []
    for key, row in before.items():
        listed = now.get(key)
        if listed is None or row["sha256"] is None:
            continue
        if (
            listed.size_bytes not in (None, row["size_bytes"])
            or row.get("source_offset", listed.offset) != listed.offset
        ):
            changed.append(key)
        elif stats.is_touched(listed):
            touched.append(listed)
        elif stats.get(listed) not in (None, row["sha256"]):
            changed.append(key)
    if touched:
        with closing(reader(scan.root, section, touched)) as source:
            for place, listed in enumerate(touched):
                sha256 = sha256_hex(source.read(place) or b"")
                stats.put(listed, bytes.fromhex(sha256))
                if sha256 != before[listed.key]["sha256"]:
                    changed.append(listed.key)
    # In the order of the corpus, whichever way they were found.
    found = set(changed)
    return vanished, [key for key in before if key in found]
