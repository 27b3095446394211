"""Writes exports as folders of WebDataset tars that are aligned by shard number, by the order of members, and by stem.

    TARGET/export.json                       what is exported from where; written first
    TARGET/<folder>/shard-00000.tar          USTAR without times or owners: equal rows give equal bytes
    TARGET/tokenizers/<name>-<digest>/...    the tokenizers of what is exported
    TARGET/SHA256SUMS                        as `sha256sum -c` checks it; written last: with it the export is whole

In 4M's layout rows may also be plain files, or text in Parquet (`engine/export/series.py`). After a kill the same command
begins the export again and keeps the files that are already as they must be.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.export.aligned_rows import CorpusRows, ExportColumn, PartRows
from engine.export.picked_rows import Nulls
from engine.export.series import Series, TarSeries, put
from engine.progress.progress import Progress
from manifests import units
from manifests.errors import ConfigError
from manifests.formats.shards import Status, member_name
from manifests.recipe import canonical_json, sha256_hex
from manifests.store.storage import Storage

DOCUMENT = "export.json"
SUMS = "SHA256SUMS"


@dataclass(frozen=True, kw_only=True)
class TarRow:
    """Holds a row of a folder: for each of its columns the values of the crops, None if null; the status in all columns."""

    corpus: str
    part: int
    row: int
    key: str
    values: Sequence[list[Any] | None]
    statuses: Mapping[str, int]

    @property
    def value(self) -> Any:
        """Returns the first crop's value in the first column, None if it is null."""
        return None if self.values[0] is None else self.values[0][0]


@dataclass(frozen=True, kw_only=True, eq=False)
class TarFolder:
    """Describes a folder of tars: the columns it is made from, and what makes a row's members (extension to bytes)."""

    path: str
    columns: Sequence[ExportColumn]
    encode: Callable[[TarRow], Mapping[str, bytes]]


@dataclass(frozen=True, kw_only=True)
class CorpusExport:
    """Holds the folders of one corpus, and its columns by name; a row is null if it is not ok in one of these.

    `series` is what rows are written into. The files of the tokenizers of `tokenized` go along.
    """

    rows: CorpusRows
    folders: Sequence[TarFolder]
    columns: Mapping[str, ExportColumn]
    tokenized: Sequence[ExportColumn]
    series: Callable[[Storage, str, int], Series] = TarSeries


@dataclass
class Written:
    """Counts what an export wrote: rows, files, bytes, null rows, and these by the column in which they are null."""

    rows: int = 0
    files: int = 0
    size_bytes: int = 0
    nulls: Counter[str] = field(default_factory=Counter)
    null_rows: int = 0
    is_done_before: bool = False


def write(
    exports: Sequence[CorpusExport],
    target: Storage,
    document: Mapping[str, Any],
    *,
    nulls: Nulls,
    rows_per_shard: int,
    progress: Progress,
) -> Written:
    """Writes the tars of all folders; `document` goes into export.json.

    Raises ConfigError if the target holds anything else, ShardError if a shard is not the one that was committed.
    """
    written = Written()
    if not _begin(target, document):
        written.is_done_before = True
        return written
    sums: dict[str, str] = {}
    progress.stage("export", sum(export.rows.rows for export in exports), "rows")
    for export in exports:
        sums |= _put_tokenizers(export, target)
        every = [export.series(target, folder.path, rows_per_shard) for folder in export.folders]
        done = 0
        for part in export.rows.parts():
            _write_part(export, part, every, nulls, written)
            done += int(np.count_nonzero(part.picked))
            size_bytes = written.size_bytes + sum(series.size_bytes for series in every)
            progress.update("export", done, item=export.rows.corpus, note=units.size(size_bytes))
            if part.problems:
                progress.say(
                    f"{len(part.problems):,} photographs of part {part.number} cannot be had: {part.problems[0]}"
                )
        for series in every:
            series.close()
            sums |= series.sums
            written.files += len(series.sums)
            written.size_bytes += series.size_bytes
    if not written.rows:
        nulls_of = ", ".join(f"{name} {count:,}" for name, count in written.nulls.most_common())
        raise ConfigError(
            f"every row is null in a chosen modality ({nulls_of}); choose others with --modalities, or take --nulls keep"
        )
    lines = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(sums.items()))
    target.put(SUMS, lines.encode())
    return written


def _put_tokenizers(export: CorpusExport, target: Storage) -> dict[str, str]:
    """Puts the files of the tokenizers that an export goes with; returns their sha256 by path."""
    sums = {}
    for tokenizer in dict.fromkeys(column.tokenizer for column in export.tokenized if column.tokenizer is not None):
        for name, data in tokenizer.read(export.rows.catalog.storage).items():
            path = f"{tokenizer.path}/{name}"
            sums[path] = sha256_hex(data)
            put(target, path, data, sums[path])
    return sums


def _begin(target: Storage, document: Mapping[str, Any]) -> bool:
    """Writes export.json; returns False if the same export is there, whole. Raises ConfigError if anything else is."""
    data = canonical_json(document)
    if target.exists(DOCUMENT):
        standing = json.loads(target.read(DOCUMENT))
        wanted = json.loads(data)
        # The longest comes last, so that a short one is named in the message.
        differs = [
            name for name in sorted(wanted, key=lambda name: name == "folders") if standing.get(name) != wanted[name]
        ]
        if differs:
            name = differs[0]
            values = "are others" if name == "folders" else f"is {standing.get(name)!r}, here {wanted[name]!r}"
            raise ConfigError(f"{target.uri} holds another export (its {name} {values}); export to another folder")
        return not target.exists(SUMS)
    if names := target.names(""):
        raise ConfigError(f"{target.uri} is not empty ({names[0]}, ...); export to a new folder")
    target.put(DOCUMENT, data)
    return True


def _write_part(export: CorpusExport, part: PartRows, every: Sequence[Series], nulls: Nulls, written: Written) -> None:
    statuses = {name: part.statuses(column) for name, column in export.columns.items()}
    is_null = np.zeros(len(part.keys), bool)
    for name, found in statuses.items():
        nulls_found = part.picked & (found != Status.OK)
        if count := int(np.count_nonzero(nulls_found)):
            written.nulls[name] += count
        is_null |= nulls_found
    written.null_rows += int(np.count_nonzero(is_null))
    rows = np.flatnonzero(part.picked & ~is_null if nulls == "drop" else part.picked)
    written.rows += len(rows)
    if not len(rows):
        return
    for folder, series in zip(export.folders, every, strict=True):
        values = [part.values(column) for column in folder.columns]
        for row in rows.tolist():
            key = part.keys[row]
            content = TarRow(
                corpus=export.rows.corpus,
                part=part.number,
                row=row,
                key=key,
                values=[column[row] for column in values],
                statuses={name: int(found[row]) for name, found in statuses.items()},
            )
            series.add(member_name(key), folder.encode(content))
