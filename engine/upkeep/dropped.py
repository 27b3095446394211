"""Takes what is forgotten out of the view `dropped`: its lists are written again without those rows.

Which rows must go is told by the log alone, so the next forget or collection does what a kill left undone.
"""

import re
from collections.abc import Collection, Sequence

from engine.progress import events
from engine.progress.record import Execution
from manifests.catalog.catalog import Catalog
from manifests.formats import dropped_lists
from manifests.log.actions import Action
from manifests.queries import retention
from manifests.queries.retention import DroppedRow
from manifests.store import parquet


def take_out(execution: Execution, named: Collection[DroppedRow] = ()) -> None:
    """Takes rows out of the view `dropped`: those named, and all with the key or the bytes of a row that is forgotten."""
    catalog = execution.catalog
    gone = dict.fromkeys([*retention.dropped_of(catalog, retention.every_forgotten_row(catalog)), *named])
    if not gone:
        return
    redact_events(catalog, execution.done.run, [row.source for row in gone if row.source])
    places = {(row.corpus, row.key, row.sha256) for row in gone}
    actions: list[Action] = []
    for record in retention.lists_of(catalog, {row.corpus for row in gone}):
        with catalog.storage.open(record.path) as stream:
            rows = parquet.read(stream).to_pylist()
        left = [row for row in rows if (row["corpus"], row["key"], row["sha256"]) not in places]
        if len(left) < len(rows):
            actions.append(dropped_lists.write(catalog.storage, record.corpus, left, replaces=record.path))
            execution.done.add("dropped_rows_removed", len(rows) - len(left))
    if actions:
        catalog.commit(actions, run=execution.done.run)


def redact_events(catalog: Catalog, own_run: str, sources: Sequence[str]) -> None:
    """Takes the sources' names out of the events of earlier runs: a note of an ingest may have one."""
    named = re.compile(r"(?<![\w./-])(" + "|".join(re.escape(source) for source in sources) + r")(?![\w/-])")
    events.redact(catalog.storage, named, but=own_run)
