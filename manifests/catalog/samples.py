"""Makes the view `samples` over the samples files of all parts, or over the few files that one query needs of very many.

The view reads through a table macro, `sample_rows()`. If there are many files, DuckDB is asked first what it would push
down to the samples of a query; if that bounds their corpora, parts or keys, the macro is set to the files that can hold
such rows, by what the log says of each part. The answer is the same, without a look at every file: a look at each of 2,000
takes a hundred times as long as one, and neither Parquet's statistics nor the names of the files can spare it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import duckdb

from manifests.store.storage import Storage

# With fewer files a look at each is quicker than a plan; and a plan must leave no more of them than a fraction.
_MANY = 64
_FEW_OF = 8
NUMBERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "FLOAT", "DOUBLE"}
_FIXED = "corpus, part, row, key, source, size_bytes, sha256"
_COLUMNS = "corpus VARCHAR, part INTEGER, row INTEGER, key VARCHAR, source VARCHAR, size_bytes BIGINT, sha256 VARCHAR"
# What a plan says of a scan's filters, as DuckDB 1.4 to 2.0 write it, if it is simple enough to trust: literals without
# quotes or escapes. Any other text bounds nothing: of a version that writes plans otherwise, all files are read.
_LITERAL = r"'[^'\\\n\r]*'"
_COMPARED = rf"\((?:(corpus|key) (=|<|<=|>|>=) ({_LITERAL})|(part) (=|<|<=|>|>=) (-?\d+))\)"
_ALL_OF = re.compile(rf"{_COMPARED}|\({_COMPARED}(?: AND {_COMPARED})+\)")
_ONE_OF = re.compile(rf"\((corpus|key) IN (\({_LITERAL}(?:, {_LITERAL})*\))\)")
# Optimizers that look at the rows that are there, which are none when it is asked, or that read them twice.
_NOT_FOR_PLANS = "statistics_propagation,late_materialization"


def parquet(files: Iterable[str], options: str = "") -> str:
    """Returns the table function over these very files."""
    return f"read_parquet([{', '.join(map(literal, files))}]{options})"


def labeled(connection: duckdb.DuckDBPyConnection, name: str, columns: str, files: Sequence[Sequence[Any]]) -> str:
    """Returns a source of the rows of files, with `columns` as SQL declares them; `files` has file and values of each.

    What is said of the files is put into the temporary table `file_of_<name>`.
    """
    declared = (column.partition(" ") for column in f"filename VARCHAR, {columns}".split(", "))
    unnested = ", ".join(f"unnest(?::{kind}[]) AS {column}" for column, _, kind in declared)
    said = [list(values) for values in zip(*files, strict=True)]
    connection.execute(f"CREATE OR REPLACE TEMP TABLE file_of_{name} AS SELECT {unnested}", said)
    return f"{parquet(said[0], ', filename = true')} JOIN file_of_{name} USING (filename)"


def empty(columns: str) -> str:
    """Returns a query without rows, of columns as SQL declares them: `corpus VARCHAR, part INTEGER`."""
    declared = (column.partition(" ") for column in columns.split(", "))
    return f"SELECT {', '.join(f'NULL::{kind} AS {quoted(name)}' for name, _, kind in declared)} WHERE false"


def literal(file: str) -> str:
    """Returns a file's name as DuckDB's table functions take it: there a `[` is no pattern."""
    return "'" + re.sub(r"([\[*?])", r"[\1]", file).replace("'", "''") + "'"


def quoted(name: str) -> str:
    """Returns a column's name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


