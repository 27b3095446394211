"""The view `samples`: the rows of the samples files of all parts, and the few files that one query needs of very many.

The view reads through a table macro, `sample_rows()`. Where there are many files, DuckDB is asked first what it would push
down to the samples of a query; where that bounds their corpora, parts or keys, the macro is set to the files that can
hold such rows, by what the log says of each part. The answer is the same, without a look at every file.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from manifests.store.storage import Storage

# Below so many files a look at each of them is quicker than a plan; and no more of them may be left than a fraction.
_MANY = 64
_FEW_OF = 8
NUMBERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "FLOAT", "DOUBLE"}
_FIXED = "corpus, part, row, key, source, size_bytes, sha256"
_EMPTY = (
    "SELECT NULL::VARCHAR AS corpus, NULL::INTEGER AS part, NULL::INTEGER AS row, NULL::VARCHAR AS key, "
    "NULL::VARCHAR AS source, NULL::BIGINT AS size_bytes, NULL::VARCHAR AS sha256 WHERE false"
)
# What a plan says of a scan's filters, where it is simple enough to trust: literals without quotes or escapes.
_LITERAL = r"'[^'\\\n\r]*'"
_COMPARED = rf"\((corpus|key|part) (=|<|<=|>|>=) ({_LITERAL}|-?\d+)\)"
_ALL_OF = re.compile(rf"{_COMPARED}|\({_COMPARED}(?: AND {_COMPARED})+\)")
_ONE_OF = re.compile(rf"\((corpus|key) IN \(({_LITERAL}(?:, {_LITERAL})*)\)\)")
# What looks at the rows that are there, which are none when it is asked, or reads them twice.
_NOT_FOR_PLANS = "statistics_propagation,late_materialization"


def parquet(files: Iterable[str], options: str = "") -> str:
    """The table function over these very files."""
    return f"read_parquet([{', '.join(map(literal, files))}]{options})"


def literal(file: str) -> str:
    """A file's name as DuckDB's table functions take it, where a `[` is no pattern."""
    return "'" + re.sub(r"([\[*?])", r"[\1]", file).replace("'", "''") + "'"


def quoted(name: str) -> str:
    """A column's name as it is written in SQL."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True)
class _File:
    """The samples of a part, and the least and greatest key there where the log says so."""

    path: str
    corpus: str
    part: int
    key_min: str | None
    key_max: str | None


