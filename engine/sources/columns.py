"""Reads the source columns of images: files beside them, and tables (CSV, TSV, Parquet or JSONL) joined by their names."""

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.sources.listing import File, Notes, open_file, read_file, stem, suffix
from engine.sources.values import column_names, decoded, parsed, plain_values
from manifests.errors import ConfigError, SourceError, nearest
from manifests.store.uris import absolute, without_credentials

SIDECARS = (".txt", ".json")
_SIDECAR_BYTES = 16 << 20


def image_columns(
    root: str, files: Sequence[File], images: Sequence[File], table: str | None, key: str | None, notes: Notes
) -> Callable[[str], dict[str, Any]]:
    """Returns a function that reads the source columns of the image at a path.

    `photo.txt` is the column `caption`, the keys of `photo.json` are columns, and the table's replace both. What cannot be
    read becomes a note. Raises ConfigError for a table that does not fit.
    """
    beside = [{stem(file.path): file for file in files if suffix(file.path) == kind} for kind in SIDECARS]
    joined: dict[str, int] = {}
    loaded, joined_by = None, ""
    if table is not None:
        loaded = read_table(table, key, notes)
        joined_by = join_column(loaded, key)
        joined = join(loaded, joined_by, [image.path for image in images], root, notes)

    def read(path: str) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        for of_kind in beside:
            if found := of_kind.get(stem(path)):
                name = found.path
                columns.update(columns_beside(partial(read_file, root, name), name, found.size_bytes, notes))
        if loaded is not None and path in joined:
            columns.update(loaded.row(joined[path], joined_by))
        return columns

    return read


def columns_beside(read: Callable[[], bytes], path: str, size_bytes: int, notes: Notes) -> dict[str, Any]:
    """Reads the file `path` beside an image: `.txt` is the column `caption`, the keys of a JSON object are columns.

    Adds a note if it cannot be read, or is larger than any such file is.
    """
    is_caption = suffix(path) == ".txt"
    noun = "caption" if is_caption else "sidecar"
    if size_bytes > _SIDECAR_BYTES:
        notes.add(noun, f"of more than {_SIDECAR_BYTES >> 20} MiB, left out", path)
        return {}
    try:
        text, exact = decoded(read())
        if is_caption and not exact:
            notes.add(noun, "not in UTF-8, read with replacement characters", path)
        value = {"caption": text.strip()} if is_caption else parsed(text)
    except SourceError as error:
        notes.add(noun, "that cannot be read", str(error))
        return {}
    except ValueError as error:
        notes.add(noun, "without valid JSON, left out", f"{path} ({error})")
        return {}
    if not isinstance(value, dict):
        notes.add(noun, "without a JSON object, left out", path)
        return {}
    return value


JOIN_COLUMNS = ("path", "file", "file_name", "filename", "image", "key")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]{0,16})(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,2})?")
# A caption may be longer than the 128 KiB that a CSV field is allowed by default.
_CSV_FIELD_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Table:
    """Holds a table in memory, by column; all columns have `rows` values."""

    name: str
    rows: int
    columns: Mapping[str, Sequence[Any]]

    def row(self, number: int, without: str) -> dict[str, Any]:
        """Returns one row as a dict, without the column that it was joined by."""
        return {name: values[number] for name, values in self.columns.items() if name != without}


def read_table(location: str, key: str | None, notes: Notes) -> Table:
    """Reads a CSV, TSV, Parquet or JSONL file into memory. Cells are numbers if all of their column are.

    The column named `key` and those of `JOIN_COLUMNS` are kept as text. Raises ConfigError if it cannot be read.
    """
    root, _, name = absolute(location, Path.cwd()).rpartition("/")
    root = root or "/"
    kind = suffix(name)
    shown = without_credentials(location)
    if kind not in TABLE_SUFFIXES:
        raise ConfigError(f"table {shown} has the suffix {kind!r}, expected {', '.join(TABLE_SUFFIXES)}")
    try:
        if kind == ".parquet":
            columns = _parquet_columns(root, name, notes)
        elif kind in (".csv", ".tsv"):
            text, exact = decoded(read_file(root, name))
            if not exact:
                notes.add("table", "not in UTF-8, read with replacement characters", name)
            columns = _csv_columns(name, text, kind, (key or "", *JOIN_COLUMNS), notes)
        else:
            columns = _jsonl_columns(name, read_file(root, name), notes)
    except SourceError as error:
        raise ConfigError(f"table {shown}: {error}") from error
    return Table(name=name, rows=len(next(iter(columns.values()), ())), columns=columns)


def join_column(table: Table, key: str | None) -> str:
    """Returns the column that names the image: `key`, else the first of `JOIN_COLUMNS`. Raises ConfigError if it is missing."""
    if key is not None:
        if key not in table.columns:
            raise ConfigError(f"table {table.name} has no column {key!r} (`key`); {nearest(key, table.columns)}")
        return key
    found = next((name for name in JOIN_COLUMNS if name in table.columns), None)
    if found is None:
        raise ConfigError(
            f"table {table.name} has none of the columns {', '.join(JOIN_COLUMNS)}; it has "
            f"{', '.join(table.columns) or 'none'}; name the one that holds the image's path with `key:`"
        )
    return found


