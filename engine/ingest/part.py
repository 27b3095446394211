"""Writes what an ingest commits: the samples file of a part, and the list of samples whose source changed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.ingest.intake import Intake, Taken
from engine.sources.scan import Scan
from manifests.catalog.catalog import Catalog
from manifests.formats.shards import PLACE_COLUMNS, RESERVED_COLUMNS, keys_digest, write_samples
from manifests.log.actions import PartAdded, SourcesChanged
from manifests.recipe import sha256_hex
from manifests.store import parquet, paths
from manifests.store.storage import Storage, put_same


def write_part(
    catalog: Catalog,
    corpus: str,
    scan: Scan,
    intake: Intake,
    chunk: Sequence[Taken],
    part: int,
    types: dict[str, pa.DataType],
) -> PartAdded:
    """Writes the samples file of a part, and the tar of its source bytes if they are packed; returns its record.

    `types` are those of the source columns of earlier parts; what this part adds is put into it.
    """
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
    places = [(name, kind) for name, kind in PLACE_COLUMNS.items() if any(row[name] is not None for row in rows)]
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
    path = paths.samples(corpus, part, sha256)
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


def write_changes(catalog: Catalog, corpus: str, vanished: Sequence[str], changed: Sequence[str]) -> SourcesChanged:
    """Writes the keys of samples whose source is gone or altered; returns the record."""
    changes = ["vanished"] * len(vanished) + ["changed"] * len(changed)
    data = parquet.written(pa.table({"key": [*vanished, *changed], "change": changes}))
    sha256 = sha256_hex(data)
    path = paths.changes(corpus, sha256)
    put_same(catalog.storage, path, data, sha256)
    return SourcesChanged(corpus=corpus, path=path, vanished=len(vanished), changed=len(changed))


# -- types of source columns ------------------------------------------------------------------------------------------


def typed_columns(rows: Sequence[Mapping[str, Any]], known: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
    """Returns the source columns of a part as Arrow arrays, of the type that earlier parts have if the values fit it.

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
    # Parquet cannot hold a struct without fields.
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_holds_empty_struct(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_list(kind) and (pa.types.is_null(kind.value_type) or _holds_empty_struct(kind.value_type))


def known_types(catalog: Catalog, corpus: str) -> dict[str, pa.DataType]:
    """Returns the types that source columns have in the corpus's parts so far."""
    types: dict[str, pa.DataType] = {}
    for part in catalog.parts(corpus):
        with catalog.storage.open(part.path) as file:
            schema = pq.read_schema(file)
        for item in schema:
            if item.name not in RESERVED_COLUMNS:
                types.setdefault(item.name, item.type)
    return types