class Samples:
    """The macro `sample_rows()` of a connection, over the parts that are live when it is made."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, storage: Storage) -> None:
        self._connection = connection
        found = connection.execute(
            "SELECT path, corpus, part, key_min, key_max FROM state.part ORDER BY corpus, part"
        ).fetchall()
        self._files = [_File(storage.location(path), *facts) for path, *facts in found]
        if self._is_large:
            # The files never change; without it each query reads the footers of all again.
            connection.execute("SET parquet_metadata_cache = true")
        sources = {
            corpus: parquet(_paths(files), ", union_by_name = true") for corpus, files in self._by_corpus(self._files)
        }
        # By corpus: the columns of its files and their types, where it matters.
        self._columns = {
            corpus: dict(column[:2] for column in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall())
            for corpus, source in (sources.items() if len(sources) > 1 or self._is_large else ())
        }
        self._texts = _mixed_columns(self._columns)
        selected = " UNION ALL BY NAME ".join(self._selected(corpus, source) for corpus, source in sources.items())
        connection.execute(f"CREATE OR REPLACE TEMP MACRO all_sample_rows() AS TABLE {selected or _EMPTY}")
        self._is_narrow = True
        self.widen()
        if self._is_large:
            connection.execute("CREATE OR REPLACE TEMP TABLE no_sample_rows AS SELECT * FROM sample_rows() LIMIT 0")

    @property
    def _is_large(self) -> bool:
        return len(self._files) >= _MANY

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
        wanted = _wanted(_filters_on(self._connection, query, parameters, "no_sample_rows"))
        files = None if wanted is None else [file for file in self._files if wanted(file)]
        if files is None or len(files) * _FEW_OF > len(self._files):
            return self.widen()
        self._read(self._narrowed(files))

    def _read(self, selected: str) -> None:
        self._connection.execute(f"CREATE OR REPLACE TEMP MACRO sample_rows() AS TABLE {selected}")

    def _narrowed(self, files: Sequence[_File]) -> str:
        """The rows of some files, with the columns and types of all."""
        there = dict(self._by_corpus(files))
        selected = []
        for corpus, columns in self._columns.items():
            typed = ", ".join(f"NULL::{kind} AS {quoted(column)}" for column, kind in columns.items())
            source = f"SELECT {typed} WHERE false"
            if corpus in there:
                source += f" UNION ALL BY NAME SELECT * FROM {parquet(_paths(there[corpus]), ', union_by_name = true')}"
            selected.append(self._selected(corpus, f"({source})"))
        return " UNION ALL BY NAME ".join(selected)

    def _selected(self, corpus: str, source: str) -> str:
        texts = self._texts.get(corpus)
        replaced = f" REPLACE ({', '.join(texts)})" if texts else ""
        return (
            f"SELECT {_FIXED.replace('sha256', 'lower(hex(sha256)) AS sha256')}, "
            f"* EXCLUDE ({_FIXED}){replaced} FROM {source}"
        )

    @staticmethod
    def _by_corpus(files: Iterable[_File]) -> Iterable[tuple[str, list[_File]]]:
        grouped: dict[str, list[_File]] = {}
        for file in files:
            grouped.setdefault(file.corpus, []).append(file)
        return grouped.items()


def _paths(files: Iterable[_File]) -> list[str]:
    return [file.path for file in files]


def _mixed_columns(columns: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """By corpus: what makes text of the columns that corpora type differently, unless all have them as numbers."""
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
    """What a query's plan pushes down to each of its scans of a table; nothing where there is no such plan."""
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


def _wanted(scans: Sequence[Sequence[str]]) -> Callable[[_File], bool] | None:
    """Whether a file can hold rows that any of the scans lets through; None where all can, for what is known."""
    bounds = [[test for text in filters for test in _tests(text)] for filters in scans]
    if not bounds or not all(bounds):
        return None
    return lambda file: any(all(test(file) for test in tests) for tests in bounds)


def _tests(text: str) -> list[Callable[[_File], bool]]:
    """What a filter says of a file that holds rows it lets through; nothing where it is not understood."""
    text = text.removeprefix("optional: ")
    if listed := _ONE_OF.fullmatch(text):
        column, values = listed[1], re.findall(_LITERAL, listed[2])
        return [lambda file: any(_can_hold(file, column, "=", value) for value in values)]
    if not _ALL_OF.fullmatch(text):
        return []
    return [
        lambda file, column=column, sign=sign, value=value: _can_hold(file, column, sign, value)
        for column, sign, value in re.findall(_COMPARED, text)
    ]


def _can_hold(file: _File, column: str, sign: str, value: str) -> bool:
    """Whether a file may have a row where `column sign value`; text compares as DuckDB compares it, by code points."""
    if (column == "part") == value.startswith("'"):
        return True
    if column == "part":
        return _is_within(file.part, file.part, sign, int(value))
    if column == "corpus":
        return _is_within(file.corpus, file.corpus, sign, value[1:-1])
    if file.key_min is None or file.key_max is None:
        return True
    return _is_within(file.key_min, file.key_max, sign, value[1:-1])


def _is_within(low: Any, high: Any, sign: str, value: Any) -> bool:
    """Whether something from `low` to `high` may be `sign value`."""
    if sign == "=":
        return low <= value <= high
    if sign in ("<", "<="):
        return low < value or (sign == "<=" and low == value)
    return high > value or (sign == ">=" and high == value)
