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
from manifests.queries.retention import ForgottenRow
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


def make_receipt(catalog: Catalog, run: str, rows: Sequence[ForgottenRow], asked: Mapping[str, Any]) -> Receipt:
    """Writes and returns the receipt of rows that this run or an earlier one forgot. It holds none of their sources' names."""
    places: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        places.setdefault((row.corpus, row.part), set()).add(row.row)
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
        "files": _files(catalog, of_rows),
        "snapshots": [{name: each[name] for name in ("snapshot", "successor", "rows")} for each in snapshots],
        "runs": _runs(catalog, {each["sha256"]: each["snapshot"] for each in snapshots}),
        "tokenizers": retention.tokenizers_since(catalog, list(places)) if places else [],
        "files_left": _left(catalog, of_rows),
    }
    path = paths.receipt(run)
    catalog.storage.put(path, canonical_json(document))
    return Receipt(path=path, document=document, lines=_lines(catalog.storage.uri, document))


def _files(catalog: Catalog, of_rows: Sequence[Forgotten]) -> list[dict[str, str | None]]:
    """Returns the files that held the rows, each with the one in its place (None if it was no longer live)."""
    found = retention.rewritten(catalog)
    sidecars = (".json", ".failed.parquet")
    held = dict.fromkeys(path for action in of_rows for path in action.files if not path.endswith(sidecars))
    return [{"old": path, "new": found[path].path if path in found else None} for path in held]


def _left(catalog: Catalog, of_rows: Sequence[Forgotten]) -> int:
    """Returns how many of the files that held the rows still exist."""
    held = sorted({path for action in of_rows for path in action.files})
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
    lines += [
        ("file", each["old"], f"is now {each['new']}" if each["new"] else "was live no more")
        for each in document["files"]
    ]
    lines += [
        ("snapshot", each["snapshot"], f"{each['rows']:,} rows of it; replaced by {each['successor']}")
        for each in document["snapshots"]
    ]
    lines += [
        ("run", each["run"], f"trained on {each['snapshots']} from {each['started_at']}: its model saw them")
        for each in document["runs"]
    ]
    lines += [
        ("tokenizer", f"{each['name']}-{each['digest'][:12]}", "may have been fitted on them")
        for each in document["tokenizers"]
    ]
    if left := document["files_left"]:
        collect = command("forget", uri, "--collect", "--yes")
        lines.append(("to do", collect, f"deletes the {left:,} files that hold them"))
    return lines