class Samples:
    """Holds the macro `sample_rows()` of a connection, over the parts that are live when it is made."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, storage: Storage) -> None:
        self._connection = connection
        self._storage = storage
        everything = self._files("true")
        self._count = sum(map(len, everything.values()))
        if self._is_large or not storage.is_local:
            # The files never change; without it each query reads the footers of all again.
            connection.execute("SET parquet_metadata_cache = true")
        sources = {corpus: parquet(files, ", union_by_name = true") for corpus, files in everything.items()}
        # By corpus: the columns of its files and their types, if they matter.
        self._columns = {
            corpus: dict(column[:2] for column in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall())
            for corpus, source in (sources.items() if len(sources) > 1 or self._is_large else ())
        }
        self._texts = _mixed_columns(self._columns)
        selected = " UNION ALL BY NAME ".join(self._selected(corpus, source) for corpus, source in sources.items())
        connection.execute(f"CREATE OR REPLACE TEMP MACRO all_sample_rows() AS TABLE {selected or empty(_COLUMNS)}")
        self._is_narrow = True
        self.widen()
        if self._is_large:
            connection.execute("CREATE OR REPLACE TEMP TABLE no_sample_rows AS SELECT * FROM sample_rows() LIMIT 0")

    @property
    def _is_large(self) -> bool:
        return self._count >= _MANY

    def widen(self) -> None:
        """Lets `sample_rows()` be all rows."""
        if self._is_narrow:
            self._read("FROM all_sample_rows()")
            self._is_narrow = False

    def fit(self, query: str, parameters: Sequence[Any]) -> None:
        """Lets `sample_rows()` be all rows that one query can need, from as few files as can be told."""
        if not self._is_large or "samples" not in query.lower():
            return self.widen()
        self._is_narrow = True
        self._read("FROM no_sample_rows")
        scans = _filters_on(self._connection, query, parameters, "no_sample_rows")
        bounds = [[bound for text in filters if (bound := _bound(text))] for filters in scans]
        if not bounds or not all(bounds):
            return self.widen()
        files = self._files(" OR ".join(f"({' AND '.join(each)})" for each in bounds))
        if sum(map(len, files.values())) * _FEW_OF > self._count:
            return self.widen()
        self._read(self._narrowed(files))

    def _files(self, condition: str) -> dict[str, list[str]]:
        """Returns the samples files of the parts that a condition picks, in the order of the parts, by corpus."""
        query = (
            "SELECT corpus, list(path ORDER BY part), list(size_bytes ORDER BY part) FROM state.part "
            f"WHERE {condition} GROUP BY corpus ORDER BY corpus"
        )
        found = self._connection.execute(query).fetchall()
        return {corpus: self._storage.known(paths, sizes) for corpus, paths, sizes in found}

    def _read(self, selected: str) -> None:
        self._connection.execute(f"CREATE OR REPLACE TEMP MACRO sample_rows() AS TABLE {selected}")

    def _narrowed(self, files: Mapping[str, Sequence[str]]) -> str:
        """Returns a query for the rows of some files, with the columns and types of all."""
        selected = []
        for corpus, columns in self._columns.items():
            typed = ", ".join(f"NULL::{kind} AS {quoted(column)}" for column, kind in columns.items())
            source = f"SELECT {typed} WHERE false"
            if corpus in files:
                source += f" UNION ALL BY NAME SELECT * FROM {parquet(files[corpus], ', union_by_name = true')}"
            selected.append(self._selected(corpus, f"({source})"))
        return " UNION ALL BY NAME ".join(selected)

    def _selected(self, corpus: str, source: str) -> str:
        texts = self._texts.get(corpus)
        replaced = f" REPLACE ({', '.join(texts)})" if texts else ""
        return (
            f"SELECT {_FIXED.replace('sha256', 'lower(hex(sha256)) AS sha256')}, "
            f"* EXCLUDE ({_FIXED}){replaced} FROM {source}"
        )


def _mixed_columns(columns: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Returns, by corpus, what makes text of the columns that corpora type differently, unless all have them as numbers."""
    # By the name that DuckDB compares (ASCII without case) and the corpus: the name as it stands there, and its type.
    found: dict[bytes, dict[str, tuple[str, str]]] = {}
    for corpus, kinds in columns.items():
        for column, kind in kinds.items():
            found.setdefault(column.encode().lower(), {})[corpus] = (column, kind)
    texts: dict[str, list[str]] = {}
    for uses in found.values():
        kinds = {kind for _, kind in uses.values()}
        if len(kinds) > 1 and not kinds <= NUMBERS:
            for corpus, (column, _) in uses.items():
                texts.setdefault(corpus, []).append(f"{quoted(column)}::VARCHAR AS {quoted(column)}")
    return texts


def _filters_on(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[Any], table: str
) -> list[list[str]]:
    """Returns what a query's plan pushes down to each of its scans of a table; nothing if there is no such plan."""
    connection.execute(f"SET disabled_optimizers = '{_NOT_FOR_PLANS}'")
    try:
        plan = connection.execute(f"EXPLAIN (FORMAT json) {query}", list(parameters)).fetchall()[0][1]
        waiting = list(json.loads(plan))
    except (duckdb.Error, ValueError, IndexError):
        return []  # What is wrong with the query is said when it is run.
    finally:
        connection.execute("RESET disabled_optimizers")
    scans = []
    while waiting:
        node = waiting.pop()
        waiting += node["children"]
        facts = node["extra_info"]
        if str(facts.get("Table", "")).split(".")[-1] == table:
            filters = facts.get("Filters") or []
            scans.append([filters] if isinstance(filters, str) else list(filters))
    return scans


def _bound(text: str) -> str | None:
    """Returns a condition for the parts that can hold rows which a filter lets through, None if it bounds none.

    Text compares there as in the filter. The log does not know the keys of old parts.
    """
    text = text.removeprefix("optional: ")
    if listed := _ONE_OF.fullmatch(text):
        column, values = listed.groups()
        within = f"len(list_filter([{values[1:-1]}], lambda v: v BETWEEN key_min AND key_max)) > 0"
        return text if column == "corpus" else f"(key_min IS NULL OR {within})"
    if not _ALL_OF.fullmatch(text):
        return None
    bounds = []
    for compared in re.finditer(_COMPARED, text):
        column, sign, value = (group for group in compared.groups() if group is not None)
        within = f"{'key_min' if '<' in sign else 'key_max'} {sign} {value}"
        if sign == "=":
            within = f"{value} BETWEEN key_min AND key_max"
        bounds.append(f"(key_min IS NULL OR {within})" if column == "key" else compared[0])
    return " AND ".join(bounds)
