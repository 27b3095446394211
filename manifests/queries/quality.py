"""Asks about the alarms of a run's newest shards.

The rules, and the views `quality` and `alarms`, stand in `catalog/views.sql`; `docs/quality.md` tells of each metric.
"""

from collections.abc import Sequence
from typing import Any

from manifests.catalog.catalog import Catalog

# Rows of `state.history`: what is known of a metric of a recipe in a corpus, as sums over its shards.
Histories = Sequence[dict[str, Any]]


def histories(catalog: Catalog, after: int = 0, known: Histories = ()) -> Histories:
    """Returns the history of each metric that is judged: those `known`, and what versions after `after` add to them."""
    return _rows(catalog, "SELECT * FROM state.history(?, ?::state.sums[])", after, known)


def alarms_after(catalog: Catalog, after: int, known: Histories) -> list[dict[str, Any]]:
    """Returns the alarms of versions after `after`, as rows of the view `alarms` without its `version`.

    `known` are the histories up to there.
    """
    return _rows(catalog, "SELECT * EXCLUDE (version) FROM state.alarms_after(?, ?::state.sums[])", after, known)


def _rows(catalog: Catalog, query: str, after: int, known: Histories) -> list[dict[str, Any]]:
    columns, rows = catalog.fetch(query, [after, list(known)])
    return [dict(zip(columns, row, strict=True)) for row in rows]
