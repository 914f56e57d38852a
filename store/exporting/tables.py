"""What an export holds: the decisions in the neutral form, and the run's other tables as they are."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from moescope.core.errors import InputError
from moescope.store.run import Run
from moescope.store.schema import TABLE_BY_NAME, TABLES

# Tables of the writer's own, and those that mean nothing without the store they lie in.
_INNER = {"runs", "batches", "load_partials", "expert_partials", "activations"}
EXPORTED = tuple(
    table.name for table in TABLES if "run_id" in {column.name for column in table.columns} and table.name not in _INNER
)
_DECISIONS = """
    SELECT
        r.token, t.sequence_id, t.position, t.phase, t.token_id, v.text, s.document_id, s.label,
        r.layer, r.block, r.experts, r.weights, r.margin, r.entropy
    FROM routing r
    LEFT JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
    LEFT JOIN sequences s ON s.run_id = r.run_id AND s.sequence_id = t.sequence_id
    LEFT JOIN vocabulary v ON v.run_id = r.run_id AND v.token_id = t.token_id
    WHERE r.run_id = $run
"""
_LAYERS = "SELECT DISTINCT layer FROM routing WHERE run_id = $run ORDER BY layer"


def chosen_tables(run: Run, tables: Sequence[str] | None) -> list[str]:
    """Tables to export: those named, or all of which the run has rows.

    Raises:
        InputError: there is no such table, or the run has no rows at all.
    """
    unknown = sorted(set(tables or ()) - set(EXPORTED))
    if unknown:
        raise InputError(f"there is no table {unknown[0]!r} to export", expected=", ".join(EXPORTED))
    found = [name for name in EXPORTED if (tables is None or name in tables) and run.rows(name)]
    if not found:
        raise InputError(f"run {run.name!r} has no rows to export", found=f"status {run.status}")
    return found


def routed_layers(run: Run) -> list[int]:
    """Layers that have decisions."""
    return [int(layer) for (layer,) in run.store.fetch(_LAYERS, {"run": run.run_id})]


def decisions(run: Run, layer: int | None = None) -> duckdb.DuckDBPyRelation:
    """Decisions in the neutral form, of one layer (then without it as a column) or of all, token by token."""
    if layer is None:
        return run.sql(f"{_DECISIONS} ORDER BY r.token, r.layer, r.block")
    query = f"SELECT * EXCLUDE (layer) FROM ({_DECISIONS} AND r.layer = $layer) ORDER BY token, block"
    return run.sql(query, {"layer": layer})


def rows_of(run: Run, table: str) -> duckdb.DuckDBPyRelation:
    """A table of the run as it is, without run_id; JSON as text, which every reader takes."""
    columns = ", ".join(
        f'CAST("{column.name}" AS VARCHAR) AS "{column.name}"' if column.type == "JSON" else f'"{column.name}"'
        for column in TABLE_BY_NAME[table].columns
        if column.name != "run_id"
    )
    return run.sql(f'SELECT {columns} FROM "{table}" WHERE run_id = $run')
