"""The steps between versions, and what every upgraded file is given at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import duckdb

from moescope.store.making import make_views
from moescope.store.migrations import from_1, from_2, from_3
from moescope.store.schema import TABLES

# Version → the statements that lead to the next one. A step that has landed is never changed: files have gone through it.
STEPS: Mapping[int, Sequence[str]] = {1: from_1.STATEMENTS, 2: from_2.STATEMENTS, 3: from_3.STATEMENTS}


def oldest() -> int:
    """The oldest version that can be upgraded."""
    return min(STEPS)


def run_steps(connection: duckdb.DuckDBPyConnection, version: int, target: int) -> None:
    """Bring the tables of `version` to those of `target`, then views and comments. The caller holds the transaction.

    Raises:
        StoreError: something that the user made has the name of one of our views.
    """
    for step in range(version, target):
        for statement in STEPS[step]:
            connection.execute(statement)
    for (names,) in connection.execute("SELECT value FROM store_info WHERE key = 'views'").fetchall():
        for name in names.split(","):
            connection.execute(f'DROP VIEW IF EXISTS "{name}"')
    make_views(connection)
    for table in TABLES:
        for comment in table.ddl()[1:]:
            connection.execute(comment)
