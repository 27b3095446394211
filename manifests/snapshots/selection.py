"""Decides what a snapshot holds: the modalities, rows and shards that a selection picks, as three Arrow tables.

Rows are numbered through all parts of a workspace in the order of (corpus, part, row), so that a selection is one array
of bools; `manifests/snapshots/snapshot.py` writes the tables down and reads them.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.commands import command
from manifests.errors import ConfigError, ShardError, nearest
from manifests.formats.snapshots import MODALITIES, PARTS, SHARDS
from manifests.queries import recipe_choice
from manifests.snapshots import with_tokens
from manifests.snapshots.with_tokens import NumberedRows

if TYPE_CHECKING:
    from manifests.catalog.catalog import Catalog


def select(
    catalog: "Catalog",
    *,
    where: str | None,
    modalities: Sequence[str] | None,
    hold_out: float,
    complete: bool = False,
    split_by: str | None = None,
) -> dict[str, pa.Table]:
    """Returns what the arguments of `snapshot.make` pick of the catalog as it stands: modalities, parts and shards.

    Modalities are in the order of their names, parts in that of (corpus, part), shards in that of (corpus, part, modality,
    crop). Bitmaps of rows (`selected`, `held_out`) are packed, the first row in the lowest bit.

    Raises ConfigError if that is no row, and for modalities that cannot be had or trained on; QueryError for the condition;
    ShardError if a shard that must be looked into cannot be read.
    """
    parts = catalog.numbered_parts()
    rows = NumberedRows(firsts=parts["first_row"].to_numpy(), counts=parts["rows"].to_numpy())
    picked = np.ones(rows.total, bool) if where is None else rows.numbered(catalog.select_rows(where))
    if not picked.any():
        everything = f"the workspace has {rows.total:,} samples"
        raise ConfigError(f"the condition {where!r} picks no row; {everything}" if where else f"no row; {everything}")
    corpora = parts["corpus"].filter(pa.array(rows.parts_with(picked))).unique().to_pylist()
    recipes = recipe_choice.choose(catalog, modalities, corpora)
    shards = _in_parquet(catalog.token_shards(recipes), is_asked=modalities is not None)
    _check_aligned(parts, shards)
    names = {recipe["modality"] for recipe in recipes}
    if complete:
        needed = names if modalities is not None else set(shards["modality"].to_pylist())
        picked &= with_tokens.in_every(catalog.storage, rows, picked, shards, needed)
    else:
        picked &= with_tokens.in_any(catalog.storage, rows, picked, shards)
    if not picked.any():
        has = f"{'tokens of each of' if complete else 'a token in'} {', '.join(sorted(names))}"
        raise ConfigError(f"no row that is picked has {has}; see `{command('status', catalog.storage.uri)}`")
    held_out = _held_out(catalog, rows, hold_out, split_by) & picked
    kept = rows.parts_with(picked)
    shards = shards.filter(pa.array(kept[shards["part_number"].to_numpy()]))
    records = recipe_choice.modalities(catalog, recipes, shards, is_asked=modalities is not None)
    return {
        "modalities": pa.Table.from_pylist(records, MODALITIES),
        "parts": _parts(parts, rows, picked, held_out, kept),
        "shards": shards.select(SHARDS.names).cast(SHARDS),
    }


# -- rows -------------------------------------------------------------------------------------------------------------


def group_of(catalog: "Catalog", split_by: str | None) -> str:
    """Returns the SQL expression whose hash decides the side of a row: its key, or the value of a column as text.

    A row without a value there is a group of its own. Raises ConfigError if `samples` has no such column.
    """
    if split_by is None:
        return "key"
    # Snapshots are read without DuckDB, and only making one comes here.
    from manifests.catalog.samples import quoted

    columns = catalog.sql("SELECT * FROM samples LIMIT 0").column_names
    if split_by not in columns:
        raise ConfigError(f"--split-by {split_by}: `samples` has no such column; {nearest(split_by, columns)}")
    return f"coalesce({quoted(split_by)}::VARCHAR, key)"


def _held_out(catalog: "Catalog", rows: NumberedRows, hold_out: float, split_by: str | None) -> np.ndarray:
    """Returns bool (total,): the rows whose key (or group) has a low sha256.

    Its first 8 bytes, a big-endian number, are under hold_out x 2**64.
    """
    group = group_of(catalog, split_by)
    bound = math.ceil(hold_out * 2**64)
    if not bound:
        return np.zeros(rows.total, bool)
    return rows.numbered(catalog.select_rows(f"left(sha256({group}), 16) < '{bound:016x}'"))


def _check_aligned(parts: pa.Table, shards: pa.Table) -> None:
    """Raises ShardError if a record says that its shard has other rows than its part."""
    of_part = parts.take(shards["part_number"])
    other_keys = pc.call_function("not_equal", [of_part["keys_sha256"], shards["keys_sha256"]])
    other_rows = pc.call_function("not_equal", [of_part["rows"], shards["rows"]])
    is_wrong = pc.call_function("or", [other_keys, other_rows])
    wrong = shards["path"].filter(is_wrong).to_pylist()
    if wrong:
        raise ShardError(f"{wrong[0]}: its record in the log says that its rows are not those of its part")


def _in_parquet(shards: pa.Table, *, is_asked: bool) -> pa.Table:
    """Returns the shards in Parquet, which the loader reads. Raises ConfigError if others were asked for by name."""
    is_parquet = pc.call_function("equal", [shards["format"], pa.scalar("parquet")])
    others = shards.filter(pc.call_function("invert", [is_parquet]))
    if is_asked and others.num_rows:
        names = ", ".join(sorted(set(others["modality"].to_pylist())))
        raise ConfigError(
            f"the tokens of {names} are {others['format'][0]} shards, training reads Parquet; leave them out of the "
            "modalities, or take `format` from their tokens in the pipeline file and run it again"
        )
    return shards.filter(is_parquet)


def _parts(parts: pa.Table, rows: NumberedRows, picked: np.ndarray, held_out: np.ndarray, kept: np.ndarray) -> pa.Table:
    """Returns the table of the parts that have rows picked."""
    numbers = np.flatnonzero(kept)
    places = [rows.of(int(number)) for number in numbers]
    table = parts.take(pa.array(numbers))
    for name, bits in (("selected", picked), ("held_out", held_out)):
        packed = [np.packbits(bits[place], bitorder="little").tobytes() for place in places]
        table = table.append_column(name, pa.array(packed, pa.binary()))
    return table.select(PARTS.names).cast(PARTS)
