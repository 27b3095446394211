"""Checks SQL that people give: one statement, and one that reads."""

import re

import duckdb

from manifests.errors import QueryError

_READING = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI}
_EXPLAIN = re.compile(r"\s*explain\b(\s*analyze\b)?(\s*\([^)]*\))?", re.IGNORECASE)
# DuckDB lets a SELECT write files: WITH written AS (COPY ... TO ...), FROM enable_logging(storage_path := ...).
_COPY = re.compile(rb"copy\b", re.IGNORECASE)
_WRITER = re.compile(rb'"?((?:enable_(?:logging|profiling)|\w+_external_resource(?:_type)?))"?\s*\(', re.IGNORECASE)


def check(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    """Raises QueryError for what is not one statement that reads, duckdb.Error for what is no SQL.

    It is no boundary by itself: a read-only transaction, or the profile of `manifests/locked`, does the rest.
    """
    statements = connection.extract_statements(query)
    if len(statements) != 1:
        raise QueryError(f"one query is expected, these are {len(statements)}: {query.strip()!r}")
    try:
        kind = statements[0].type
    except ValueError:  # A kind that DuckDB has and its binding does not, such as UPDATE EXTENSIONS.
        raise QueryError(f"the statement is refused, a workspace is only read by SQL: {query.strip()}") from None
    if kind not in _READING:
        raise QueryError(f"{kind.name} is refused, a workspace is only read by SQL: {query.strip()}")
    if kind == duckdb.StatementType.EXPLAIN:
        # EXPLAIN ANALYZE does what it explains.
        check(connection, _EXPLAIN.sub("", query, count=1))
    spelled = query.encode()  # Tokens start at bytes.
    for start, token in duckdb.tokenize(query):
        if token == duckdb.token_type.keyword and _COPY.match(spelled, start):
            raise QueryError(f'COPY is refused, a workspace is only read by SQL; a name is written "copy": {query}')
        if token == duckdb.token_type.identifier and (found := _WRITER.match(spelled, start)):
            raise QueryError(f"{found[1].decode()} is refused, a workspace is only read by SQL: {query}")
