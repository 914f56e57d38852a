"""The whole result of a query as a file: CSV or Parquet, up to a stated size."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import IO, Any, Literal, get_args

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from moescope.core.errors import InputError
from moescope.dashboard.sql.box import SqlBox, columns_of, wrapped
from moescope.dashboard.sql.one_select import OneSelect
from moescope.dashboard.sql.outcome import Column

FileKind = Literal["csv", "parquet"]
FILE_KINDS: tuple[FileKind, ...] = get_args(FileKind)
MOST_ROWS = 1_000_000
MOST_BYTES = 256_000_000
SECONDS = 60.0
_BATCH = 20_000


def written(
    box: SqlBox, query: OneSelect, values: Mapping[str, Any], kind: FileKind, *, who: str, most_rows: int = MOST_ROWS
) -> IO[bytes]:
    """A nameless file with the whole result, at its beginning.

    Args:
        box: runs the query.
        query: read by `one_select`.
        values: of its parameters.
        kind: csv, in which lists and structures are text, or parquet, which keeps types.
        who: the asker, for `SqlBox.cancel`.
        most_rows: refused beyond.

    Raises:
        InputError: the query fails, or its result is larger than a file from here may be; nothing is cut silently.
    """
    return box.with_cursor(lambda cursor: _written(cursor, query, values, kind, most_rows), who=who, seconds=SECONDS)


def _written(
    cursor: duckdb.DuckDBPyConnection, query: OneSelect, values: Mapping[str, Any], kind: FileKind, most_rows: int
) -> IO[bytes]:
    columns = columns_of(cursor, query, values)
    places = [f"c{i}" for i in range(len(columns))]
    shown = [_kept(column, place, kind) for column, place in zip(columns, places, strict=True)]
    relation = cursor.sql(wrapped(query, shown, places, most_rows + 1), params=dict(values))
    reader = relation.to_arrow_reader(_BATCH)
    schema = pa.schema([reader.schema.field(i).with_name(column.name) for i, column in enumerate(columns)])
    file = tempfile.TemporaryFile()  # noqa: SIM115  handed on
    try:
        with _writer(file, schema, kind) as writer:
            rows = size = 0
            for batch in reader:
                rows, size = rows + batch.num_rows, size + batch.nbytes
                if rows > most_rows or size > MOST_BYTES:
                    raise InputError(
                        "the result is too large for a file from here",
                        expected=f"at most {most_rows:,} rows and {MOST_BYTES // 10**6} MB",
                        fix="add a LIMIT or a condition, or use moescope export",
                    )
                writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def _writer(file: IO[bytes], schema: pa.Schema, kind: FileKind) -> Any:
    return pyarrow.csv.CSVWriter(file, schema) if kind == "csv" else pyarrow.parquet.ParquetWriter(file, schema)


def _kept(column: Column, place: str, kind: FileKind) -> str:
    """SQL that brings a column into a form that the file can hold."""
    plain = column.type in ("UUID", "JSON", "BIT", "HUGEINT", "UHUGEINT", "BIGNUM") or column.type.startswith(
        ("TIME", "INTERVAL")
    )
    nested = column.type.endswith("]") or column.type.startswith(("STRUCT", "MAP", "UNION", "ENUM", "VARIANT"))
    if (kind == "csv" and (nested or plain or column.type == "BLOB")) or (
        kind == "parquet" and plain and column.type != "TIMESTAMP"
    ):
        return f"{place}::VARCHAR"
    return place
