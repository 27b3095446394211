"""Views over row-level Parquet files: `samples`, `failures`, and what kept structured labels say.

Each is made when a query names it, over the files that are live then: a list of files is what DuckDB wants, and binding
it costs a look at each of them.
"""

import re
from collections.abc import Sequence

from manifests.modality import MODALITIES

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


def view_sql(name: str, files: Sequence[str]) -> str:
    """The statement that makes a content view over these files; an empty view with the right columns where none."""
    if not files:
        columns = _EMPTY.get(name) or _empty_content(name)
        nulls = ", ".join(
            f'NULL::{kind} AS "{column}"' for column, _, kind in (c.partition(" ") for c in columns.split(", "))
        )
        return f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT {nulls} WHERE false"
    listed = "[" + ", ".join("'" + file.replace("'", "''") + "'" for file in files) + "]"
    if name == "samples":
        return (
            "CREATE OR REPLACE TEMP VIEW samples AS SELECT corpus, part, row, key, source, size_bytes, "
            "lower(hex(sha256)) AS sha256, * EXCLUDE (corpus, part, row, key, source, size_bytes, sha256) "
            f"FROM read_parquet({listed}, union_by_name = true)"
        )
    if name == "failures":
        return f"CREATE OR REPLACE TEMP VIEW failures AS SELECT * FROM read_parquet({listed})"
    modality = MODALITIES[MODALITY_OF_VIEW[name]]
    source = f"FROM read_parquet({listed}, filename = true) JOIN file_of_{name} USING (filename)"
    if modality.kind == "text":
        selected = f"SELECT corpus, part, key, label AS {modality.name} {source} WHERE status = 0"
    else:
        label = "unnest(label)" if modality.many else "label"
        inner = f"SELECT corpus, part, key, {label} AS record {source} WHERE status = 0"
        selected = f"SELECT corpus, part, key, unnest(record) FROM ({inner})"
        if "x0" in modality.fields:
            selected = f"SELECT *, (x1 - x0) * (y1 - y0) AS area FROM ({selected})"
    return f"CREATE OR REPLACE TEMP VIEW {name} AS {selected}"


def _empty_content(name: str) -> str:
    modality = MODALITIES[MODALITY_OF_VIEW[name]]
    columns = ["corpus VARCHAR", "part INTEGER", "key VARCHAR"]
    if modality.kind == "text":
        columns.append(f"{modality.name} VARCHAR")
    columns += [f"{field} {_SQL_TYPES[kind]}" for field, kind in modality.fields.items()]
    if "x0" in modality.fields:
        columns.append("area FLOAT")
    return ", ".join(columns)
