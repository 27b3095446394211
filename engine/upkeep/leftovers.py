"""Finds files that no live record names: replaced ones, orphans of killed runs, temporary ones. None of them is wrong."""

import datetime
import itertools
import posixpath
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from manifests import units
from manifests.catalog.catalog import Catalog
from manifests.formats import snapshots as snapshot_files
from manifests.queries import audit
from manifests.queries.audit import Named
from manifests.store import paths
from manifests.store.storage import StoredFile

Kind = Literal["orphan", "replaced", "temporary"]


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Holds a file that no live record names, and why it stands there."""

    kind: Kind
    file: StoredFile
    why: str


def leftovers(catalog: Catalog, frozen: Collection[str]) -> Iterator[Leftover]:
    """Yields every such file of data, tokenizers and _meta, in their order; `frozen` are those that snapshots name.

    Folder by folder, so that a big workspace is never held at once.
    """
    for folder, files in itertools.groupby(catalog.storage.walk(paths.DATA), key=lambda file: paths.group(file.path)):
        named = _with_sidecars(audit.named_files(catalog, folder))
        for file in files:
            found = None if file.path in frozen and file.path not in named else _of_data(file, named)
            if found is not None:
                yield found
    tokenizers = {tokenizer.path for tokenizer in audit.tokenizers(catalog)}
    for file in catalog.storage.walk(paths.TOKENIZERS):
        folder = "/".join(file.path.split("/")[:2])
        if _is_temporary(file):
            yield _temporary(file)
        elif folder not in tokenizers and folder.removesuffix(".json") not in tokenizers:
            yield Leftover(kind="orphan", file=file, why=f"of a tokenizer that no record names, {age(file)} old")
    yield from _of_meta(catalog)


def age(file: StoredFile) -> str:
    """Says roughly how old a file is by the clock of its store."""
    return units.age((datetime.datetime.now(datetime.UTC) - file.modified).total_seconds())


def _with_sidecars(named: Mapping[str, Named]) -> dict[str, Named]:
    """Adds the names of the sidecars; the sidecar of a live file is live."""
    found = dict(named)
    for path, name in named.items():
        sidecar = paths.sidecar(path)
        if sidecar not in found or name.is_live:
            found[sidecar] = name
    return found


def _of_data(file: StoredFile, named: Mapping[str, Named]) -> Leftover | None:
    name = named.get(file.path)
    if _is_temporary(file):
        return _temporary(file)
    if name is None:
        return Leftover(kind="orphan", file=file, why=f"no record names it, {age(file)} old")
    if name.is_forgotten:
        return Leftover(
            kind="replaced", file=file, why="holds rows that were forgotten: `modmill forget --collect` ends it"
        )
    if name.is_live:
        return None
    return Leftover(kind="replaced", file=file, why=f"replaced or retired by version {name.ended}")


def _of_meta(catalog: Catalog) -> Iterator[Leftover]:
    """Yields temporary files, and the files of folders that were begun and not finished."""
    unfinished: dict[str, bool] = {}
    for file in catalog.storage.walk(paths.META):
        folder = posixpath.dirname(file.path)
        if _is_temporary(file):
            yield _temporary(file)
        elif posixpath.dirname(folder) in (paths.SNAPSHOTS, paths.CHECKPOINTS):
            if folder not in unfinished:
                unfinished[folder] = not catalog.storage.exists(f"{folder}/{snapshot_files.SUMS}")
            if unfinished[folder]:
                yield Leftover(
                    kind="orphan", file=file, why=f"of a folder that was begun, not finished, {age(file)} old"
                )


def _is_temporary(file: StoredFile) -> bool:
    return posixpath.basename(file.path).startswith(".")


def _temporary(file: StoredFile) -> Leftover:
    return Leftover(kind="temporary", file=file, why=f"of a writer that was killed or is at work, {age(file)} old")
