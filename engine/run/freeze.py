"""Makes snapshots for the command line and for the pipeline file; `manifests/snapshots/snapshot.py` writes and reads them."""

from collections.abc import Mapping, Sequence
from decimal import Decimal

from engine.pipeline.config import SnapshotConfig
from engine.progress.progress import Progress
from engine.progress.record import Done, recorded
from manifests.catalog import attached
from manifests.catalog.catalog import Catalog
from manifests.commands import command
from manifests.errors import WorkspaceError
from manifests.queries import recipe_choice
from manifests.snapshots import snapshot as snapshots
from manifests.snapshots import splits, successor
from manifests.snapshots.snapshot import Snapshot
from manifests.store.storage import open_storage


def make(
    uri: str,
    name: str,
    *,
    where: str | None,
    modalities: Sequence[str] | None,
    hold_out: float,
    complete: bool = False,
    split_by: str | None = None,
    shares: Mapping[str, Decimal] | None = None,
    attach: Sequence[str] = (),
    quiet: bool = False,
) -> list[Snapshot]:
    """Makes a snapshot of the workspace at `uri`, or one for each of `shares`, as a recorded run.

    Each of `attach` is a file with columns for `where`, as FILE or FILE:column,column; see `manifests/catalog/attached.py`.
    Raises what `splits.conditions` and `snapshot.make` of `manifests/snapshots` raise, and what `Catalog.attach` does.
    """
    config = {
        "snapshot": name,
        "where": where,
        "modalities": None if modalities is None else list(modalities),
        "hold_out": hold_out,
        "complete": complete,
        "split_by": split_by,
        "splits": None if shares is None else {split: str(share) for split, share in shares.items()},
        "attach": [attached.document(text) for text in attach],
    }
    made: list[Snapshot] = []
    with recorded(open_storage(uri), "snapshot", config, quiet=quiet) as execution:
        catalog, done = execution.catalog, execution.done
        for file, on in map(attached.parse, attach):
            execution.progress.say(str(catalog.attach(file, on=on)))
        conditions = {name: where} if shares is None else splits.conditions(catalog, name, where, shares, split_by)
        for one, condition in conditions.items():
            before = catalog.version
            made.append(
                snapshots.make(
                    catalog,
                    one,
                    where=condition,
                    modalities=modalities,
                    hold_out=hold_out,
                    complete=complete,
                    split_by=split_by,
                    run=done.run,
                )
            )
            done.add("snapshots", int(catalog.version > before))
    return made


def summary(snapshot: Snapshot) -> str:
    """Tells of a snapshot in one line."""
    return (
        f"snapshot {snapshot.name}: {snapshot.rows:,} rows, {snapshot.held_out_rows:,} of them held out, "
        f"{len(snapshot.modalities)} modalities, sha256 {snapshot.sha256[:12]}; train on it as {snapshot.uri}"
    )


def freeze(sections: Mapping[str, SnapshotConfig], catalog: Catalog, progress: Progress, done: Done) -> None:
    """Does the step `snapshot` of a pipeline: makes the snapshots that are not there, and keeps those that are.

    Raises WorkspaceError if the pipeline file now describes one of these otherwise.
    """
    standing = set(snapshots.names(catalog.storage))
    for name, section in sections.items():
        if name in standing:
            current = successor.newest_name(catalog, name)
            if current != name:
                progress.say(
                    f"snapshot {name} was replaced by {current}, without rows that were forgotten; train on that"
                )
            found = snapshots.record(catalog, current, run=done.run)
            _check_described(found, section)
            if _has_grown(catalog, current):
                progress.say(
                    f"snapshot {name} is frozen at {found.rows:,} rows, and there is more since; a new one: "
                    f"{command('snapshot', catalog.storage.uri, 'OTHER-NAME')}"
                )
            continue
        made = snapshots.make(
            catalog,
            name,
            where=section.where,
            modalities=section.modalities,
            hold_out=section.hold_out,
            complete=section.complete,
            run=done.run,
        )
        done.add("snapshots", 1)
        progress.say(summary(made))


def _check_described(snapshot: Snapshot, section: SnapshotConfig) -> None:
    differs = [
        f"{name} is {was!r} there and {now!r} in the file"
        for name, was, now in (
            ("where", snapshot.where, section.where),
            ("hold_out", snapshot.hold_out, section.hold_out),
            ("complete", snapshot.complete, section.complete),
        )
        if was != now
    ]
    if section.modalities is not None and not _has_modalities(snapshot, section.modalities):
        there = [modality.modality for modality in snapshot.modalities]
        differs.append(f"modalities are {there} there and {section.modalities} in the file")
    if differs:
        raise WorkspaceError(
            f"snapshots.{snapshot.name}: the snapshot {snapshot.name!r} of {snapshot.storage.uri} stands and is frozen, "
            f"but {'; '.join(differs)}; give the new one another name"
        )


def _has_modalities(snapshot: Snapshot, asked: Sequence[str]) -> bool:
    """Tells whether a snapshot has the modalities asked for, and of each the recipes that are named."""
    named = recipe_choice.named(asked)
    if set(named) != {modality.modality for modality in snapshot.modalities}:
        return False
    prefixes = {modality: tuple((prefix or "").lower() for prefix in given) for modality, given in named.items()}
    return all(shard.fingerprint.startswith(prefixes[shard.modality]) for shard in snapshot.shards)


def _has_grown(catalog: Catalog, name: str) -> bool:
    """Tells whether parts or shards came after a snapshot."""
    newest = catalog.sql(
        "SELECT max(version) > (SELECT version FROM snapshots WHERE snapshot = ?) AS has_grown "
        "FROM (SELECT version FROM parts UNION ALL SELECT version FROM shards)",
        [name],
    )
    return bool(newest["has_grown"][0].as_py())
