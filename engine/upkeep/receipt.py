"""Writes the receipt of a forget: what was asked, which files were rewritten, what saw the rows, and what is left to do."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from manifests.catalog.catalog import Catalog
from manifests.commands import command
from manifests.log.actions import Forgotten
from manifests.log.entries import now
from manifests.queries import retention
from manifests.queries.retention import DroppedRow, ForgottenRow
from manifests.recipe import canonical_json
from manifests.snapshots import successor
from manifests.snapshots.snapshot import Snapshot
from manifests.store import paths

_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Holds what a forget did: the document at `path` in the workspace, and the same as rows of what, item, detail."""

    path: str
    document: Mapping[str, Any]
    lines: list[tuple[str, str, str]]


def make_receipt(
    catalog: Catalog, run: str, rows: Sequence[ForgottenRow], asked: Mapping[str, Any], *, dropped_rows: int
) -> Receipt:
    """Writes and returns the receipt of rows that this run or an earlier one forgot. It holds none of their sources' names.

    `dropped_rows` is how many rows of the view `dropped` this run took out.
    """
    places = _places(rows)
    of_rows = [
        action
        for action in retention.forgotten(catalog)
        if not places.get((action.corpus, action.part), set()).isdisjoint(action.rows)
    ]
    snapshots = _snapshots(catalog, places)
    document = {
        "format": 1,
        "workspace": catalog.workspace_id,
        "run": run,
        "time": now(),
        "asked": {name: asked[name] for name in ("lines", "unknown", "lines_sha256")},
        "rows": [asdict(row) for row in rows],
        "dropped_rows": dropped_rows,
        "files": _files(catalog, of_rows),
        "snapshots": [{name: each[name] for name in ("snapshot", "successor", "rows")} for each in snapshots],
        "runs": _runs(catalog, {each["sha256"]: each["snapshot"] for each in snapshots}),
        "tokenizers": retention.tokenizers_since(catalog, list(places)) if places else [],
        "files_left": _left(catalog, of_rows),
    }
    path = paths.receipt(run)
    catalog.storage.put(path, canonical_json(document))
    return Receipt(path=path, document=document, lines=_lines(catalog.storage.uri, document))


def expected(
    catalog: Catalog, rows: Sequence[ForgottenRow], dropped: Sequence[DroppedRow]
) -> list[tuple[str, str, str]]:
    """Returns what a forget of these rows would take, as rows of what, item, detail. Nothing is written."""
    places = _places(rows)
    sources = retention.sources_of(catalog, rows)
    snapshots = _snapshots(catalog, places)
    lines = [
        (
            "row",
            f"{row.corpus}/{row.key}",
            f"part {row.part}, row {row.row}: {sources.get((row.corpus, row.key), 'no source')}",
        )
        for row in rows
    ]
    lines += [("dropped", f"{row.corpus}/{row.key}", f"{row.reason}: {row.source}") for row in dropped]
    lines += [
        ("file", path, "is written again without them, then deleted by --collect --yes")
        for corpus, part in sorted(places)
        for path in retention.files_of_part(catalog, corpus, part)
    ]
    lines += [
        ("snapshot", each["snapshot"], f"{each['rows']:,} rows of it; is replaced by one without them")
        for each in snapshots
        if each["successor"] is None
    ]
    return lines + _who_saw(
        _runs(catalog, {each["sha256"]: each["snapshot"] for each in snapshots}),
        retention.tokenizers_since(catalog, list(places)) if places else [],
    )


def _places(rows: Sequence[ForgottenRow]) -> dict[tuple[str, int], set[int]]:
    """Returns the numbers of the rows of each part."""
    places: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        places.setdefault((row.corpus, row.part), set()).add(row.row)
    return places


def _files(catalog: Catalog, of_rows: Sequence[Forgotten]) -> list[dict[str, str | None]]:
    """Returns the files that held the rows, each with the one in its place (None if it was no longer live)."""
    found = retention.rewritten(catalog)
    sidecars = (".json", ".failed.parquet")
    held = dict.fromkeys(path for action in of_rows for path in action.files if not path.endswith(sidecars))
    return [{"old": path, "new": found[path].path if path in found else None} for path in held]


def _left(catalog: Catalog, of_rows: Sequence[Forgotten]) -> int:
    """Returns how many of the files that held the rows, or rows of the view `dropped` of their bytes, still exist."""
    held = sorted({path for action in of_rows for path in action.files} | retention.replaced_lists(catalog))
    with ThreadPoolExecutor(_THREADS) as pool:
        return sum(pool.map(catalog.storage.exists, held))


def _snapshots(catalog: Catalog, places: Mapping[tuple[str, int], set[int]]) -> list[dict[str, Any]]:
    """Returns the snapshots that select any of the rows, with their successors."""
    replaced_by = {row["snapshot"]: row["replaced_by"] for row in catalog.snapshots().to_pylist()}
    counted = ((snapshot, _selected(snapshot, places)) for snapshot in successor.every(catalog))
    return [
        {
            "snapshot": snapshot.name,
            "successor": replaced_by.get(snapshot.name),
            "rows": count,
            "sha256": snapshot.sha256,
        }
        for snapshot, count in counted
        if count
    ]


def _selected(snapshot: Snapshot, places: Mapping[tuple[str, int], set[int]]) -> int:
    return sum(
        int(np.count_nonzero(part.selected[sorted(places.get((part.corpus, part.part), ()))]))
        for part in snapshot.parts
    )


def _runs(catalog: Catalog, snapshots: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns the training runs that read these snapshots (names by sha256)."""
    found = []
    for run in retention.training_runs(catalog):
        used = [each.get("sha256") for each in json.loads(run["config"]).get("snapshots", [])]
        names = [snapshots[sha256] for sha256 in used if sha256 in snapshots]
        if names:
            started_at = f"{run['started_at']:%Y-%m-%d %H:%M}"
            found.append({"run": run["run"], "snapshots": ", ".join(names), "started_at": started_at})
    return found


def _lines(uri: str, document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    lines = [
        ("row", f"{row['corpus']}/{row['key']}", f"part {row['part']}, row {row['row']}") for row in document["rows"]
    ]
    if count := document["dropped_rows"]:
        lines.append(("dropped", f"{count:,} rows", "of the view `dropped`, taken out"))
    lines += [
        ("file", each["old"], f"is now {each['new']}" if each["new"] else "was live no more")
        for each in document["files"]
    ]
    lines += [
        ("snapshot", each["snapshot"], f"{each['rows']:,} rows of it; replaced by {each['successor']}")
        for each in document["snapshots"]
    ]
    lines += _who_saw(document["runs"], document["tokenizers"])
    if left := document["files_left"]:
        collect = command("forget", uri, "--collect", "--yes")
        lines.append(("to do", collect, f"deletes the {left:,} files that hold them"))
    return lines


def _who_saw(runs: Sequence[Mapping[str, str]], tokenizers: Sequence[Mapping[str, str]]) -> list[tuple[str, str, str]]:
    """Returns rows that tell which training runs and tokenizers saw what is forgotten."""
    lines = [
        ("run", each["run"], f"trained on {each['snapshots']} from {each['started_at']}: its model saw them")
        for each in runs
    ]
    return lines + [
        ("tokenizer", f"{each['name']}-{each['digest'][:12]}", "may have been fitted on them") for each in tokenizers
    ]
