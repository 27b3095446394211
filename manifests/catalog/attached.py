"""Attaches a user's own table to the samples: `attach("scores.parquet")` makes a table `scores`, and columns of `samples`."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from manifests.catalog.samples import NUMBERS, literal, quoted
from manifests.errors import ConfigError

DEFAULT_ON = ("corpus", "key")
_READERS = {
    "parquet": "read_parquet({file}{options})",
    "csv": "read_csv({file}, header = true{options})",
    "json": "read_json({file}{options})",
}
_KINDS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}


@dataclass(frozen=True, kw_only=True)
class Attached:
    """Holds a table that is attached: its name, the columns it joins `samples` on, and those it adds there.

    `source` is what it is made of, a file or a table; `sha256` that of the file, None for a table; `unmatched` counts the
    rows that match no sample.
    """

    name: str
    source: Any
    on: tuple[str, ...]
    columns: tuple[str, ...]
    rows: int
    unmatched: int
    sha256: str | None

    def __str__(self) -> str:
        matched = f"{self.rows - self.unmatched:,} of {self.rows:,} rows match a sample by {', '.join(self.on)}"
        return f"attached {self.name}: {matched}; samples has {', '.join(self.columns) or 'nothing'} of it"


def parse(text: str) -> tuple[str, tuple[str, ...]]:
    """Returns the file and the columns of an option `FILE` or `FILE:column,column`."""
    file, colon, columns = text.rpartition(":")
    if not colon or Path(text).is_file():
        return text, DEFAULT_ON
    return file, tuple(column.strip() for column in columns.split(","))


def document(text: str) -> dict[str, Any]:
    """Returns what the configuration of a run says of an option: the file's name and sha256. Raises ConfigError."""
    file, on = parse(text)
    return {"file": Path(file).name, "on": list(on), "sha256": _sha256_of(Path(os.path.expanduser(file)))}


def load(
    connection: duckdb.DuckDBPyConnection, source: Any, on: Sequence[str], name: str | None, taken: Sequence[str]
) -> Attached:
    """Copies a table into the connection, for `join` to put beside `sample_rows()`.

    `source` is a Parquet, CSV or JSON file (or lines of JSON), or a table that speaks Arrow (pyarrow, pandas, polars).
    `taken` are names that it may not have. Raises ConfigError for what is no such table, has no such columns to join on,
    has them twice or with another type than `samples`, or other columns that are there already.
    """
    path = Path(os.path.expanduser(source)).absolute() if isinstance(source, str | Path) else None
    name = _checked_name(connection, path, name, taken)
    there = _described(connection, "sample_rows()")
    on = _checked_columns("samples", on, there)
    try:
        if path is not None:
            _load_file(connection, path, name, {column: there[column] for column in on})
        else:
            _load_table(connection, source, name)
        given = _described(connection, name)
        _checked_columns(name, on, given)
        _check_types(name, on, given, there)
        _check_unique(connection, name, on)
        joined = ", ".join(map(quoted, on))
        rows, unmatched = connection.execute(
            f"SELECT (SELECT count(*) FROM {name}), (SELECT count(*) FROM {name} ANTI JOIN sample_rows() USING ({joined}))"
        ).fetchall()[0]
    except BaseException:
        connection.execute(f"DROP TABLE IF EXISTS {name}")
        raise
    return Attached(
        name=name,
        source=source if path is None else path,
        on=on,
        columns=tuple(column for column in given if column not in on),
        rows=rows,
        unmatched=unmatched,
        sha256=None if path is None else _sha256_of(path),
    )


def join(connection: duckdb.DuckDBPyConnection, tables: Sequence[Attached]) -> None:
    """Makes the view `samples`: the rows of `sample_rows()`, with the columns of the tables attached.

    Raises ConfigError if a column would stand there twice.
    """
    known = dict.fromkeys(_described(connection, "sample_rows()"), "samples")
    selected, source = ["s.*"], "sample_rows() s"
    for table in tables:
        for column in table.columns:
            if column in known:
                raise ConfigError(
                    f"{table.name} has a column {column!r}, and so has {known[column]}; give it another name in {table.name}"
                )
            known[column] = table.name
            selected.append(f"{table.name}.{quoted(column)}")
        matches = " AND ".join(f"s.{quoted(column)} = {table.name}.{quoted(column)}" for column in table.on)
        source += f" LEFT JOIN {table.name} ON {matches}"
    connection.execute(f"CREATE OR REPLACE TEMP VIEW samples AS SELECT {', '.join(selected)} FROM {source}")


