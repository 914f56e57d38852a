"""A trace as a view that can be asked again and again: `moescope_trace`, one row a decision, with its place in the file."""

from __future__ import annotations

import duckdb

from moescope.core.errors import InputError
from moescope.store.importing.files import laid_out, reading
from moescope.store.importing.trace import COLUMNS, REQUIRED, Trace

_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"}
_NUMBERS = _INTEGERS | {"FLOAT", "DOUBLE", "DECIMAL"}
# Read wider than they are stored, so that a number too large is found by a check that says where it is.
_READ_AS = {"USMALLINT": "BIGINT", "INTEGER": "BIGINT", "FLOAT[]": "FLOAT[]"}
_DEFAULTS = {"block": "'mlp'", "phase": "'prefill'"}


def stage(trace: Trace, connection: duckdb.DuckDBPyConnection, called: object) -> list[str]:
    """Make the view `moescope_trace` of a trace's decisions; gives the names of columns that were left out.

    Parquet files are read where they lie, as often as they are asked; what can be read only once or slowly (CSV, tables,
    arrays) is copied into a temporary table first, which DuckDB moves to disk where memory runs short.

    Raises:
        InputError: a column is missing, or holds something else than it should.
    """
    with reading(called), laid_out(called, "its format is"):
        rows = _kept(trace, connection)
        types = dict(zip(rows.columns, map(str, rows.types), strict=True))
        _check_columns(types, called)
        row = "file_row_number" if "file_row_number" in types else "rowid"
        file = "filename" if "filename" in types else "NULL::VARCHAR"
        columns = ", ".join(_column(name, name in types) for name in COLUMNS)
        connection.register(
            "moescope_trace", connection.sql(f"SELECT {columns}, {row} AS row, {file} AS file FROM moescope_rows")
        )
    known = {*COLUMNS, "file_row_number", "filename", "run_id", "token", "moescope_block"}
    return sorted(set(types) - known)


def _kept(trace: Trace, connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    decisions = trace.decisions
    assert decisions is not None
    if isinstance(decisions, duckdb.DuckDBPyRelation):
        connection.register("moescope_source_rows", decisions)
        if "file_row_number" in decisions.columns:
            connection.register("moescope_rows", decisions)
        else:
            connection.execute("CREATE TEMP TABLE moescope_rows AS SELECT * FROM moescope_source_rows")
        return connection.table("moescope_rows")
    made = False
    for table in decisions:
        connection.register("moescope_source_rows", table)
        if made:
            connection.execute("INSERT INTO moescope_rows BY NAME SELECT * FROM moescope_source_rows")
        else:
            connection.execute("CREATE TEMP TABLE moescope_rows AS SELECT * FROM moescope_source_rows")
        made = True
        connection.unregister("moescope_source_rows")
    if not made:
        raise InputError("the trace holds no decisions")
    return connection.table("moescope_rows")


def _check_columns(types: dict[str, str], called: object) -> None:
    missing = [name for name in REQUIRED if name not in types]
    if missing:
        raise InputError(
            f"{called} lacks the columns {', '.join(missing)}",
            expected="one row a decision, with " + ", ".join(REQUIRED),
            found="the columns " + (", ".join(list(types)[:12]) or "none"),
            fix="see docs/import-export.md for the columns, or name the program that wrote it: format=…",
        )
    for name, (kind, *_) in COLUMNS.items():
        if name not in types:
            continue
        found = types[name].split("(")[0] if "(" in types[name] and "[" not in types[name] else types[name]
        element = found.rstrip("0123456789[]") if kind.endswith("[]") else found
        allowed = _INTEGERS if kind.rstrip("[]") in ("BIGINT", "INTEGER", "USMALLINT") else _NUMBERS
        fits = kind == "VARCHAR" or element.split("(")[0] in allowed | {'"NULL"', "NULL"}
        if not fits or (kind.endswith("[]") and "[" not in found and "NULL" not in found):
            what = "lists of " if kind.endswith("[]") else ""
            raise InputError(
                f"the column {name} of {called} holds {types[name]}",
                expected=f"{what}{'integers' if allowed is _INTEGERS else 'numbers'}",
            )


def _column(name: str, present: bool) -> str:
    kind = COLUMNS[name][0]
    kind = _READ_AS.get(kind, kind)
    default = _DEFAULTS.get(name)
    if not present:
        return f'{default or "NULL"}::{kind} AS "{name}"'
    value = f'CAST("{name}" AS {kind})'
    return f'{f"coalesce({value}, {default})" if default else value} AS "{name}"'
