"""Rows about autoencoders, features, probes and students: written in one transaction, over those they take the place of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import duckdb
import pyarrow as pa

from moescope.core.errors import RunError
from moescope.store.schema import TABLE_BY_NAME
from moescope.store.transaction import transaction

if TYPE_CHECKING:
    from moescope.store.store import Store

Rows: TypeAlias = "pa.Table | Sequence[Mapping[str, Any]]"


def write_rows(store: Store, tables: Mapping[str, Rows], *, over: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> None:
    """Write rows into several tables at once: all of them, or none.

    Args:
        store: open for writing.
        tables: table → rows, an Arrow table or mappings by column; columns left out are null.
        over: (table, columns and their values) of rows that are deleted first, in the same transaction; None matches null.

    Raises:
        InputError: the store is open for reading only.
        RunError: they could not be written; nothing changed.
    """
    store.check_writable()
    ready = {name: rows if isinstance(rows, pa.Table) else _arrow(name, rows) for name, rows in tables.items()}
    connection = store.connection
    try:
        with transaction(connection):
            for table, match in over:
                where = " AND ".join(f'"{column}" IS NOT DISTINCT FROM ?' for column in match)
                connection.execute(f'DELETE FROM "{table}" WHERE {where}', list(match.values()))
            for name, rows in ready.items():
                if not rows.num_rows:
                    continue
                connection.register("rows_to_write", rows)
                try:
                    connection.execute(f'INSERT INTO "{name}" BY NAME SELECT * FROM rows_to_write')
                finally:
                    connection.unregister("rows_to_write")
    except duckdb.Error as refused:
        raise RunError(
            f"rows of {', '.join(ready)} could not be stored",
            found=str(refused),
            fix="free some space on the disk; nothing of them was stored",
        ) from refused


def _arrow(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Mappings as an Arrow table; a column that no row has is left out."""
    present = {column for row in rows for column in row}
    columns = [column.name for column in TABLE_BY_NAME[name].columns if column.name in present]
    if unknown := present - set(columns):
        raise RunError(f"{name} has no column {min(unknown)}: a mistake in moescope")
    return pa.table({column: pa.array([row.get(column) for row in rows]) for column in columns})
