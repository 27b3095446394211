"""Copies the views into plain tables, for `manifests/locked`."""

from collections.abc import Sequence
from pathlib import Path

import duckdb

from manifests.catalog.index import transaction

_VIEWS = "SELECT DISTINCT view_name FROM duckdb_views() WHERE NOT internal AND schema_name = 'main' ORDER BY 1"


def copy_views(connection: duckdb.DuckDBPyConnection, path: Path, tables: Sequence[str]) -> None:
    """Writes what each view of the connection answers, and these tables, as tables of their names into a new DuckDB file."""
    file = str(path).replace("'", "''")
    connection.execute(f"ATTACH '{file}' AS copied (STORAGE_VERSION 'v1.4.0')")
    try:
        with transaction(connection):
            views = [name for (name,) in connection.execute(_VIEWS).fetchall()]
            for name in (*views, *tables):
                connection.execute(f'CREATE TABLE copied.main."{name}" AS SELECT * FROM "{name}"')
    finally:
        connection.execute("DETACH copied")
