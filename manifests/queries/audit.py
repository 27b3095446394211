"""Asks a log for `modmill verify`: every file that it ever named, and whether the index and the checkpoints are what a
replay of the log alone gives.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb

from manifests.catalog import index_checkpoint
from manifests.catalog.catalog import Catalog
from manifests.catalog.index import Index, made_by
from manifests.errors import ShardError
from manifests.log import actions
from manifests.log import entries as log
from manifests.log.actions import CorpusAdded, TokenizerAdded
from manifests.store import paths
from manifests.store.storage import Storage

_TABLES = ("applied", *actions.ACTIONS)
_ENDING = {"part", "current", "tokenizer", "shard"}
_NAMED = """
SELECT path, is_live, ended, is_forgotten FROM (
  SELECT path, end_version IS NULL AS is_live, end_version AS ended, false AS is_forgotten FROM log.shard
  UNION ALL SELECT path, end_version IS NULL, end_version, false FROM log.part
  UNION ALL SELECT pack_path, end_version IS NULL, end_version, false FROM log.part
  UNION ALL SELECT path, path IN (SELECT path FROM state.samples_dropped), NULL, false FROM log.samples_dropped
  UNION ALL SELECT replaces, false, version, true FROM log.samples_dropped WHERE replaces IS NOT NULL
  UNION ALL SELECT path, ended IS NULL, ended, false FROM (
    SELECT path, lead(version) OVER (PARTITION BY corpus ORDER BY version) AS ended FROM log.sources_changed)
  UNION ALL SELECT unnest(files), false, NULL, true FROM log.forgotten
) WHERE starts_with(path, $1)
"""


@dataclass(frozen=True, kw_only=True)
class Named:
    """Holds what the log says of a file. `ended` is the version that it is no longer live since, 0 if that is not known."""

    is_live: bool = False
    ended: int = 0
    is_forgotten: bool = False


def counts(catalog: Catalog) -> dict[str, int]:
    """Returns how many live shards there are, and how many of them are of parts that the log does not know."""
    return catalog.sql(
        "SELECT count(*) AS shards, count(*) FILTER (WHERE p.part IS NULL) AS strays FROM state.shard s "
        "LEFT JOIN state.part p USING (corpus, part)"
    ).to_pylist()[0]


def corpora_with_parts(catalog: Catalog) -> list[str]:
    """Returns every corpus that has parts, also one that the log knows by them alone."""
    return [row["corpus"] for row in catalog.sql("SELECT DISTINCT corpus FROM state.part ORDER BY corpus").to_pylist()]


def corpora(catalog: Catalog) -> dict[str, CorpusAdded]:
    """Returns the record of each corpus."""
    return {found.corpus: found for found in catalog.records(CorpusAdded, "SELECT * FROM state.corpus")}


def tokenizers(catalog: Catalog) -> list[TokenizerAdded]:
    """Returns every tokenizer that the log knows, in use or not, each once."""
    query = "SELECT * FROM log.tokenizer WHERE version <= getvariable('as_of') ORDER BY version"
    return list({found.path: found for found in catalog.records(TokenizerAdded, query)}.values())


def named_files(catalog: Catalog, folder: str) -> dict[str, Named]:
    """Returns the files below a folder that a record of the log names or named, by `paths.stem`.

    A shard, its failed file and its sidecar are live, replaced or forgotten together.
    """
    found: dict[str, Named] = {}
    for path, is_live, ended, is_forgotten in catalog.fetch(_NAMED, [f"{folder}/"])[1]:
        before = found.get(paths.stem(path), Named())
        found[paths.stem(path)] = Named(
            is_live=before.is_live or is_live,
            ended=max(before.ended, ended or 0),
            is_forgotten=before.is_forgotten or is_forgotten,
        )
    return found


def check_index(catalog: Catalog) -> Iterator[tuple[str, str]]:
    """Yields path and problem if the catalog's index or a checkpoint is not what a replay of the log alone gives.

    A checkpoint of another log, or by other code, is passed over by every reader, and here too.
    """
    storage = catalog.storage
    with tempfile.TemporaryDirectory(prefix="modmill-replay-") as scratch:
        replayed = Index(storage, Path(scratch), from_log_alone=True)
        try:
            for table in _TABLES:
                query = _digest(table, f"log.{table}", catalog.version)
                if catalog.fetch(query)[1] != replayed.connection.execute(query).fetchall():
                    yield (
                        paths.LOG,
                        f"the index of this machine holds other rows of {table} than the log; delete it",
                    )
            for version in index_checkpoint.versions(storage):
                if problem := _checkpoint_problem(storage, replayed, version, Path(scratch)):
                    yield (
                        paths.checkpoint(version),
                        f"{problem}; delete the folder: readers replay the log instead",
                    )
        finally:
            replayed.close()


def _checkpoint_problem(storage: Storage, replayed: Index, version: int, scratch: Path) -> str | None:
    try:
        found = index_checkpoint.read(storage, version, made_by())
    except ShardError as error:
        return str(error)
    entry = log.read_entry(storage, version)
    if found is None or entry is None or entry.sha256 != found.sha256:
        return None
    for table in _TABLES:
        file = scratch / f"{version}-{table}.parquet"
        file.write_bytes(found.tables.get(table, b""))
        quoted = str(file).replace("'", "''")
        try:
            rows = replayed.connection.execute(_digest(table, f"read_parquet('{quoted}')", version)).fetchall()
        except duckdb.Error as error:
            return f"its {table}.parquet cannot be read ({error})"
        if rows != replayed.connection.execute(_digest(table, f"log.{table}", version)).fetchall():
            return f"it has other rows of {table} than the log"
        file.unlink()
    return None


def _digest(table: str, source: str, version: int) -> str:
    """Returns a query for how many rows of a table stood at a version, and their hash in whatever order."""
    ended = (
        f"REPLACE (CASE WHEN end_version <= {version} THEN end_version END AS end_version)" if table in _ENDING else ""
    )
    return (
        f"SELECT count(*), bit_xor(hash(t)), sum(hash(t)::UHUGEINT % 1000000007) "
        f"FROM (SELECT * {ended} FROM {source} WHERE version <= {version}) t"
    )
