"""The types of source columns: of one sort in all parts of a corpus, where the values allow it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.catalog.catalog import Catalog
from manifests.formats.shards import RESERVED_COLUMNS


def typed_columns(rows: Sequence[Mapping[str, Any]], known: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
    """The source columns of a part as Arrow arrays: of the type that earlier parts have, where the values fit it.

    A column whose values share no type becomes JSON text. A column named as one of the fixed columns of `samples` becomes
    `source_<name>`.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    arrays = {}
    for name in names:
        values = [row.get(name) for row in rows]
        own = f"source_{name}" if name in RESERVED_COLUMNS else name
        arrays[own] = _typed(values, known.get(own))
    return arrays


def _typed(values: list[Any], known: pa.DataType | None) -> pa.Array:
    if known is not None:
        try:
            return pa.array(values, known)
        except (pa.ArrowException, TypeError, ValueError):
            pass
    try:
        array = pa.array(values)
        if pa.types.is_null(array.type):
            return pa.array(values, pa.string())
        if not _holds_empty_struct(array.type):
            return array
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass
    texts = [
        value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True) for value in values
    ]
    return pa.array(texts, pa.string())


def _holds_empty_struct(kind: pa.DataType) -> bool:
    """Parquet cannot hold a struct without fields."""
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_holds_empty_struct(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_list(kind) and (pa.types.is_null(kind.value_type) or _holds_empty_struct(kind.value_type))


def known_types(catalog: Catalog, corpus: str) -> dict[str, pa.DataType]:
    """The types that source columns have in the corpus's parts so far."""
    types: dict[str, pa.DataType] = {}
    for part in catalog.parts(corpus):
        with catalog.storage.open(part.path) as file:
            schema = pq.read_schema(file)
        for item in schema:
            if item.name not in RESERVED_COLUMNS:
                types.setdefault(item.name, item.type)
    return types
