"""Views over row-level Parquet files: `samples`, `failures`, and what kept structured labels say.

Each is made when a query needs it, over the files that are live then: a list of files is what DuckDB wants, and binding
it costs a look at each of them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import duckdb

from manifests.modality import MODALITIES
from manifests.storage import Storage

MODALITY_OF_VIEW = {
    "boxes": "boxes",
    "instances": "instances",
    "captions": "caption",
    "palettes": "palette",
    "metadata": "metadata",
}
CONTENT_VIEWS = ("samples", "failures", *MODALITY_OF_VIEW)

_SQL_TYPES = {
    "string": "VARCHAR",
    "float32": "FLOAT",
    "int32": "INTEGER",
    "uint8": "UTINYINT",
    "list<uint32>": "UINTEGER[]",
}
_NUMBERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "FLOAT", "DOUBLE"}
_FILES = {
    "samples": "SELECT path, corpus, part FROM state.part ORDER BY corpus, part",
    "failures": (
        "SELECT failed_path, corpus, part FROM shards WHERE is_current AND failed_path IS NOT NULL "
        "ORDER BY corpus, part, modality, form, crop"
    ),
}
_EMPTY = {
    "samples": (
        "corpus VARCHAR, part INTEGER, row INTEGER, key VARCHAR, source VARCHAR, size_bytes BIGINT, sha256 VARCHAR"
    ),
    "failures": (
        "corpus VARCHAR, part INTEGER, row INTEGER, key VARCHAR, modality VARCHAR, form VARCHAR, crop INTEGER, "
        "stage VARCHAR, class VARCHAR, message VARCHAR"
    ),
}


def views_named(query: str) -> list[str]:
    """The content views whose names stand in a query."""
    words = set(re.findall(r"[a-z_]+", query.lower()))
    return [name for name in CONTENT_VIEWS if name in words]


def make_view(connection: duckdb.DuckDBPyConnection, storage: Storage, name: str) -> None:
    """Makes a content view over the Parquet files that are live now; an empty one with its columns where none is."""
    found = connection.execute(_FILES.get(name) or _label_files(name)).fetchall()
    files = [(storage.location(path), corpus, part) for path, corpus, part in found]
    if not files:
        selected = _empty(name)
    elif name == "samples":
        by_corpus: dict[str, list[str]] = {}
        for file, corpus, _ in files:
            by_corpus.setdefault(corpus, []).append(file)
        selected = _samples(connection, by_corpus)
    elif name == "failures":
        selected = f"SELECT * FROM {_parquet(file for file, _, _ in files)}"
    else:
        connection.execute(
            f"CREATE OR REPLACE TEMP TABLE file_of_{name} AS "
            "SELECT unnest(?::VARCHAR[]) AS filename, unnest(?::VARCHAR[]) AS corpus, unnest(?::INTEGER[]) AS part",
            [list(column) for column in zip(*files, strict=True)],
        )
        selected = _labels(name, [file for file, _, _ in files])
    connection.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {selected}")


def _label_files(name: str) -> str:
    return (
        "SELECT path, corpus, part FROM shards WHERE is_current AND form = 'label' AND format = 'parquet' "
        f"AND modality = '{MODALITY_OF_VIEW[name]}' ORDER BY corpus, part"
    )


def _parquet(files: Iterable[str], options: str = "") -> str:
    """The table function over these very files: a `[` in a folder's name is no pattern."""
    plain = [re.sub(r"([\[*?])", r"[\1]", file).replace("'", "''") for file in files]
    listed = ", ".join(f"'{file}'" for file in plain)
    return f"read_parquet([{listed}]{options})"


def _samples(connection: duckdb.DuckDBPyConnection, files: Mapping[str, Sequence[str]]) -> str:
    """Samples of all corpora. A source column that corpora type differently is text, unless all have it as numbers."""
    sources = {corpus: _parquet(paths, ", union_by_name = true") for corpus, paths in files.items()}
    # By the name that DuckDB compares (ASCII without case) and the corpus: the name as it stands there, and its type.
    columns: dict[bytes, dict[str, tuple[str, str]]] = {}
    for corpus, source in sources.items() if len(sources) > 1 else ():
        for column, kind, *_ in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall():
            columns.setdefault(column.encode().lower(), {})[corpus] = (column, kind)
    texts: dict[str, list[str]] = {corpus: [] for corpus in sources}
    for found in columns.values():
        kinds = {kind for _, kind in found.values()}
        if len(kinds) > 1 and not kinds <= _NUMBERS:
            for corpus, (column, _) in found.items():
                quoted = '"' + column.replace('"', '""') + '"'
                texts[corpus].append(f"{quoted}::VARCHAR AS {quoted}")
    selected = []
    for corpus, source in sources.items():
        replaced = f" REPLACE ({', '.join(texts[corpus])})" if texts[corpus] else ""
        selected.append(
            "SELECT corpus, part, row, key, source, size_bytes, lower(hex(sha256)) AS sha256, "
            f"* EXCLUDE (corpus, part, row, key, source, size_bytes, sha256){replaced} FROM {source}"
        )
    return " UNION ALL BY NAME ".join(selected)


def _labels(name: str, files: Sequence[str]) -> str:
    modality = MODALITIES[MODALITY_OF_VIEW[name]]
    source = f"FROM {_parquet(files, ', filename = true')} JOIN file_of_{name} USING (filename)"
    if modality.kind == "text":
        return f"SELECT corpus, part, key, label AS {modality.name} {source} WHERE status = 0"
    label = "unnest(label)" if modality.many else "label"
    inner = f"SELECT corpus, part, key, {label} AS record {source} WHERE status = 0"
    selected = f"SELECT corpus, part, key, unnest(record) FROM ({inner})"
    if "x0" in modality.fields:
        selected = f"SELECT *, (x1 - x0) * (y1 - y0) AS area FROM ({selected})"
    return selected


def _empty(name: str) -> str:
    columns = _EMPTY.get(name) or _empty_content(name)
    nulls = ", ".join(
        f'NULL::{kind} AS "{column}"' for column, _, kind in (c.partition(" ") for c in columns.split(", "))
    )
    return f"SELECT {nulls} WHERE false"


def _empty_content(name: str) -> str:
    modality = MODALITIES[MODALITY_OF_VIEW[name]]
    columns = ["corpus VARCHAR", "part INTEGER", "key VARCHAR"]
    if modality.kind == "text":
        columns.append(f"{modality.name} VARCHAR")
    columns += [f"{field} {_SQL_TYPES[kind]}" for field, kind in modality.fields.items()]
    if "x0" in modality.fields:
        columns.append("area FLOAT")
    return ", ".join(columns)
