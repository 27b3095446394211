"""Writes and reads lists of samples that an ingest left out: the Parquet files of the view `dropped`.

A list that is written again without some rows names the one that it replaces in the metadata of its schema, so that a log
can be made of the files alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from manifests.log.actions import SamplesDropped
from manifests.recipe import sha256_hex
from manifests.store import parquet, paths
from manifests.store.storage import Storage, put_same

_REPLACES = b"replaces"
_SCHEMA = pa.schema(
    [
        ("corpus", pa.string()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("size_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)


def write(
    storage: Storage, corpus: str, rows: Sequence[Mapping[str, Any]], *, replaces: str | None = None
) -> SamplesDropped:
    """Writes a list and returns its record to be committed. `replaces` is the list whose rows these are, but for some."""
    table = pa.Table.from_pylist([{"corpus": corpus, **row} for row in rows], _SCHEMA)
    if replaces is not None:
        table = table.replace_schema_metadata({_REPLACES: replaces.encode()})
    data = parquet.written(table)
    sha256 = sha256_hex(data)
    path = paths.dropped(corpus, sha256)
    put_same(storage, path, data, sha256)
    return record(corpus, path, table)


def record(corpus: str, path: str, table: pa.Table) -> SamplesDropped:
    """Returns the record of a list that was read."""
    replaces = (table.schema.metadata or {}).get(_REPLACES)
    return SamplesDropped(
        corpus=corpus,
        path=path,
        rows=table.num_rows,
        counts=dict(sorted(Counter(table["reason"].to_pylist()).items())),
        replaces=None if replaces is None else replaces.decode(),
    )
