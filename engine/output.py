"""Tables for people and for scripts: on the terminal, CSV, JSON, Parquet."""

import csv
import datetime
import decimal
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal, TextIO

import pyarrow as pa

Format = Literal["table", "csv", "json", "parquet"]
_LONGEST_CELL = 120


def write(table: pa.Table, form: Format, out: TextIO | None = None) -> None:
    """Writes a table to standard output, or to `out`; Parquet goes there as bytes."""
    stream = out or sys.stdout
    if form == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, stream.buffer)
    elif form == "csv":
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(table.column_names)
        writer.writerows([_text(value) for value in row.values()] for row in table.to_pylist())
    elif form == "json":
        json.dump(table.to_pylist(), stream, default=_json, ensure_ascii=False, indent=1)
        stream.write("\n")
    else:
        _write_table(table, stream)


def rows_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> pa.Table:
    """Rows as an Arrow table with these columns, also where there are no rows."""
    return pa.table({name: [row[name] for row in rows] for name in columns})


def _write_table(table: pa.Table, stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for field in table.schema:
        is_number = (
            pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
        )
        shown.add_column(Text(field.name), justify="right" if is_number else "left", overflow="fold")
    for row in table.to_pylist():
        shown.add_row(*(Text(_cell(value)) for value in row.values()))
    # Off a terminal there is no width to fit: lines stay whole, so that they can be searched.
    console = Console(file=stream) if stream.isatty() else Console(file=stream, width=10_000)
    console.print(shown)
    console.print(f"{table.num_rows:,} row{'s' * (table.num_rows != 1)}", highlight=False)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else _text(value)
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
        return float(value)
    return str(value)
