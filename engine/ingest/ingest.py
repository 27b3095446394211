"""A corpus's source becomes samples: new keys are appended as new parts, in the source's order; no part ever changes."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.ingest.filters import Filter, dropped_table
from engine.ingest.intake import Intake, Taken, reader
from engine.ingest.stats import SourceStats
from engine.ingest.types import known_types, typed_columns
from engine.pipeline import config
from engine.sources import listing
from engine.sources import scan as sources
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError
from manifests.formats import sidecars
from manifests.formats.shards import file_stem, keys_digest, write_samples
from manifests.log.actions import CorpusAdded, PartAdded, SamplesDropped, SourcesChanged
from manifests.queries import retention
from manifests.recipe import sha256_hex
from manifests.store.storage import Storage, put_same

_PLACES = {"source_offset": pa.int64(), "source_pack": pa.string(), "source_error": pa.string()}


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """What an ingest found: where the corpus is, what is new, what is gone or altered, and what to tell the user."""

    corpus: str
    root: str
    samples: int
    new: int
    new_parts: int
    vanished: int = 0
    changed: int = 0
    dropped: int = 0
    notes: list[str] = field(default_factory=list)


def ingest(
    catalog: Catalog,
    corpus: str,
    section: config.CorpusConfig,
    *,
    run: str,
    scan: sources.Scan | None = None,
    on_new: Callable[[int], None] = lambda new: None,
    on_rows: Callable[[int], None] = lambda done: None,
) -> Ingested:
    """Appends the corpus's new samples as parts; `on_new` is told how many there are, `on_rows` how many are read.

    `scan` is the source as it was listed before, None: it is listed now.
    Raises ConfigError where the source holds nothing, or where seed or part_rows are not those of the corpus.
    """
    known = {row["corpus"]: row for row in catalog.corpora()}.get(corpus)
    if known is not None:
        _check_unchanged(corpus, section, known)
    parts = catalog.parts(corpus)
    try:
        scan = scan or sources.scan(section)
    except ConfigError as error:
        if parts and _is_packed(section):
            note = f"its source is not there any more, its {len(parts)} parts are packed: {error}"
            return Ingested(
                corpus=corpus, root="", samples=sum(part.rows for part in parts), new=0, new_parts=0, notes=[note]
            )
        raise
    # Not where the corpus is known: a log that was made anew from files without sidecars has parts alone.
    before = _rows_before(catalog, corpus, with_offsets=not section.pack) if parts else {}
    dropped = set(catalog.sql("SELECT key FROM dropped WHERE corpus = ?", [corpus])["key"].to_pylist())
    fresh = [listed for listed in scan.samples if listed.key not in before and listed.key not in dropped]
    stats = SourceStats(catalog.workspace_id, corpus)
    added = corpus_added(corpus, section)
    if known is None or known["source"] != added.source:
        catalog.commit([added], run=run)
    first_part = parts[-1].part + 1 if parts else 0
    types: dict[str, pa.DataType] = known_types(catalog, corpus)
    done = new_parts = 0
    left_out: Counter[str] = Counter()
    if fresh:
        on_new(len(fresh))
    judge = Filter(section.filter, catalog, corpus)
    with closing(Intake(scan, section, retention.forgotten_bytes(catalog), judge)) as intake:
        for chunk in intake.chunks(fresh):
            records = [_record_dropped(catalog, corpus, chunk.dropped)] if chunk.dropped else []
            left_out.update(row["reason"] for row in chunk.dropped)
            if chunk.rows:
                part = _write_part(catalog, corpus, scan, intake, chunk.rows, first_part + new_parts, types)
                catalog.storage.put(sidecars.path_of(part), sidecars.of_part(part, added))
                catalog.commit([*records, part], run=run)
                new_parts += 1
                done += len(chunk.rows)
            else:
                catalog.commit(records, run=run)
            if section.has_pixels and section.url is None:
                for taken in chunk.rows:
                    stats.put(taken.listed, taken.sha256)
            on_rows(done + left_out.total())
        refused = intake.refused
    if refused or left_out:
        on_rows(len(fresh))
    vanished, changed = _compare(scan, before, stats, section)
    stats.save(scan.samples)
    if (vanished or changed) and (
        known is None or (known["vanished"], known["changed"]) != (len(vanished), len(changed))
    ):
        catalog.commit([_record_changes(catalog, corpus, vanished, changed)], run=run)
    return Ingested(
        corpus=corpus,
        root=scan.root,
        samples=len(before) + done,
        new=done,
        new_parts=new_parts,
        vanished=len(vanished),
        changed=len(changed),
        dropped=left_out.total(),
        notes=[*scan.notes, *_left_out_notes(left_out, refused)],
    )


def corpus_added(corpus: str, section: config.CorpusConfig) -> CorpusAdded:
    """The record of a corpus, as its section of the pipeline file has it, without credentials."""
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
    """What to tell of the samples that the filter dropped, by reason, and of those that were forgotten before."""
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


def root_of(catalog: Catalog, corpus: str, section: config.CorpusConfig) -> str:
    """Where the source of a corpus that was ingested before is. Raises ConfigError where it never was."""
    if not catalog.parts(corpus):
        raise ConfigError(f"corpora.{corpus} was never ingested; run without --only, or with --only ingest first")
    try:
        root = listing.list_source(section.source, listing.Notes()).root
    except ConfigError:
        if _is_packed(section):
            return ""
        raise
    return "" if section.url is not None else root


def _is_packed(section: config.CorpusConfig) -> bool:
    return section.pack or section.url is not None


def _rows_before(catalog: Catalog, corpus: str, *, with_offsets: bool) -> dict[str, dict[str, Any]]:
    """What is known of each sample of the corpus, by key."""
    columns = "key, source, size_bytes, sha256"
    if with_offsets and "source_offset" in catalog.sql("SELECT * FROM samples LIMIT 0").column_names:
        columns += ", source_offset"
    rows = catalog.sql(f"SELECT {columns} FROM samples WHERE corpus = ?", [corpus]).to_pylist()
    return {row["key"]: row for row in rows}


def _check_unchanged(corpus: str, section: config.CorpusConfig, known: Mapping[str, Any]) -> None:
    for name in ("seed", "part_rows", "kind"):
        if getattr(section, name) != known[name]:
            raise ConfigError(
                f"corpora.{corpus}.{name} is {getattr(section, name)!r}, but the corpus was made with {known[name]!r}, "
                "which cannot change; put it back, or give the corpus another name"
            )


def _write_part(
    catalog: Catalog,
    corpus: str,
    scan: sources.Scan,
    intake: Intake,
    chunk: Sequence[Taken],
    part: int,
    types: dict[str, pa.DataType],
) -> PartAdded:
    columns = [scan.columns(taken.listed) for taken in chunk]
    pack_path = pack_sha256 = None
    offsets: Mapping[int, int | None] = {row: taken.listed.offset for row, taken in enumerate(chunk)}
    if intake.packing is not None:
        numbers = {row: taken.number for row, taken in enumerate(chunk) if taken.number is not None}
        offsets = {}
        if numbers:
            pack_path, pack_sha256, offsets = intake.packing.write(catalog.storage, corpus, part, numbers)
    rows: list[dict[str, Any]] = [
        {
            "corpus": corpus,
            "part": part,
            "row": row,
            "key": taken.listed.key,
            "source": taken.listed.source,
            "size_bytes": taken.size_bytes,
            "sha256": taken.sha256,
            "source_offset": offsets.get(row),
            "source_pack": pack_path if taken.number is not None else None,
            "source_error": taken.error,
        }
        for row, taken in enumerate(chunk)
    ]
    places = [(name, kind) for name, kind in _PLACES.items() if any(row[name] is not None for row in rows)]
    arrays = typed_columns(columns, types)
    for name, array in arrays.items():
        types.setdefault(name, array.type)
        for row, value in zip(rows, array.to_pylist(), strict=True):
            row[name] = value
    data = write_samples(rows, pa.schema([*places, *((name, array.type) for name, array in arrays.items())]))
    keys = [taken.listed.key for taken in chunk]
    return replace(
        put_part(catalog.storage, corpus, part, keys, data),
        source_bytes=sum(taken.size_bytes for taken in chunk),
        key_min=min(keys),
        key_max=max(keys),
        pack_path=pack_path,
        pack_sha256=pack_sha256,
    )


def put_part(storage: Storage, corpus: str, part: int, keys: Sequence[str], data: bytes) -> PartAdded:
    """Puts the samples file of a part with these keys into the workspace, and returns its record to be committed."""
    sha256 = sha256_hex(data)
    path = f"data/{corpus}/_samples/{file_stem(part, None, sha256)}.parquet"
    put_same(storage, path, data, sha256)
    return PartAdded(
        corpus=corpus,
        part=part,
        rows=len(keys),
        path=path,
        sha256=sha256,
        size_bytes=len(data),
        keys_sha256=keys_digest(keys),
        source_bytes=0,
    )


def _compare(
    scan: sources.Scan, before: Mapping[str, Mapping[str, Any]], stats: SourceStats, section: config.CorpusConfig
) -> tuple[list[str], list[str]]:
    """The keys of samples whose source is gone, and of those whose source is not the one that was ingested.

    Files are hashed again only where size or modification time say so; workers check the hash of all that they read.
    """
    now = {listed.key: listed for listed in scan.samples}
    # A row without a hash is forgotten: nothing that becomes of its source is of interest.
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


def _record_changes(catalog: Catalog, corpus: str, vanished: Sequence[str], changed: Sequence[str]) -> SourcesChanged:
    table = pa.table(
        {"key": [*vanished, *changed], "change": ["vanished"] * len(vanished) + ["changed"] * len(changed)}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    sha256 = sha256_hex(data)
    path = f"data/{corpus}/_samples/changes-{sha256[:8]}.parquet"
    put_same(catalog.storage, path, data, sha256)
    return SourcesChanged(corpus=corpus, path=path, vanished=len(vanished), changed=len(changed))


def _record_dropped(catalog: Catalog, corpus: str, rows: Sequence[Mapping[str, Any]]) -> SamplesDropped:
    sink = pa.BufferOutputStream()
    pq.write_table(dropped_table(corpus, rows), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    sha256 = sha256_hex(data)
    path = f"data/{corpus}/_samples/dropped-{sha256[:8]}.parquet"
    put_same(catalog.storage, path, data, sha256)
    counts = dict(sorted(Counter(row["reason"] for row in rows).items()))
    return SamplesDropped(corpus=corpus, path=path, rows=len(rows), counts=counts)
