"""Lays rows out as the library webdataset reads them: a folder of tars for each modality and form."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from engine.export.aligned_rows import CorpusRows, ExportColumn
from engine.export.picked_rows import Nulls
from engine.export.tar_writer import CorpusExport, TarFolder, TarRow
from manifests.formats import codecs
from manifests.pixels.images import encode_npy


def webdataset_folders(rows: CorpusRows, columns: Sequence[ExportColumn], nulls: Nulls) -> CorpusExport:
    """Returns a folder <corpus>/<modality>/<form> for each column, for any WebDataset loader.

    The members of a row: tokens <stem>.npy (the narrowest unsigned type), pixels and maps .png or .npy, text .txt, records
    .json. If the grain is crop, each crop has its own: <stem>.c00.npy, <stem>.c01.npy, ... If nulls are kept, each row also
    has <stem>.status.cls, the number of its status; if that is not 0, it is the only member.
    """
    named = {f"{column.modality.name} {column.form}": column for column in columns}
    folders = [
        TarFolder(
            path=f"{rows.corpus}/{column.modality.name}/{column.form}",
            columns=(column,),
            encode=partial(_webdataset_members, column, name, nulls),
        )
        for name, column in named.items()
    ]
    return CorpusExport(
        rows=rows, folders=folders, columns=named, tokenized=[column for column in columns if column.form == "token"]
    )


def _webdataset_members(column: ExportColumn, name: str, nulls: Nulls, row: TarRow) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    if nulls == "keep":
        members["status.cls"] = str(row.statuses[name]).encode()
    for crop, value in enumerate(row.values[0] or []):
        prefix = "" if column.crops is None else f"c{crop:02d}."
        extension, data = _member(column, value)
        members[prefix + extension] = data
    return members


def _member(column: ExportColumn, value: Any) -> tuple[str, bytes]:
    if column.form == "token":
        return "npy", encode_npy(value)
    if column.modality.kind == "text":
        return "txt", value.encode()
    if column.modality.is_structured:
        return "json", json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    if isinstance(value, list):
        return "npy", encode_npy(np.array(value, column.modality.dtype))
    return codecs.of_bytes(value).extension, value


def describe(column: ExportColumn) -> dict[str, Any]:
    """Describes a column for export.json."""
    return {
        "modality": column.modality.name,
        "form": column.form,
        "recipe": column.recipe,
        "crops": column.crops,
        "vocabulary": column.vocabulary,
        "tokenizer": None if column.tokenizer is None else column.tokenizer.path,
    }
