"""A bound on what DuckDB keeps in memory while it merges: by default it keeps every block it wrote, until the machine is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import duckdb

MEMORY = "384MiB"


@contextmanager
def bounded_memory(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Keep to `MEMORY` inside, unless the user has set a limit, or has locked the configuration. Beyond it DuckDB spills.

    A limit cannot be put back exactly, since DuckDB tells it rounded: so only the default is ever replaced.
    """
    query = "SELECT current_setting('memory_limit')"
    changed = False
    with duckdb.connect(":memory:") as untouched, suppress(duckdb.Error):
        if connection.execute(query).fetchall() == untouched.execute(query).fetchall():
            connection.execute(f"SET memory_limit = '{MEMORY}'")
            changed = True
    try:
        yield
    finally:
        if changed:
            with suppress(duckdb.Error):  # what broke the store is told by whoever met it first
                connection.execute("RESET memory_limit")
