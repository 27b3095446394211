"""A corpus's source becomes samples: new keys are appended as new parts, in the source's order; no part ever changes."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine import config, listing, sources
from engine.column_types import known_types, typed_columns
from engine.source_stats import SourceStats
from manifests import retention, sidecars
from manifests.actions import CorpusAdded, PartAdded, SourcesChanged
from manifests.catalog import Catalog
from manifests.errors import ConfigError, SourceError
from manifests.recipe import sha256_hex
from manifests.shards import keys_digest, write_samples
from manifests.storage import put_same

_HASH_THREADS = 8


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
    notes: list[str] = field(default_factory=list)


def ingest(
    catalog: Catalog,
    corpus: str,
    section: config.CorpusConfig,
    *,
    run: str,
    on_new: Callable[[int], None] = lambda new: None,
    on_rows: Callable[[int], None] = lambda done: None,
) -> Ingested:
    """Appends the corpus's new samples as parts; `on_new` is told how many there are, `on_rows` how many are read.

    Raises ConfigError where the source holds nothing, or where seed or part_rows are not those of the corpus.
    """
    known = {row["corpus"]: row for row in catalog.corpora()}.get(corpus)
    if known is not None:
        _check_unchanged(corpus, section, known)
    scan = sources.scan(section)
    parts = catalog.parts(corpus)
    before = {}
    # Not where the corpus is known: a log that was made anew from files without sidecars has parts alone.
    if parts:
        query = "SELECT key, source, size_bytes, sha256 FROM samples WHERE corpus = ?"
        before = {row["key"]: row for row in catalog.sql(query, [corpus]).to_pylist()}
    fresh = [listed for listed in scan.samples if listed.key not in before]
    stats = SourceStats(catalog.workspace_id, corpus)
    document = config.document(section)
    added = CorpusAdded(
        corpus=corpus,
        kind=section.kind,
        source=document["source"],
        seed=section.seed,
        part_rows=section.part_rows,
        config=document,
    )
    if known is None or known["source"] != added.source:
        catalog.commit([added], run=run)
    first_part = parts[-1].part + 1 if parts else 0
    types: dict[str, pa.DataType] = known_types(catalog, corpus)
    forgotten = retention.forgotten_bytes(catalog)
    done = new_parts = 0
    if fresh:
        on_new(len(fresh))
    for chunk in _chunks(fresh, scan, section, forgotten):
        part = _write_part(catalog, corpus, scan, chunk, first_part + new_parts, types)
        catalog.storage.put(sidecars.path_of(part), sidecars.of_part(part, added))
        catalog.commit([part], run=run)
        new_parts += 1
        done += len(chunk)
        if section.kind == "image":
            for listed, sha256 in chunk:
                stats.put(listed, sha256)
        on_rows(done)
    notes = list(scan.notes)
    if refused := len(fresh) - done:
        on_rows(len(fresh))
        # Without their names: what a run tells is kept in the workspace.
        notes.append(
            f"{refused:,} samples are left out: their source bytes were forgotten and are never taken in again"
        )
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
        notes=notes,
    )


def root_of(catalog: Catalog, corpus: str, section: config.CorpusConfig) -> str:
    """Where the source of a corpus that was ingested before is. Raises ConfigError where it never was."""
    if not catalog.parts(corpus):
        raise ConfigError(f"corpora.{corpus} was never ingested; run without --only, or with --only ingest first")
    return listing.list_source(section.source, listing.Notes()).root


def _check_unchanged(corpus: str, section: config.CorpusConfig, known: Mapping[str, Any]) -> None:
    for name in ("seed", "part_rows", "kind"):
        if getattr(section, name) != known[name]:
            raise ConfigError(
                f"corpora.{corpus}.{name} is {getattr(section, name)!r}, but the corpus was made with {known[name]!r}, "
                "which cannot change; put it back, or give the corpus another name"
            )


def _chunks(
    fresh: Sequence[sources.Listed], scan: sources.Scan, section: config.CorpusConfig, forgotten: Collection[str]
) -> Iterator[list[tuple[sources.Listed, bytes]]]:
    """The samples of one new part after the other, with the sha256 of their sources; none whose bytes were forgotten."""
    stream = iter(fresh)
    waiting: list[tuple[sources.Listed, bytes]] = []
    while block := list(islice(stream, section.part_rows)):
        hashed = zip(block, _hashes(scan, block, section), strict=True)
        waiting += [(listed, sha256) for listed, sha256 in hashed if sha256.hex() not in forgotten]
        if len(waiting) >= section.part_rows:
            yield waiting[: section.part_rows]
            waiting = waiting[section.part_rows :]
    if waiting:
        yield waiting


def _write_part(
    catalog: Catalog,
    corpus: str,
    scan: sources.Scan,
    chunk: Sequence[tuple[sources.Listed, bytes]],
    part: int,
    types: dict[str, pa.DataType],
) -> PartAdded:
    columns = [scan.columns(listed) for listed, _ in chunk]
    rows = [
        {
            "corpus": corpus,
            "part": part,
            "row": row,
            "key": listed.key,
            "source": listed.source,
            "size_bytes": listed.size_bytes,
            "sha256": sha256,
        }
        for row, (listed, sha256) in enumerate(chunk)
    ]
    arrays = typed_columns(columns, types)
    for name, array in arrays.items():
        types.setdefault(name, array.type)
        for row, value in zip(rows, array.to_pylist(), strict=True):
            row[name] = value
    data = write_samples(rows, pa.schema([(name, array.type) for name, array in arrays.items()]))
    sha256 = sha256_hex(data)
    path = f"data/{corpus}/_samples/part-{part:07d}-{sha256[:8]}.parquet"
    put_same(catalog.storage, path, data, sha256)
    return PartAdded(
        corpus=corpus,
        part=part,
        rows=len(rows),
        path=path,
        sha256=sha256,
        size_bytes=len(data),
        keys_sha256=keys_digest([listed.key for listed, _ in chunk]),
        source_bytes=sum(listed.size_bytes for listed, _ in chunk),
        key_min=min(listed.key for listed, _ in chunk),
        key_max=max(listed.key for listed, _ in chunk),
    )


def _hashes(scan: sources.Scan, chunk: Sequence[sources.Listed], section: config.CorpusConfig) -> list[bytes]:
    """The sha256 of each sample's source bytes; of no bytes where they cannot be read (the row fails when it is)."""
    if section.kind == "text":
        documents = sources.read_documents(scan.root, [listed.source for listed in chunk], section)
        texts = ["" if isinstance(found, Exception) else str(found.get(section.text) or "") for found in documents]
        return [bytes.fromhex(sha256_hex(text.encode())) for text in texts]

    def hash_one(listed: sources.Listed) -> bytes:
        try:
            return bytes.fromhex(sha256_hex(sources.read_bytes(scan.root, listed.source)))
        except SourceError:
            return bytes.fromhex(sha256_hex(b""))

    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(pool.map(hash_one, chunk))


def _compare(
    scan: sources.Scan, before: Mapping[str, Mapping[str, Any]], stats: SourceStats, section: config.CorpusConfig
) -> tuple[list[str], list[str]]:
    """The keys of samples whose source is gone, and of those whose source is not the one that was ingested.

    Files are hashed again only where size or modification time say so; workers check the hash of all that they read.
    """
    now = {listed.key: listed for listed in scan.samples}
    # A row without a hash is forgotten: nothing that becomes of its source is of interest.
    vanished = [key for key, row in before.items() if key not in now and row["sha256"] is not None]
    changed = []
    for key, row in before.items():
        listed = now.get(key)
        if listed is None or row["sha256"] is None:
            continue
        if listed.size_bytes != row["size_bytes"]:
            changed.append(key)
        elif section.kind == "image" and stats.is_touched(listed):
            sha256 = sha256_hex(sources.read_bytes(scan.root, listed.source))
            stats.put(listed, bytes.fromhex(sha256))
            if sha256 != row["sha256"]:
                changed.append(key)
        elif stats.get(listed) not in (None, row["sha256"]):
            changed.append(key)
    return vanished, changed


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
