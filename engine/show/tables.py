"""Writes tables for people and for scripts: on the terminal, CSV, JSON, Parquet."""

import contextlib
import csv
import datetime
import decimal
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from manifests.errors import ConfigError, QueryError

if TYPE_CHECKING:
    # Answers that come as plain rows need no pyarrow, whose import takes as long as everything else together.
    import pyarrow as pa

_LONGEST_CELL = 120
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def check_target(form: str, out: Path | None) -> None:
    """Raises ConfigError for Parquet on a terminal, before anything is asked."""
    if form == "parquet" and out is None and sys.stdout.isatty():
        raise ConfigError("Parquet is no text for a terminal: give --out FILE, or send it on with > or |")


def write(table: "pa.Table", form: str, out: Path | None = None) -> None:
    """Writes a table as `form` (table, csv, json, parquet) to a file, or to standard output."""
    if form == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, sys.stdout.buffer if out is None else str(out))
    else:
        rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
        write_rows(table.column_names, rows, form, out)


def write_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]], form: str, out: Path | None = None) -> None:
    """Writes rows of plain values as `form` (table, csv, json) to a file, or to standard output."""
    with _stream(out) as stream:
        if form == "csv":
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([_text(value) for value in row] for row in rows)
        elif form == "json":
            if len(set(columns)) < len(columns):
                raise QueryError(f"JSON needs a name for each column, these are {', '.join(columns)}: rename with AS")
            named = [dict(zip(columns, row, strict=True)) for row in rows]
            json.dump(named, stream, default=_json, ensure_ascii=False, indent=1)
            stream.write("\n")
        else:
            _write_table(columns, rows, stream)


def write_records(columns: Sequence[str], records: Sequence[Mapping[str, Any]], form: str) -> None:
    """Writes these columns of records to standard output, as `write_rows` does."""
    write_rows(columns, [[record[name] for name in columns] for record in records], form)


def plain_lines(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> Iterator[str]:
    """Yields rows of cells as lines of text, each column as wide as its widest cell; the columns `right` stand right.

    Unlike rich's tables these take no width into account, and cost nothing to import: pipes and logs get them.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip()


@contextlib.contextmanager
def _stream(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
    else:
        with out.open("w", encoding="utf-8", newline="") as file:
            yield file


def _write_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], stream: TextIO) -> None:
    cells = [[_cell(value) for value in row] for row in rows]
    numbers = [all(_is_number(row[place]) for row in rows) for place in range(len(columns))]
    if stream.isatty():
        _write_fitting(columns, cells, numbers, stream)
    else:
        # Off a terminal there is no width to fit: lines stay whole, so that they can be searched.
        right = [place for place, is_number in enumerate(numbers) if is_number]
        head, *lines = plain_lines([columns, *cells], right)
        rule = plain_lines([["─" * max(map(len, column)) for column in zip(columns, *cells, strict=True)]])
        stream.writelines(f"{line}\n" for line in (head, *rule, *lines))
    stream.write(f"{len(rows):,} row{'s' * (len(rows) != 1)}\n")


def _write_fitting(
    columns: Sequence[str], cells: Sequence[Sequence[str]], numbers: Sequence[bool], stream: TextIO
) -> None:
    """Writes the table in the width of the terminal; long cells are folded."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, right in zip(columns, numbers, strict=True):
        shown.add_column(Text(column), justify="right" if right else "left", overflow="fold")
    for row in cells:
        shown.add_row(*map(Text, row))
    Console(file=stream).print(shown)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    """Returns a value as one line of printable text: what captions and file names hold must not steer the terminal."""
    text = f"{value:.6g}" if isinstance(value, float) else _text(value)
    text = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
    return text if len(text) <= _LONGEST_CELL else text[: _LONGEST_CELL - 1] + "…"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json.dumps(value, default=_json, ensure_ascii=False)
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _json(value: Any) -> Any:
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, decimal.Decimal):
        # A sum of integers is a decimal in Arrow.
        return int(value) if value.as_tuple().exponent == 0 else float(value)
    return str(value)