def join(table: Table, column: str, paths: Sequence[str], root: str, notes: Notes) -> dict[str, int]:
    """Returns the row of each image's path that has one. A row names a path below the source, else a file's bare name."""
    by_path = {_normal(path): path for path in paths}
    by_name: dict[str, list[str]] = {}
    for path in paths:
        by_name.setdefault(_normal(path.rpartition("/")[2]), []).append(path)
    joined: dict[str, int] = {}
    for number, value in enumerate(table.columns[column]):
        path = _match(str(value if value is not None else ""), by_path, by_name, root, table.name)
        if path is None:
            notes.add("row", f"of {table.name} without an image", str(value))
        elif path in joined:
            notes.add("row", f"of {table.name} for an image that has one already, left out", path)
        else:
            joined[path] = number
    if table.rows and not joined:
        raise ConfigError(
            f"table {table.name}: none of its {table.rows} rows names an image; its column {column!r} holds "
            f"{table.columns[column][0]!r}, images are called {paths[0]!r}; name another column with `key:`"
        )
    for path in paths:
        if path not in joined:
            notes.add("image", f"without a row in {table.name}", path)
    return joined


def _match(
    value: str, by_path: Mapping[str, str], by_name: Mapping[str, list[str]], root: str, table: str
) -> str | None:
    exact = _normal(value)
    # Tables made elsewhere write ./a.jpg, a\b.jpg, or the whole path.
    for spelling in (exact, exact.replace("\\", "/").removeprefix("./"), exact.removeprefix(f"{root}/")):
        if spelling in by_path:
            return by_path[spelling]
    found = by_name.get(exact, [])
    if len(found) > 1:
        raise ConfigError(
            f"table {table}: {value!r} may be {found[0]!r} or {found[1]!r}; write the path below the source in the table"
        )
    return found[0] if found else None


def _normal(path: str) -> str:
    # macOS writes é in file names as two characters, tables as one.
    return unicodedata.normalize("NFC", path)


def _csv_columns(name: str, text: str, kind: str, as_text: Sequence[str], notes: Notes) -> dict[str, list[Any]]:
    csv.field_size_limit(_CSV_FIELD_BYTES)
    delimiter = "\t" if kind == ".tsv" else _delimiter(text)
    rows = _csv_rows(name, text, delimiter)
    header = next(rows, [])
    twice = next((column for column in header if column and header.count(column) > 1), None)
    if twice is not None:
        raise ConfigError(f"table {name} has two columns {twice!r}; rename one")
    values: list[list[str]] = [[] for _ in header]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            if row:
                notes.add("row", f"of {name} without the header's {len(header)} fields, left out", f"row {number}")
            continue
        for column, cell in zip(values, row, strict=True):
            column.append(cell)
    typed = zip(header, values, strict=True)
    # A column without a name is the index that pandas writes.
    return {column: _numbers(cells, column in as_text) for column, cells in typed if column}


def _csv_rows(name: str, text: str, delimiter: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    except csv.Error as error:
        raise ConfigError(f"table {name} is no valid CSV: {error}") from error


def _delimiter(text: str) -> str:
    # Spreadsheets of half the world write semicolons.
    header = text.partition("\n")[0]
    return max(",;\t", key=header.count)


def _numbers(cells: Sequence[str], as_text: bool) -> list[Any]:
    """Returns the cells as integers or floats if all of them are; an empty cell is null. 007 is not a number."""
    filled = [cell for cell in cells if cell != ""]
    convert: Callable[[str], Any] = str
    if filled and not as_text:
        if all(_INTEGER.fullmatch(cell) for cell in filled):
            convert = int
        elif all(_NUMBER.fullmatch(cell) for cell in filled):
            convert = float
    return [None if cell == "" else convert(cell) for cell in cells]


def _jsonl_columns(name: str, data: bytes, notes: Notes) -> dict[str, list[Any]]:
    rows = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parsed(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            notes.add("line", f"of {name} without a JSON object, left out", f"line {number}")
    names = dict.fromkeys(column for row in rows for column in row)
    return {column: [row.get(column) for row in rows] for column in names}


def _parquet_columns(root: str, name: str, notes: Notes) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(root, name) as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            kinds = {column: schema.field(column).type for column in column_names(schema)}
            binary = [
                column for column, kind in kinds.items() if pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
            ]
            wanted = [column for column in kinds if column not in binary]
            table = parquet.read(wanted, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"table {name} is no valid Parquet file: {error}") from error
    for column in binary:
        notes.add("column", f"of {name} with binary values, left out", column)
    for column in schema.names:
        if column not in kinds:
            notes.add("column", f"of {name} of a name that is empty or stands twice, left out", repr(column))

    def values(column: str) -> list[Any]:
        def lost(row: int) -> None:
            notes.add("value", f"of {name} that cannot be held, left out", f"row {row} ({column})")

        return plain_values(table[column], lost)

    return {column: values(column) for column in wanted}
