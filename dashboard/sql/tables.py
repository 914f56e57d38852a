"""The tables and views of a store, with what they and their columns mean, and how many rows a run has in each."""

from __future__ import annotations

from typing import Any

from moescope.store.run import Run
from moescope.store.schema import TABLES
from moescope.store.sql_text import quoted_name
from moescope.store.store import Store
from moescope.store.views import VIEWS

_INNER = frozenset({"store_info", "batches", "load_partials", "expert_partials"})


def schema_of(store: Store) -> list[dict[str, Any]]:
    """Groups of tables: `[{"title": …, "tables": [{"name", "meaning", "columns": [[name, type, meaning], …]}]}]`."""
    found: dict[str, dict[str, Any]] = {}
    for name, meaning in store.fetch(
        """
        SELECT table_name, comment FROM duckdb_tables() WHERE NOT internal
        UNION ALL
        SELECT view_name, comment FROM duckdb_views() WHERE NOT internal
        """
    ):
        found[name] = {"name": name, "meaning": meaning or "", "columns": []}
    for name, column, kind, meaning in store.fetch(
        """
        SELECT table_name, column_name, data_type, comment
        FROM duckdb_columns()
        WHERE NOT internal
        ORDER BY table_name, column_index
        """
    ):
        if name in found:
            found[name]["columns"].append([column, kind, meaning or ""])
    known = {table.name for table in TABLES} | {view.name for view in VIEWS}
    groups = {
        "Views: stored queries, the easiest start": [view.name for view in VIEWS],
        "Tables": [table.name for table in TABLES if table.name not in _INNER],
        "Your own": sorted(found.keys() - known),
        "Kept for recording": [table.name for table in TABLES if table.name in _INNER],
    }
    return [
        {"title": title, "tables": [found[name] for name in names if name in found]}
        for title, names in groups.items()
        if any(name in found for name in names)
    ]


def rows_of(run: Run) -> dict[str, int]:
    """How many rows of each table belong to a run; tables without a run are left out, and so are views."""
    owned = run.store.fetch(
        """
        SELECT c.table_name, max(c.column_name) FILTER (c.column_name = 'run_id') IS NOT NULL
        FROM duckdb_columns() c
        JOIN duckdb_tables() t ON t.table_name = c.table_name AND t.schema_name = c.schema_name
        WHERE NOT c.internal AND c.column_name IN ('run_id', 'base_run_id')
        GROUP BY c.table_name
        """
    )
    counts = [
        f"SELECT {index} AS place, count(*) AS n FROM {quoted_name(name)} "  # noqa: S608  a quoted name
        f"WHERE {'base_run_id' if name == 'effects' else 'run_id'} = $run"
        for index, (name, by_run) in enumerate(owned)
        if by_run
    ]
    found = run.store.fetch(" UNION ALL ".join(counts), {"run": run.run_id})
    return {owned[place][0]: n for place, n in found}
