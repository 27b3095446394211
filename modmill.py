"""Gives Python everything of modmill.

    import modmill

    with modmill.open("work") as workspace:
        table = workspace.sql("SELECT key, source FROM samples LIMIT 3")  # a pyarrow.Table
        row = workspace.show("1f0c2a9be4d07c35", corpus="photos")         # everything known of one sample

A labeler, tokenizer or modality of your own imports what it needs from here and from nowhere else: `Labeler`, `LabelerSpec`,
`Modality`, `MODALITIES`, `Tokenizer`, `TokenizerSpec`, the errors that it may raise, and `check_label` for its tests.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import pyarrow as pa

    from labelers.protocol import Labeler, LabelerSpec, check_label
    from manifests.catalog.attached import Attached
    from manifests.errors import ConfigError, LabelError, ModmillError, TokenizeError
    from manifests.modality import MODALITIES, Modality
    from manifests.snapshots.snapshot import Snapshot
    from tokenize_jobs.protocol import Tokenizer, TokenizerSpec
    from train.data.loader import Loader

__all__ = [
    "MODALITIES",
    "ConfigError",
    "LabelError",
    "Labeler",
    "LabelerSpec",
    "Modality",
    "ModmillError",
    "TokenizeError",
    "Tokenizer",
    "TokenizerSpec",
    "Workspace",
    "check_label",
    "check_packages",
    "open",
]

_PACKAGES = ("engine", "labelers", "tokenize_jobs", "train", "manifests")
_HOMES = {
    "labelers.protocol": ("Labeler", "LabelerSpec", "check_label"),
    "manifests.errors": ("ConfigError", "LabelError", "ModmillError", "TokenizeError"),
    "manifests.modality": ("MODALITIES", "Modality"),
    "tokenize_jobs.protocol": ("Tokenizer", "TokenizerSpec"),
}


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `import modmill` alone loads nothing.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'modmill' has no attribute {name!r}")


def check_packages() -> None:
    """Raises ImportError if another package hides one of modmill's: `train` and `engine` are common names."""
    home = Path(__file__).resolve().parent
    for package in _PACKAGES:
        found = importlib.util.find_spec(package)
        origin = None if found is None or found.origin is None else Path(found.origin).resolve()
        if origin != home / package / "__init__.py":
            raise ImportError(
                f"the package {package!r} that Python finds is {origin or 'none'}, not modmill's {home / package}; take the "
                "folder that holds it off PYTHONPATH, or start from another folder"
            )


class Workspace:
    """Answers questions about a workspace from an index of its log, in this process."""

    def __init__(self, uri: str | Path) -> None:
        from manifests.catalog.catalog import Catalog

        self._catalog = Catalog.open(uri)

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> "pa.Table":
        """Returns the answer to a query over the views, up to date with the log.

        `.to_pandas()` makes a DataFrame of it; polars reads it without a copy. For SQL from strangers see `sql_locked`.
        """
        self._catalog.refresh()
        return self._catalog.sql(query, parameters)

    def sql_locked(self, query: str, *, timeout_s: float = 10, memory_bytes: int = 2_000_000_000) -> "pa.Table":
        """Returns the answer to a stranger's query, from a process that reaches nothing but the views.

        Raises QueryError if the query is refused, or exceeds its time or memory. See SECURITY.md.
        """
        from manifests.locked import locked

        self._catalog.refresh()
        return locked.ask(self._catalog, query, timeout_s=timeout_s, memory_bytes=memory_bytes)

    def attach(self, table: Any, *, on: Sequence[str] = ("corpus", "key"), name: str | None = None) -> "Attached":
        """Joins a table of your own to the samples; from here on `samples` has its columns too.

        `table` is a Parquet, CSV or JSON file, or a table of pyarrow, pandas or polars, with at most one row a sample. It
        can also be queried by its own name (`name`, or the stem of the file's name). The result prints how many of its
        rows match a sample. Raises ConfigError if a column is missing, occurs twice or has another type than in `samples`,
        if two rows are of one sample, or if the name is taken.

            workspace.attach("scores.parquet", on=["corpus", "key"])
            workspace.sql("SELECT key FROM samples WHERE aesthetic > 5")
        """
        self._catalog.refresh()
        return self._catalog.attach(table, on=on, name=name)

    def show(self, key: str, *, corpus: str) -> dict[str, Any]:
        """Returns everything known of one sample: its row of `samples`, and its labels, tokens and failures.

        Values are read from the current shards: `{"sample": {...}, "label": {modality: {crop: value}}, "token": {...},
        "failures": [...]}`; crop is None if the grain is sample; pixels and maps are the bytes of their members (PNG
        or .npy). Raises UserError if there is no such sample.
        """
        from manifests.queries import lookup

        self._catalog.refresh()
        return lookup.show(self._catalog, corpus, key)

    def snapshot(self, name: str) -> "Snapshot":
        """Reads a snapshot of this workspace: its modalities, the rows of its parts, its shards.

        `modmill snapshot` makes snapshots. Raises WorkspaceError if there is no snapshot of that name.
        """
        from manifests.snapshots import snapshot as snapshots

        return snapshots.read(self._catalog.storage, name)

    def loader(
        self,
        snapshot: str,
        *,
        batch: int,
        seed: int = 0,
        corpora: Sequence[str] | None = None,
        held_out: bool = False,
        workers: int = 0,
        prefetch: int = 2,
    ) -> "Loader":
        """Returns batches of token rows of a snapshot of this workspace, of some of its corpora or of all.

        `for batch in loader` never ends; `loader.batch_at(step)` gives one step. Needs the extra modmill[train]. Raises
        ConfigError if the snapshot has no rows to train on (with `held_out`, no rows that are held out).
        """
        from manifests.snapshots import snapshot as snapshots
        from train.data.loader import Loader
        from train.data.mixture import MixtureEntry
        from train.data.vocabulary import of_snapshots

        found = snapshots.read(self._catalog.storage, snapshot)
        entry = MixtureEntry(snapshot=found, corpora=None if corpora is None else tuple(corpora))
        vocabulary = of_snapshots([found])
        return Loader(
            [entry],
            vocabulary=vocabulary,
            seed=seed,
            batch=batch,
            held_out=held_out,
            workers=workers,
            prefetch=prefetch,
        )

    def close(self) -> None:
        """Closes the index."""
        self._catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open(uri: str | Path) -> Workspace:
    """Opens the workspace at a folder or an fsspec URI. Raises WorkspaceError if there is no workspace."""
    return Workspace(uri)
