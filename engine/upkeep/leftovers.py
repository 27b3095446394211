"""Finds files that no live record names: replaced ones, orphans of killed runs, temporary ones. None of them is wrong."""

import datetime
import itertools
import posixpath
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from manifests import units
from manifests.catalog.catalog import Catalog
from manifests.formats import snapshots as snapshot_files
from manifests.queries import audit
from manifests.queries.audit import Named
from manifests.store import paths
from manifests.store.storage import StoredFile

Kind = Literal["wrong", "orphan", "replaced", "temporary", "no sidecar"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Holds a path, and what is wrong with it or why it is there although no live record names it."""

    path: str
    problem: str
    kind: Kind = "wrong"


def leftovers(catalog: Catalog, frozen: Collection[str]) -> Iterator[Finding]:
    """Yields every such file of data, tokenizers and _meta, in their order; `frozen` are those that snapshots name.

    The folders are read one by one, so that a big workspace is never held at once.
    """
    for folder, files in itertools.groupby(catalog.storage.walk(paths.DATA), key=lambda file: paths.group(file.path)):
        # By stem, as the sidecar of a file is live, replaced or forgotten with it.
        named: dict[str, Named] = {}
        for path, name in audit.named_files(catalog, folder).items():
            if name.is_live or paths.stem(path) not in named:
                named[paths.stem(path)] = name
        for file in files:
            name = named.get(paths.stem(file.path))
            if paths.is_temporary(file.path):
                yield _temporary(file)
            elif name is not None and not name.is_live:
                yield Finding(kind="replaced", path=file.path, problem=_why_replaced(name))
            elif name is None and file.path not in frozen:
                yield _orphan(file, "no record names it")
    tokenizers = {tokenizer.path for tokenizer in audit.tokenizers(catalog)}
    for file in catalog.storage.walk(paths.TOKENIZERS):
        folder = "/".join(file.path.split("/")[:2])
        if paths.is_temporary(file.path):
            yield _temporary(file)
        elif folder.removesuffix(".json") not in tokenizers:
            yield _orphan(file, "of a tokenizer that no record names")
    yield from _of_meta(catalog)


def _of_meta(catalog: Catalog) -> Iterator[Finding]:
    """Yields temporary files, and the files of snapshots and checkpoints that were begun and not finished."""
    walk = catalog.storage.walk(paths.META)
    for folder, files in itertools.groupby(walk, key=lambda file: posixpath.dirname(file.path)):
        may_be_begun = posixpath.dirname(folder) in (paths.SNAPSHOTS, paths.CHECKPOINTS)
        is_begun = may_be_begun and not catalog.storage.exists(f"{folder}/{snapshot_files.SUMS}")
        for file in files:
            if paths.is_temporary(file.path):
                yield _temporary(file)
            elif is_begun:
                yield _orphan(file, "of a folder that was begun, not finished")


def _why_replaced(name: Named) -> str:
    if name.is_forgotten:
        return "holds rows that were forgotten: `modmill forget --collect` deletes it"
    return f"replaced or retired by version {name.ended}"


def _orphan(file: StoredFile, why: str) -> Finding:
    return Finding(kind="orphan", path=file.path, problem=f"{why}, {_age(file)} old")


def _temporary(file: StoredFile) -> Finding:
    why = f"of a writer that was killed or is at work, {_age(file)} old"
    return Finding(kind="temporary", path=file.path, problem=why)


def _age(file: StoredFile) -> str:
    """Returns roughly how old a file is by the clock of its store."""
    return units.age((datetime.datetime.now(datetime.UTC) - file.modified).total_seconds())
