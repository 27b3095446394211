"""Makes and reads snapshots: a frozen, hashed selection of rows and token shards, which training names as WORKSPACE#NAME.

A row is held out if the first 8 bytes of sha256(key), a big-endian number, are under hold_out x 2**64, so that every
snapshot of every workspace holds out the same keys. With `split_by` the value of a column takes the key's place, so
that rows of one group are on one side. Reading needs pyarrow alone; making needs a catalog. The files are
told in `manifests/formats/snapshots.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from manifests.errors import ConfigError, ShardError, WorkspaceError
from manifests.formats import snapshots as snapshot_files
from manifests.formats.snapshots import HOLD_OUT, names
from manifests.log import entries as log
from manifests.log.actions import SnapshotAdded
from manifests.modality import Grain, Kind
from manifests.recipe import sha256_hex
from manifests.snapshots import selection
from manifests.store import paths
from manifests.store.storage import Storage, open_storage

if TYPE_CHECKING:
    from manifests.catalog.catalog import Catalog


@dataclass(frozen=True, kw_only=True)
class SnapshotModality:
    """Describes a modality of a snapshot, with the one tokenizer that made its tokens in every corpus.

    `tokens` is how many a row has, exactly; the most of a sequence, None if it has no limit. `tokenizer_path` is
    relative to the workspace.
    """

    modality: str
    kind: Kind
    grain: Grain
    vocabulary: int
    tokens: int | None
    tokenizer: str
    tokenizer_family: str
    tokenizer_digest: str
    tokenizer_path: str

    @property
    def is_sequence(self) -> bool:
        """Tells whether rows have as many tokens as they need."""
        return self.kind in ("structured", "text")


@dataclass(frozen=True, kw_only=True, eq=False)
class SnapshotPart:
    """Holds a part with rows selected: `selected` and, among them, `held_out` are bool (rows,)."""

    corpus: str
    corpus_kind: str
    part: int
    rows: int
    keys_sha256: str
    selected: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SnapshotShard:
    """Names a token shard of a part; `crop` is None if the grain is sample, `path` is relative to the workspace."""

    corpus: str
    part: int
    modality: str
    crop: int | None
    fingerprint: str
    path: str
    sha256: str
    size_bytes: int
    format: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Snapshot:
    """Holds a snapshot as it was read; `sha256` is its identity."""

    storage: Storage
    name: str
    sha256: str
    where: str | None
    hold_out: float = HOLD_OUT
    complete: bool = False
    split_by: str | None = None
    modalities: tuple[SnapshotModality, ...]
    parts: tuple[SnapshotPart, ...]
    shards: tuple[SnapshotShard, ...]

    def __repr__(self) -> str:
        names = ", ".join(modality.modality for modality in self.modalities)
        return f"<Snapshot {self.uri}: {self.rows:,} rows, {self.held_out_rows:,} of them held out; {names}>"

    @cached_property
    def rows(self) -> int:
        """Returns how many rows are selected, with those held out."""
        return sum(int(np.count_nonzero(part.selected)) for part in self.parts)

    @cached_property
    def held_out_rows(self) -> int:
        """Returns how many rows are never trained on."""
        return sum(int(np.count_nonzero(part.held_out)) for part in self.parts)

    @property
    def uri(self) -> str:
        """Returns what `open_snapshot` takes."""
        return f"{self.storage.uri}#{self.name}"


# -- reading ----------------------------------------------------------------------------------------------------------


def open_snapshot(uri: str) -> Snapshot:
    """Opens the snapshot at WORKSPACE#NAME; WORKSPACE is a folder or an fsspec URI.

    Raises WorkspaceError if either is missing or newer than this code, ShardError if the snapshot was altered.
    """
    workspace, _, name = uri.rpartition("#")
    storage = open_storage(workspace or uri.removesuffix("#"))
    log.workspace_id(storage)
    if not workspace or not name:
        raise WorkspaceError(
            f"{uri!r} names no snapshot; expected WORKSPACE#NAME; snapshots there: {', '.join(names(storage)) or 'none'}"
        )
    return read(storage, name)


def read(storage: Storage, name: str, *, even_replaced: bool = False) -> Snapshot:
    """Reads a snapshot and checks it against its SHA256SUMS.

    Raises WorkspaceError if there is none of that name, its format is newer, or another replaced it after a forget
    (unless `even_replaced`: its shards may be gone), ShardError if it was altered.
    """
    files = snapshot_files.read(storage, name)
    if not even_replaced:
        snapshot_files.check_not_replaced(storage, name)
    snapshot = Snapshot(
        storage=storage,
        name=name,
        sha256=files.sha256,
        where=files.document["where"],
        hold_out=files.document["hold_out"],
        complete=files.document.get("complete", False),
        split_by=files.document.get("split_by"),
        modalities=tuple(SnapshotModality(**row) for row in files.tables["modalities"].to_pylist()),
        parts=tuple(_part(row) for row in files.tables["parts"].to_pylist()),
        shards=tuple(SnapshotShard(**row) for row in files.tables["shards"].to_pylist()),
    )
    _check_agreement(snapshot, files.document)
    return snapshot


def _part(row: Mapping[str, Any]) -> SnapshotPart:
    bits = {
        name: np.unpackbits(np.frombuffer(row[name], np.uint8), count=row["rows"], bitorder="little").view(bool)
        for name in ("selected", "held_out")
    }
    return SnapshotPart(**{**row, **bits})


def _check_agreement(snapshot: Snapshot, document: Mapping[str, Any]) -> None:
    """Raises ShardError if the tables are not of one selection."""
    modalities = [modality.modality for modality in snapshot.modalities]
    parts = [(part.corpus, part.part) for part in snapshot.parts]
    counts = {"rows": snapshot.rows, "held_out": snapshot.held_out_rows, "modalities": modalities}
    problems = [
        f"{name} is {document[name]} in snapshot.json, but {found} in the tables"
        for name, found in counts.items()
        if document[name] != found
    ]
    if any((part.held_out & ~part.selected).any() for part in snapshot.parts):
        problems.append("a row is held out that is not selected")
    if modalities != sorted(set(modalities)) or parts != sorted(set(parts)):
        problems.append("modalities or parts are not in order, each once")
    known_parts, known_modalities = set(parts), set(modalities)
    if any(
        (shard.corpus, shard.part) not in known_parts or shard.modality not in known_modalities
        for shard in snapshot.shards
    ):
        problems.append("a shard is of a part or a modality that is not there")
    if problems:
        raise ShardError(
            f"snapshot {snapshot.name!r} of {snapshot.storage.uri}: {problems[0]}; restore it from a copy, or make another"
        )


# -- making -----------------------------------------------------------------------------------------------------------


def make(
    catalog: "Catalog",
    name: str,
    *,
    where: str | None = None,
    modalities: Sequence[str] | None = None,
    hold_out: float = HOLD_OUT,
    complete: bool = False,
    split_by: str | None = None,
    run: str,
) -> Snapshot:
    """Freezes a selection under a name; a snapshot of equal content that stands there is returned as it is.

    where       SQL condition over `samples`, with any view in subqueries; None picks every row
    modalities  names, or `name=DIGITS` for the recipe that begins so; None: all with current tokens in Parquet
    hold_out    share of the keys that is never trained on, 0 <= hold_out < 1
    complete    takes only rows that have ok tokens of every modality, in each crop
    split_by    a column of `samples`: rows of one value are held out together

    A row that has no token of any of the modalities is left out. Raises WorkspaceError if another content has the
    name, and what `selection.select` raises.
    """
    snapshot_files.check_name(name)
    if not 0 <= hold_out < 1:
        raise ConfigError(f"hold_out is {hold_out}; expected a share of the keys, 0 <= hold_out < 1")
    catalog.refresh()
    tables = selection.select(
        catalog, where=where, modalities=modalities, hold_out=hold_out, complete=complete, split_by=split_by
    )
    options = {"where": where, "hold_out": float(hold_out), **chosen_by(complete, split_by)}
    document = {"workspace": catalog.workspace_id, **options}
    files = snapshot_files.encode(document, tables)
    recorded = _recorded(catalog).get(name)
    if snapshot_files.is_whole(catalog.storage, name):
        snapshot_files.check_same(catalog.storage, name, files)
    elif recorded not in (None, sha256_hex(files[snapshot_files.SUMS])):
        raise WorkspaceError(
            f"the log of {catalog.storage.uri} knows a snapshot {name!r} of another content, whose files are gone; "
            "restore them from a copy, or choose another name"
        )
    else:
        snapshot_files.write(catalog.storage, name, files)
    return record(catalog, name, run=run)


def chosen_by(complete: bool, split_by: str | None) -> dict[str, Any]:
    """Returns what the document of a snapshot says of options that were asked for; those of earlier snapshots have none."""
    return ({"complete": True} if complete else {}) | ({} if split_by is None else {"split_by": split_by})


def record(catalog: "Catalog", name: str, *, run: str) -> Snapshot:
    """Puts a snapshot that stands into the log, if a crash kept it from there. Raises what `read` raises."""
    snapshot = read(catalog.storage, name)
    if name not in _recorded(catalog):
        catalog.commit([record_of(snapshot)], run=run)
    return snapshot


def record_of(snapshot: Snapshot, *, replaces: str | None = None) -> SnapshotAdded:
    """Returns what the log says of a snapshot."""
    return SnapshotAdded(
        snapshot=snapshot.name,
        path=paths.snapshot(snapshot.name),
        sha256=snapshot.sha256,
        rows=snapshot.rows,
        held_out=snapshot.held_out_rows,
        where=snapshot.where,
        modalities=[modality.modality for modality in snapshot.modalities],
        replaces=replaces,
    )


def _recorded(catalog: "Catalog") -> dict[str, str]:
    """Returns the snapshots that the log knows, with their sha256."""
    return {row["snapshot"]: row["sha256"] for row in catalog.snapshots().to_pylist()}
