"""Rows in every table of a file, made from the columns' types alone, so that a table that is added takes part by itself."""

from __future__ import annotations

import datetime
import uuid
from typing import Any

import duckdb

_COLUMNS = """
    SELECT table_name, list(column_name ORDER BY column_index), list(data_type ORDER BY column_index)
    FROM duckdb_columns()
    WHERE schema_name = 'main' AND table_name IN (SELECT table_name FROM duckdb_tables() WHERE NOT internal)
    GROUP BY table_name
    ORDER BY table_name
"""


def columns(connection: duckdb.DuckDBPyConnection) -> dict[str, dict[str, str]]:
    """Table → column → type, as the file has them."""
    return {
        table: dict(zip(names, types, strict=True)) for table, names, types in connection.execute(_COLUMNS).fetchall()
    }


def fill(connection: duckdb.DuckDBPyConnection, run_id: str, name: str, rows: int = 3) -> None:
    """Put one run, with `rows` rows in each other table, into the file."""
    connection.execute("BEGIN TRANSACTION")
    for table, types in columns(connection).items():
        if table == "store_info":
            continue
        names = ", ".join(f'"{column}"' for column in types)
        insert = f'INSERT INTO "{table}" ({names}) VALUES ({", ".join("?" * len(types))})'
        for number in range(1 if table == "runs" else rows):
            row = {column: _value(table, column, kind, run_id, number) for column, kind in types.items()}
            row |= {"name": name, "status": "complete"} if table == "runs" else {}
            row |= {"run_id": None} if table == "effects" else {}
            connection.execute(insert, list(row.values()))
    connection.execute("COMMIT")


def _value(table: str, column: str, kind: str, run_id: str, number: int) -> Any:
    if kind == "UUID":
        own = column in ("run_id", "base_run_id")
        return run_id if own else str(uuid.uuid5(uuid.UUID(run_id), f"{column} {number}"))
    if kind == "VARCHAR":
        return f"{table}.{column} {number} of {run_id[:4]}: \"ünï\" '日本' 🧪"
    if kind.endswith("]"):
        return [number, number + 1, number + 2]
    return {
        "JSON": f'{{"number": {number}}}',
        "BLOB": bytes([number, 255]),
        "BOOLEAN": number % 2 == 0,
        "TIMESTAMP": datetime.datetime(2026, 1, 1) + datetime.timedelta(days=number),
        "FLOAT": number + 0.5,
        "DOUBLE": number + 0.25,
    }.get(kind, number)


def contents(connection: duckdb.DuckDBPyConnection) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, in the order in which they lie."""
    return {
        table: connection.execute(f'SELECT * FROM "{table}" ORDER BY rowid').fetchall() for table in columns(connection)
    }


def shape(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """What the file is made of, without its rows: tables, columns, types, order, constraints, views and comments."""
    return {
        "tables": connection.execute(
            "SELECT table_name, sql, comment FROM duckdb_tables() WHERE NOT internal ORDER BY ALL"
        ).fetchall(),
        "columns": connection.execute(
            "SELECT table_name, column_index, column_name, data_type, is_nullable, column_default, comment "
            "FROM duckdb_columns() WHERE NOT internal ORDER BY table_name, column_index"
        ).fetchall(),
        "constraints": connection.execute(
            "SELECT table_name, constraint_type, constraint_column_names FROM duckdb_constraints() ORDER BY ALL"
        ).fetchall(),
        "views": connection.execute(
            "SELECT view_name, sql, comment FROM duckdb_views() WHERE NOT internal ORDER BY ALL"
        ).fetchall(),
    }