def _checked_name(
    connection: duckdb.DuckDBPyConnection, path: Path | None, name: str | None, taken: Sequence[str]
) -> str:
    """Returns the table's name, one that SQL takes without quotes and that nothing else has."""
    if name is None:
        if path is None:
            raise ConfigError("a table that is no file needs a name: attach(table, name='scores')")
        name = path.stem
    asked = (
        "SELECT 1 FROM duckdb_keywords() WHERE keyword_name = lower($1) AND keyword_category = 'reserved' UNION ALL "
        "SELECT 1 FROM duckdb_views() WHERE view_name = lower($1) UNION ALL "
        "SELECT 1 FROM duckdb_tables() WHERE table_name = lower($1)"
    )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError(
            f"SQL takes no table called {name!r}; rename the file, or give a name of letters, digits and _"
        )
    if name.lower() in {other.lower() for other in taken} or connection.execute(asked, [name]).fetchall():
        raise ConfigError(f"the name {name!r} is taken, by a view, another table or SQL itself; give another")
    return name.lower()


def _load_file(connection: duckdb.DuckDBPyConnection, path: Path, name: str, types: Mapping[str, str]) -> None:
    """Makes the table of a file; columns that are joined on have the types of `samples`."""
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: a file that is attached ends with one of {', '.join(_KINDS)}")
    reader = _READERS[kind].format(file=literal(str(_existing(path))), options="")
    try:
        if kind != "parquet":
            # A key is text whatever it looks like: 0123 is not 123, and 12e4 no number.
            found = _described(connection, reader)
            columns = ", ".join(f"{_text(column)}: {_text(types.get(column, found[column]))}" for column in found)
            reader = _READERS[kind].format(file=literal(str(path)), options=f", columns = {{{columns}}}")
        connection.execute(f"CREATE TEMP TABLE {name} AS SELECT * FROM {reader}")
    except duckdb.Error as error:
        raise ConfigError(f"{path} cannot be read as {kind}: {str(error).splitlines()[0]}") from error


def _sha256_of(path: Path) -> str:
    with _existing(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file to attach")
    return path


def _load_table(connection: duckdb.DuckDBPyConnection, table: Any, name: str) -> None:
    import pyarrow as pa

    try:
        given = pa.table(table)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise ConfigError(
            f"{name}: {type(table).__name__} is no table; expected a file, or a table of pyarrow, pandas or polars"
        ) from error
    connection.register("given_table", given)
    try:
        connection.execute(f"CREATE TEMP TABLE {name} AS SELECT * FROM given_table")
    except duckdb.Error as error:
        raise ConfigError(f"{name}: the table cannot be taken: {str(error).splitlines()[0]}") from error
    finally:
        connection.unregister("given_table")


def _described(connection: duckdb.DuckDBPyConnection, source: str) -> dict[str, str]:
    """Returns the columns of a table or function, in lower case as SQL compares them, and their types."""
    described = connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
    return {column.lower(): kind for column, kind, *_ in described}


def _checked_columns(name: str, on: Sequence[str], columns: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the columns to join on, in lower case."""
    wanted = tuple(column.lower() for column in on)
    missing = [column for column in wanted if column not in columns]
    if missing or not wanted or len(set(wanted)) < len(wanted):
        raise ConfigError(
            f"on={list(on)}: expected columns of {name}, each once; it has {', '.join(columns) or 'none'}"
        )
    return wanted


def _check_types(name: str, on: Sequence[str], given: Mapping[str, str], there: Mapping[str, str]) -> None:
    for column in on:
        if given[column] != there[column] and not {given[column], there[column]} <= NUMBERS:
            raise ConfigError(
                f"{name}.{column} is {given[column]}, samples.{column} is {there[column]}; write it as that"
            )


def _check_unique(connection: duckdb.DuckDBPyConnection, name: str, on: Sequence[str]) -> None:
    columns = ", ".join(map(quoted, on))
    twice = connection.execute(
        f"SELECT {columns}, count(*) FROM {name} WHERE COLUMNS([{', '.join(map(_text, on))}]) IS NOT NULL "
        f"GROUP BY {columns} HAVING count(*) > 1 ORDER BY {columns} LIMIT 1"
    ).fetchall()
    if twice:
        *values, count = twice[0]
        row = ", ".join(f"{column} {value!r}" for column, value in zip(on, values, strict=True))
        raise ConfigError(f"{name} has {count} rows of {row}; expected one row a sample at most")


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
