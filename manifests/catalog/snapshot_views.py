"""Makes views over the tables of snapshots, and macros that look into them, when a query needs them (`content.py`).

A snapshot that the log knows and whose files are gone is passed over.
"""

import duckdb

from manifests.catalog import samples
from manifests.store.storage import Storage

# By view: the table of a snapshot that it reads, the columns it needs of that, and what it makes of them.
_VIEWS = {
    "snapshot_parts": (
        "parts",
        "corpus VARCHAR, part INTEGER, rows INTEGER, selected BLOB, held_out BLOB",
        "corpus, part, rows, bit_count(selected::BIT)::INTEGER AS selected, bit_count(held_out::BIT)::INTEGER AS held_out, "
        "selected AS selected_bits, held_out AS held_out_bits",
    ),
    "snapshot_shards": (
        "shards",
        "corpus VARCHAR, part INTEGER, modality VARCHAR, crop INTEGER, fingerprint VARCHAR, path VARCHAR, sha256 VARCHAR, "
        "size_bytes BIGINT",
        "corpus, part, modality, crop, left(fingerprint, 12) AS recipe, path, sha256, size_bytes",
    ),
}
# The steps that led to a shard and on from it, in order.
_SHARD_LINEAGE = """
CREATE OR REPLACE TEMP MACRO shard_lineage(shard_path) AS TABLE
WITH RECURSIVE shard AS MATERIALIZED (
  SELECT * FROM log.shard WHERE path = shard_path AND version <= getvariable('as_of') ORDER BY version DESC LIMIT 1
),
above(fingerprint, depth) AS (
  SELECT fingerprint, 0 FROM shard
  UNION ALL
  SELECT f.value, a.depth + 1 FROM above a
  JOIN state.recipe_fact f ON f.fingerprint = a.fingerprint AND f.field LIKE 'inputs.%'
  JOIN state.recipe r ON r.fingerprint = f.value
),
fitted AS (
  SELECT name, digest, any_value(path) AS path, min(version) AS version
  FROM log.tokenizer WHERE version <= getvariable('as_of') GROUP BY name, digest
),
held AS (SELECT DISTINCT snapshot FROM snapshot_shards WHERE path = shard_path),
step AS (
  SELECT 0 AS stage, 0 AS depth, 'source' AS kind, p.corpus AS name, NULL AS modality, NULL::INTEGER AS producer_version,
    lower(hex(p.sha256)) AS digest, NULL AS weights, NULL::JSON AS parameters, c.source AS path, p.version AS version
  FROM state.part p JOIN shard s USING (corpus, part) JOIN state.corpus c USING (corpus)
  UNION ALL
  SELECT 1, -max(a.depth), CASE r.document ->> 'form' WHEN 'label' THEN 'labeler' ELSE 'tokenizer' END,
    r.document ->> 'producer', r.document ->> 'modality', (r.document ->> 'version')::INTEGER, r.fingerprint,
    r.document ->> 'weights', r.document -> 'parameters', any_value(t.path), coalesce(any_value(t.version), r.version)
  FROM above a JOIN state.recipe r USING (fingerprint)
  LEFT JOIN fitted t
    ON t.name = (r.document ->> '$.parameters.tokenizer') AND t.digest = (r.document ->> 'weights')
  GROUP BY r.fingerprint, r.document, r.version
  UNION ALL
  SELECT 2, 0, 'shard', corpus || ' part ' || part || coalesce(' crop ' || crop, ''), modality, NULL, lower(hex(sha256)), NULL,
    NULL, path, version
  FROM shard
  UNION ALL
  SELECT 3, 0, 'snapshot', snapshot, NULL, NULL, lower(hex(n.sha256)), NULL, NULL, n.path, n.version
  FROM state.snapshot n JOIN held USING (snapshot)
),
told AS (
  SELECT s.stage, s.depth, s.kind, s.name, s.modality, s.producer_version, s.digest, s.weights, s.parameters, s.path, v.run,
    v.time
  FROM step s JOIN state.applied v USING (version)
  UNION ALL
  SELECT DISTINCT 4, 0, 'run', u.run, NULL, NULL, NULL, NULL, NULL::JSON, NULL, u.run, u.started_at
  FROM snapshot_uses u JOIN held USING (snapshot), shard s
  WHERE u.corpora IS NULL OR list_contains(u.corpora, s.corpus)
)
SELECT row_number() OVER (ORDER BY stage, depth, time, name)::INTEGER AS step, * EXCLUDE (stage, depth)
FROM told ORDER BY step
"""
# The snapshots that hold a sample, and the runs that trained on them.
_SAMPLE_USES = """
CREATE OR REPLACE TEMP MACRO sample_uses(sample_corpus, sample_key) AS TABLE
SELECT p.snapshot, has_row(p.held_out_bits, k.row) AS held_out, u.run, u.started_at, u.status
FROM (
  SELECT corpus, part, row FROM samples WHERE corpus = sample_corpus AND key = sample_key
  UNION
  SELECT corpus, part, row FROM forgotten WHERE corpus = sample_corpus AND key = sample_key
) k
JOIN snapshot_parts p ON p.corpus = k.corpus AND p.part = k.part AND has_row(p.selected_bits, k.row)
LEFT JOIN snapshot_uses u ON u.snapshot = p.snapshot AND (u.corpora IS NULL OR list_contains(u.corpora, k.corpus))
ORDER BY p.snapshot, u.started_at
"""
_MACROS = {"shard_lineage": _SHARD_LINEAGE, "sample_uses": _SAMPLE_USES}
VIEWS = tuple(_VIEWS)
# What each macro needs that is made on demand too.
NEEDS = {
    "shard_lineage": ("snapshot_shards",),
    "sample_uses": ("samples", "snapshot_parts"),
}


def make(connection: duckdb.DuckDBPyConnection, storage: Storage, name: str) -> None:
    """Makes a view, or a macro when the views that it needs are there."""
    if name in _MACROS:
        connection.execute(_MACROS[name])
        return
    table, columns, made = _VIEWS[name]
    from manifests.formats import snapshots as snapshot_files

    there = set(snapshot_files.names(storage))
    recorded = connection.execute("SELECT snapshot, path FROM state.snapshot ORDER BY snapshot").fetchall()
    files = {storage.location(f"{path}/{table}.parquet"): snapshot for snapshot, path in recorded if snapshot in there}
    if files:
        source = samples.labeled(connection, name, "snapshot VARCHAR", list(files.items()))
    else:
        source = f"({samples.empty(f'snapshot VARCHAR, {columns}')})"
    connection.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT snapshot, {made} FROM {source}")
