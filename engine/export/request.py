"""Exports for `modmill export`: writes rows as WebDataset tars (4M's layout or plain ones), or copies a workspace."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.export.choice import ExportChoice
from engine.export.copy import Copied, copy_workspace
from engine.export.picked_rows import Nulls, picked_rows
from engine.progress.progress import Progress
from manifests import units
from manifests.catalog.catalog import Catalog
from manifests.commands import command
from manifests.errors import ConfigError, nearest
from manifests.snapshots import snapshot as snapshots
from manifests.store.storage import open_storage

if TYPE_CHECKING:
    from engine.export.aligned_rows import CorpusRows, ExportColumn
    from engine.export.tar_writer import CorpusExport, Written

Layout = Literal["4m", "webdataset"]
ROWS_PER_SHARD = 1000
# Of the files that a layout writes: one is raised if they become others.
_FORMATS: dict[Layout, int] = {"4m": 2, "webdataset": 1}


@dataclass(frozen=True, kw_only=True)
class ExportRequest(ExportChoice):
    """Adds to what is exported how it is written; with `layout` None it is copied, which takes none of the others.

    `where` is a condition over `samples`. Of a snapshot the rows that are trained on are exported, or with `held_out` the
    rows that are not. `nulls` is "drop" and `rows_per_shard` ROWS_PER_SHARD if they are None.
    """

    where: str | None = None
    layout: Layout | None = None
    held_out: bool = False
    nulls: Nulls | None = None
    rows_per_shard: int | None = None


def export(uri: str, to: str, request: ExportRequest, *, quiet: bool = False) -> str:
    """Exports the workspace at `uri` to a folder or URI; says in one line what was done.

    Raises ConfigError for what cannot be exported and if the target holds something else, ShardError for files that are not
    those that were committed, and what `Catalog.select_rows` raises for the condition.
    """
    if open_storage(uri).root == (target := open_storage(to)).root:
        raise ConfigError(f"--to {to} is the workspace itself; export to another folder")
    if target.is_local and Path(target.root).is_file():
        raise ConfigError(f"--to {to} is a file; export to a folder")
    if request.held_out and request.snapshot is None:
        raise ConfigError("--held-out exports the rows that a snapshot holds out: name one with --snapshot NAME")
    with Catalog.open(uri) as catalog:
        known = [row["corpus"] for row in catalog.corpora()]
        for corpus in request.corpora or ():
            if corpus not in known:
                raise ConfigError(f"no corpus {corpus!r} in {uri}; {nearest(corpus, known)}")
        if request.layout is None:
            given = {
                "--where": request.where,
                "--nulls": request.nulls,
                "--rows-per-shard": request.rows_per_shard,
                "--held-out": request.held_out or None,
            }
            if wrong := [name for name, value in given.items() if value is not None]:
                raise ConfigError(
                    f"{wrong[0]} is only for tars, a copy holds whole parts: name a --layout, or freeze the rows with `modmill "
                    "snapshot` and copy that with --snapshot NAME"
                )
            return _copied(copy_workspace(catalog, target, request, quiet=quiet), to)
        # Layouts need packages that read pictures. A copy does without, so it works with the base install.
        from engine.export.tar_writer import write

        exports, document = _exports(catalog, request)
        with closing(Progress(quiet=quiet)) as progress:
            written = write(
                exports,
                target,
                document,
                nulls=request.nulls or "drop",
                rows_per_shard=request.rows_per_shard or ROWS_PER_SHARD,
                progress=progress,
            )
    return _written(written, exports, request.nulls or "drop", to)


def _exports(catalog: Catalog, request: ExportRequest) -> tuple[list["CorpusExport"], dict[str, Any]]:
    """Returns the folders to write, and what export.json says of them."""
    from engine.export.aligned_rows import CorpusRows
    from engine.export.fourm import fourm_folders
    from engine.export.webdataset import describe, webdataset_folders

    nulls: Nulls = request.nulls or "drop"
    snapshot = None if request.snapshot is None else snapshots.read(catalog.storage, request.snapshot)
    picked = picked_rows(catalog, where=request.where, snapshot=snapshot, held_out=request.held_out)
    corpora = [corpus for corpus in picked if request.corpora is None or corpus in request.corpora]
    if not corpora:
        raise ConfigError(
            f"{', '.join(request.corpora or ())} has none of the picked rows; they are in {', '.join(picked)}"
        )
    rows = [CorpusRows(catalog, corpus, snapshot, picked[corpus]) for corpus in corpora]
    if request.layout == "4m":
        if request.form is not None:
            raise ConfigError("--form: the 4M layout has tokens of images and labels of everything else; leave it out")
        if len(rows) > 1:
            raise ConfigError(
                f"the 4M layout holds one corpus, and the picked rows are in {', '.join(corpora)}; name one with --corpora"
            )
        exports = [fourm_folders(rows[0], request.modalities, nulls, held_out=request.held_out)]
    else:
        exports = [webdataset_folders(each, _chosen(rows, each, request), nulls) for each in rows]
        exports = [each for each in exports if each.folders]
    if not any(each.folders for each in exports):
        raise ConfigError(f"no shards of {', '.join(corpora)} to export yet; `modmill run FILE` makes them")
    document = {
        "format": _FORMATS[request.layout or "webdataset"],
        "layout": request.layout,
        "workspace": catalog.workspace_id,
        "snapshot": None if snapshot is None else {"name": snapshot.name, "sha256": snapshot.sha256},
        "held_out": request.held_out,
        "where": request.where,
        "nulls": nulls,
        "rows_per_shard": request.rows_per_shard or ROWS_PER_SHARD,
        "folders": {
            folder.path: describe(folder.columns[0]) if folder.columns else None
            for each in exports
            for folder in each.folders
        },
    }
    return exports, document


def _chosen(every: Sequence["CorpusRows"], rows: "CorpusRows", request: ExportRequest) -> list["ExportColumn"]:
    """Returns the columns of a corpus that are asked for. Raises ConfigError for a modality that no corpus has."""
    known = {column.modality.name for each in every for column in each.columns}
    for name in request.modalities or ():
        if name not in known:
            raise ConfigError(f"no shards of a modality {name!r}; {nearest(name, known)}")
    return [
        column
        for column in rows.columns
        if (request.modalities is None or column.modality.name in request.modalities)
        and (request.form is None or column.form == request.form)
    ]


def _written(written: "Written", exports: Sequence["CorpusExport"], nulls: Nulls, to: str) -> str:
    if written.is_done_before:
        return f"nothing to do: {to} holds this export, whole; export to a new folder for what came since"
    folders = sum(len(export.folders) for export in exports)
    text = f"exported {written.rows:,} rows to {to}: {folders} folders, "
    text += f"{written.files:,} files, {units.size(written.size_bytes)}"
    if written.null_rows:
        null = ", ".join(f"{name} in {count:,}" for name, count in written.nulls.most_common())
        text += f"; {'dropped' if nulls == 'drop' else 'kept'} {written.null_rows:,} rows with nulls ({null})"
    return text


def _copied(copied: Copied, to: str) -> str:
    if not copied.files and not copied.entries:
        return f"nothing to do: {to} holds all of it"
    stood = f", {copied.stood:,} files stood there already" if copied.stood else ""
    return (
        f"copied {copied.files:,} files, {units.size(copied.size_bytes)}, in {copied.entries:,} log entries to {to}{stood}; "
        f"check it: {command('verify', to)}"
    )
