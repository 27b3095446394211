"""A corpus's source becomes samples: new keys are appended as new parts, in the source's order; no part ever changes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine import config, listing, sources
from engine.column_types import known_types, typed_columns
from engine.source_stats import SourceStats
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
    before = {}
    if known is not None:
        query = "SELECT key, source, size_bytes, sha256 FROM samples WHERE corpus = ?"
        before = {row["key"]: row for row in catalog.sql(query, [corpus]).to_pylist()}
    fresh = [listed for listed in scan.samples if listed.key not in before]
    stats = SourceStats(catalog.workspace_id, corpus)
    document = config.document(section)
    if known is None or known["source"] != document["source"]:
        catalog.commit(
            [
                CorpusAdded(
                    corpus=corpus,
                    kind=section.kind,
                    source=document["source"],
                    seed=section.seed,
                    part_rows=section.part_rows,
                    config=document,
                )
            ],
            run=run,
        )
    first_part = len(catalog.parts(corpus))
    types: dict[str, pa.DataType] = known_types(catalog, corpus)
    done = new_parts = 0
    if fresh:
        on_new(len(fresh))
    for chunk in _chunks(fresh, section.part_rows):
        part = _write_part(catalog, corpus, section, scan, chunk, first_part + new_parts, types, stats)
        catalog.commit([part], run=run)
        new_parts += 1
        done += len(chunk)
        on_rows(done)
    vanished, changed = _compare(scan, before, stats, section)
    stats.save(scan.samples)
    if (vanished or changed) and (
        known is None or (known["vanished"], known["changed"]) != (len(vanished), len(changed))
    ):
        catalog.commit([_record_changes(catalog, corpus, vanished, changed)], run=run)
    return Ingested(
        corpus=corpus,
        root=scan.root,
        samples=len(before) + len(fresh),
        new=len(fresh),
        new_parts=new_parts,
        vanished=len(vanished),
        changed=len(changed),
        notes=list(scan.notes),
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


def _chunks(listed: Sequence[sources.Listed], rows: int) -> Iterator[list[sources.Listed]]:
    stream = iter(listed)
    while chunk := list(islice(stream, rows)):
        yield chunk


def _write_part(
    catalog: Catalog,
    corpus: str,
    section: config.CorpusConfig,
    scan: sources.Scan,
    chunk: Sequence[sources.Listed],
    part: int,
    types: dict[str, pa.DataType],
    stats: SourceStats,
) -> PartAdded:
    hashes = _hashes(scan, chunk, section, stats)
    columns = [scan.columns(listed) for listed in chunk]
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
        for row, (listed, sha256) in enumerate(zip(chunk, hashes, strict=True))
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
        keys_sha256=keys_digest([listed.key for listed in chunk]),
        source_bytes=sum(listed.size_bytes for listed in chunk),
    )


def _hashes(
    scan: sources.Scan, chunk: Sequence[sources.Listed], section: config.CorpusConfig, stats: SourceStats
) -> list[bytes]:
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
        hashes = list(pool.map(hash_one, chunk))
    for listed, sha256 in zip(chunk, hashes, strict=True):
        stats.put(listed, sha256)
    return hashes


def _compare(
    scan: sources.Scan, before: Mapping[str, Mapping[str, Any]], stats: SourceStats, section: config.CorpusConfig
) -> tuple[list[str], list[str]]:
    """The keys of samples whose source is gone, and of those whose source is not the one that was ingested.

    Files are hashed again only where size or modification time say so; workers check the hash of all that they read.
    """
    now = {listed.key: listed for listed in scan.samples}
    vanished = [key for key in before if key not in now]
    changed = []
    for key, row in before.items():
        listed = now.get(key)
        if listed is None:
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
