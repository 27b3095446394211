"""Makes views over row-level Parquet files: `failures`, `dropped`, and what kept labels say: records, texts and vectors.

Each is made when a query needs it, over the files that are live then: a list of files is what DuckDB wants, and binding
it costs a look at each of them.
"""

import re
from collections.abc import Sequence

import duckdb

from manifests.catalog import samples, snapshot_views
from manifests.modality import MODALITIES, Modality
from manifests.store.storage import Storage

MODALITY_OF_VIEW = {
    "boxes": "boxes",
    "instances": "instances",
    "captions": "caption",
    "palettes": "palette",
    "metadata": "metadata",
    "persons": "poses",
    **{name: name for name, modality in MODALITIES.items() if modality.kind == "vector"},
}
CONTENT_VIEWS = ("samples", "failures", "dropped", *MODALITY_OF_VIEW, *snapshot_views.VIEWS)

_SQL_TYPES = {
    "string": "VARCHAR",
    "float32": "FLOAT",
    "int32": "INTEGER",
    "uint8": "UTINYINT",
    "list<uint32>": "UINTEGER[]",
    "list<float32>": "FLOAT[]",
}
_FAILURES = (
    "corpus VARCHAR, part INTEGER, row INTEGER, key VARCHAR, modality VARCHAR, form VARCHAR, crop INTEGER, "
    "stage VARCHAR, class VARCHAR, message VARCHAR"
)
_DROPPED = (
    "corpus VARCHAR, key VARCHAR, source VARCHAR, size_bytes BIGINT, sha256 VARCHAR, reason VARCHAR, message VARCHAR"
)
_DROPPED_FILES = "SELECT DISTINCT path FROM state.samples_dropped ORDER BY path"
_FAILED_FILES = (
    "SELECT failed_path FROM shards WHERE is_current AND failed_path IS NOT NULL "
    "ORDER BY corpus, part, modality, form, crop"
)
_PLAIN = {"failures": (_FAILED_FILES, _FAILURES), "dropped": (_DROPPED_FILES, _DROPPED)}
_KEPT = "is_current AND form = 'label' AND format = 'parquet'"


def views_named(connection: duckdb.DuckDBPyConnection, query: str) -> list[str]:
    """Returns the content views whose names stand in a query, or that a macro named there needs, and then such macros."""
    words = set(re.findall(r"[a-z0-9_]+", query.lower()))
    needed = words.union(*(needs for name, needs in snapshot_views.NEEDS.items() if name in words))
    return [name for name in (*all_views(connection), *snapshot_views.NEEDS) if name in needed]


def all_views(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Returns the content views: those of docs/manifest.md, and one a modality of the user's own that is kept as Parquet."""
    kept = connection.execute(
        f"SELECT DISTINCT modality FROM shards WHERE {_KEPT} AND modality NOT IN "
        "(SELECT view_name FROM duckdb_views() WHERE NOT internal AND database_name <> 'temp') ORDER BY 1"
    ).fetchall()
    known = {*CONTENT_VIEWS, *MODALITIES}
    return [
        *CONTENT_VIEWS,
        *(name for (name,) in kept if name not in known and re.fullmatch(r"[a-z_][a-z0-9_]*", name)),
    ]


def make_view(connection: duckdb.DuckDBPyConnection, storage: Storage, name: str) -> None:
    """Makes a content view (not `samples`) over the files that are live now; an empty one with its columns if none is."""
    if name in (*snapshot_views.VIEWS, *snapshot_views.NEEDS):
        snapshot_views.make(connection, storage, name)
        return
    if name in _PLAIN:
        named, columns = _PLAIN[name]
        files = [storage.location(path) for (path,) in connection.execute(named).fetchall()]
        selected = f"SELECT * FROM {samples.parquet(files)}" if files else samples.empty(columns)
    else:
        selected = _labels(connection, storage, name)
    connection.execute(f"CREATE OR REPLACE TEMP VIEW {samples.quoted(name)} AS {selected}")


def _labels(connection: duckdb.DuckDBPyConnection, storage: Storage, name: str) -> str:
    """Returns a query for what the kept labels of a modality say: a row a record, a text or a vector."""
    modality = MODALITIES.get(MODALITY_OF_VIEW.get(name, name))
    found = connection.execute(
        f"SELECT path, size_bytes, corpus, part, crop FROM shards WHERE {_KEPT} AND modality = ? "
        "ORDER BY corpus, part, crop",
        [MODALITY_OF_VIEW.get(name, name)],
    ).fetchall()
    if not found and modality is not None:
        return samples.empty(_content_columns(modality))
    files = storage.known([path for path, *_ in found], [size for _, size, *_ in found])
    said = [(file, *place) for file, (_, _, *place) in zip(files, found, strict=True)]
    rows = samples.labeled(connection, name, "corpus VARCHAR, part INTEGER, crop INTEGER", said)
    source = f"FROM {rows} WHERE status = 0"
    row = "corpus, part, key" if found[0][4] is None else "corpus, part, key, crop"
    kind = connection.execute(f"DESCRIBE SELECT label FROM {samples.parquet(files[:1])}").fetchall()[0][1]
    if kind == "VARCHAR":
        return f"SELECT {row}, label AS {samples.quoted(modality.name if modality else name)} {source}"
    if not kind.startswith("STRUCT"):
        length = modality.channels if modality else _first_length(connection, files)
        return f"SELECT corpus, part, key, crop, label::{kind.removesuffix('[]')}[{length}] AS embedding {source}"
    record = "unnest(label)" if kind.endswith("[]") else "label"
    selected = f"SELECT {row}, unnest(record) FROM (SELECT {row}, {record} AS record {source})"
    if modality is not None and "x0" in modality.fields:
        selected = f"SELECT *, (x1 - x0) * (y1 - y0) AS area FROM ({selected})"
    return selected


def _first_length(connection: duckdb.DuckDBPyConnection, files: Sequence[str]) -> int:
    """Returns how long the vectors are of a modality that is not in the table; Parquet does not say so."""
    query = f"SELECT len(label) FROM {samples.parquet(files)} WHERE status = 0 LIMIT 1"
    return next((length for (length,) in connection.execute(query).fetchall()), 1)


def _content_columns(modality: Modality) -> str:
    columns = ["corpus VARCHAR", "part INTEGER", "key VARCHAR"]
    if modality.kind == "vector":
        columns += ["crop INTEGER", f"embedding {_SQL_TYPES[modality.dtype]}[{modality.channels}]"]
    if modality.kind == "text":
        columns.append(f"{modality.name} VARCHAR")
    columns += [f"{field} {_SQL_TYPES[kind]}" for field, kind in modality.fields.items()]
    if "x0" in modality.fields:
        columns.append("area FLOAT")
    return ", ".join(columns)
