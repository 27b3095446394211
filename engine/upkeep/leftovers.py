"""Finds files that no live record names: replaced ones, orphans of killed runs, temporary ones. None of them is wrong."""

import datetime
import itertools
import posixpath
from collections.abc import Iterator
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


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Holds a file that no live record names. `named` is what the log says of it, None if it says nothing: then see `why`."""

    file: StoredFile
    named: Named | None = None
    why: str = "no record names it"

    @property
    def is_temporary(self) -> bool:
        return paths.is_temporary(self.file.path)

    def finding(self) -> Finding:
        """Returns the same in words."""
        # Roughly, by the clock of the file's store.
        age = units.age((datetime.datetime.now(datetime.UTC) - self.file.modified).total_seconds())
        kind: Kind = "orphan"
        problem = f"{self.why}, {age} old"
        if self.is_temporary:
            kind, problem = "temporary", f"of a writer that was killed or is at work, {age} old"
        elif self.named is not None:
            kind, problem = "replaced", f"replaced or retired by version {self.named.ended}"
            if self.named.is_forgotten:
                problem = "holds rows that were forgotten: `modmill forget --collect` deletes it"
        return Finding(kind=kind, path=self.file.path, problem=problem)


def leftovers(catalog: Catalog) -> Iterator[Leftover]:
    """Yields every such file of data, tokenizers and _meta, in their order; also those that only snapshots name.

    The folders are read one by one, so that a big workspace is never held at once.
    """
    for folder, files in itertools.groupby(catalog.storage.walk(paths.DATA), key=lambda file: paths.group(file.path)):
        known = audit.named_files(catalog, folder)
        for file in files:
            named = known.get(paths.stem(file.path))
            if named is None or not named.is_live or paths.is_temporary(file.path):
                yield Leftover(file=file, named=named)
    tokenizers = {tokenizer.path for tokenizer in audit.tokenizers(catalog)}
    for file in catalog.storage.walk(paths.TOKENIZERS):
        folder = "/".join(file.path.split("/")[:2])
        if folder.removesuffix(".json") not in tokenizers or paths.is_temporary(file.path):
            yield Leftover(file=file, why="of a tokenizer that no record names")
    walk = catalog.storage.walk(paths.META)
    for folder, files in itertools.groupby(walk, key=lambda file: posixpath.dirname(file.path)):
        may_be_begun = posixpath.dirname(folder) in (paths.SNAPSHOTS, paths.CHECKPOINTS)
        is_begun = may_be_begun and not catalog.storage.exists(f"{folder}/{snapshot_files.SUMS}")
        for file in files:
            if is_begun or paths.is_temporary(file.path):
                yield Leftover(file=file, why="of a folder that was begun, not finished")
