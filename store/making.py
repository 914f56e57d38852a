"""Making what a store holds: tables, views, and facts about the file."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import duckdb

from moescope.core.errors import StoreError
from moescope.core.versions import VERSION
from moescope.store.schema import SCHEMA_VERSION, TABLES
from moescope.store.transaction import transaction
from moescope.store.views import VIEWS


def make(connection: duckdb.DuckDBPyConnection) -> None:
    """Everything a new store holds, in one transaction."""
    with transaction(connection):
        for table in TABLES:
            for statement in table.ddl():
                connection.execute(statement)
        make_views(connection)
        note(
            connection,
            {
                "application": "moescope",
                "schema_version": str(SCHEMA_VERSION),
                "created_by": f"moescope {VERSION}",
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )


def make_views(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the views, and note in the file which are ours. The caller holds the transaction.

    Raises:
        StoreError: something that the user made has the name of one of them.
    """
    query = """
        SELECT view_name, 'VIEW' FROM duckdb_views() WHERE NOT internal AND schema_name = 'main'
        UNION ALL
        SELECT table_name, 'TABLE' FROM duckdb_tables() WHERE schema_name = 'main'
    """
    taken = dict(connection.execute(query).fetchall())
    for view in VIEWS:
        if kind := taken.get(view.name):
            raise StoreError(
                f"the name {view.name!r} is needed for a view of the store's own",
                found=f"a {kind.lower()} of that name which moescope did not make",
                fix=f"rename it with any DuckDB client: ALTER {kind} {view.name} RENAME TO my_{view.name}",
            )
        for statement in view.ddl():
            connection.execute(statement)
    note(connection, {"views": ",".join(view.name for view in VIEWS)})


def note(connection: duckdb.DuckDBPyConnection, facts: Mapping[str, str]) -> None:
    """Put facts about the file into `store_info`, over those there are."""
    for key, value in facts.items():
        connection.execute("DELETE FROM store_info WHERE key = ?", [key])
        connection.execute("INSERT INTO store_info VALUES (?, ?)", [key, value])
