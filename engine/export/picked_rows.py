"""Finds the rows of a workspace that an export is asked for."""

from typing import Literal

import numpy as np

from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError
from manifests.queries import retention
from manifests.snapshots.snapshot import Snapshot

# What becomes of rows that are null in a column that is exported.
Nulls = Literal["drop", "keep"]


def picked_rows(
    catalog: Catalog, *, where: str | None, snapshot: Snapshot | None, held_out: bool
) -> dict[str, dict[int, np.ndarray]]:
    """Returns for each corpus and part bool (rows,): the rows that the condition picks, of the snapshot if one is given.

    Of a snapshot these are the rows that are trained on, or with `held_out` the others. Raises ConfigError if none is left.
    """
    parts = catalog.numbered_parts().select(["corpus", "part", "rows", "first_row"]).to_pylist()
    total = sum(part["rows"] for part in parts)
    chosen = np.ones(total, bool)
    if where is not None:
        chosen[:] = False
        # The column's own to_numpy would import pandas if that is installed (seconds).
        for chunk in catalog.select_rows(where).column(0).chunks:
            chosen[chunk.to_numpy()] = True
    frozen: dict[tuple[str, int], np.ndarray] = {}
    if snapshot is not None:
        # Its shards were made before what was forgotten since.
        forgotten = retention.forgotten_rows(catalog)
        for part in snapshot.parts:
            kept = part.held_out.copy() if held_out else part.selected & ~part.held_out
            kept[list(forgotten.get((part.corpus, part.part), ()))] = False
            frozen[part.corpus, part.part] = kept
    found: dict[str, dict[int, np.ndarray]] = {}
    for part in parts:
        rows = chosen[part["first_row"] : part["first_row"] + part["rows"]]
        if snapshot is not None:
            rows = rows & frozen.get((part["corpus"], part["part"]), np.zeros(len(rows), bool))
        if rows.any():
            found.setdefault(part["corpus"], {})[part["part"]] = rows
    if not found:
        asked = [f"--where {where!r}"] if where is not None else []
        asked += [f"snapshot {snapshot.name!r}"] if snapshot is not None else []
        raise ConfigError(f"no row to export of {catalog.storage.uri}: {' and '.join(asked) or 'it has no samples'}")
    return found
