"""Copying the rows of shards into one run: streamed from file to file, token numbers moved, nothing looked at row by row.

A shard is read through a connection of its own and streamed as Arrow batches into the one transaction of the merged store.
DuckDB's ATTACH would do, but what is attached cannot be detached within a transaction, and a run may have thousands of shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import duckdb

from moescope.core.errors import InputError, StoreError
from moescope.store.head_totals import other_heads
from moescope.store.merge_plan import MergePlan, Segment
from moescope.store.merge_shards import Shard
from moescope.store.schema import TABLES, Column, Table
from moescope.store.store import Store

ROWS_A_PIECE = 122_880
# Tables that a merge makes anew, or joins in a way of their own.
_OWN_WAY = frozenset({"runs", "layers", "vocabulary", "coverage", "activations", "loads", "experts", "heads"})


def copied_tables() -> tuple[Table, ...]:
    """Tables whose rows belong to a token, a sequence or a batch, and are copied.

    Example:
        >>> [table.name for table in copied_tables()][:3]
        ['sequences', 'tokens', 'routing']
    """
    return tuple(table for table in _of_runs() if table.name not in _OWN_WAY and _condition(table))


def foreign_tables() -> tuple[Table, ...]:
    """Tables of runs whose rows belong to none of these, so that nobody could say what their merger is."""
    return tuple(table for table in _of_runs() if table.name not in _OWN_WAY and not _condition(table))


def copy_rows(connection: duckdb.DuckDBPyConnection, run_id: str, plan: MergePlan) -> Iterator[str]:
    """Copy every row of the plan's segments, in its order; gives what is copied before it is.

    Raises:
        InputError: a shard has rows in a table that cannot be merged, or a sequence of another content than the one taken.
        StoreError: a shard's rows are not those of its batches.
    """
    for number, segment in enumerate(plan.segments):
        yield f"{segment.shard.path.name} ({number + 1} of {len(plan.segments)})"
        with _reading(segment.shard) as source:
            _check_foreign(source, segment.shard)
            for table in copied_tables():
                _copy(connection, run_id, source, table, segment)
            if number == 0:
                _insert(connection, run_id, source, _plain("layers", segment.shard))
            _insert(connection, run_id, source, _plain("vocabulary", segment.shard), new_only="token_id")
    for part in plan.parts:
        if part.left:
            yield f"comparing what {part.shard.path.name} has in common with others"
            with _reading(part.shard) as source:
                _check_contents(connection, run_id, source, part.shard)


def _of_runs() -> Iterator[Table]:
    return (table for table in TABLES if any(column.name == "run_id" for column in table.columns))


def _condition(table: Table) -> str:
    """Which rows of a table belong to a segment; empty where none can be said to."""
    names = {column.name for column in table.columns}
    conditions = [
        f"{name} >= ${name}_first AND {name} < ${name}_end"
        for name in ("batch", "sequence_id", "token")
        if name in names
    ]
    return " AND ".join(conditions)


def is_token(column: Column) -> bool:
    """Whether a column holds token numbers, which a merge moves."""
    return column.type == "BIGINT" and (column.name == "token" or column.name.endswith("_token"))


def _copy(connection: duckdb.DuckDBPyConnection, run_id: str, source: Store, table: Table, segment: Segment) -> None:
    columns = [column for column in table.columns if column.name != "run_id"]
    moved = [f'"{c.name}" + {segment.shift} AS "{c.name}"' if is_token(c) else f'"{c.name}"' for c in columns]
    condition = _condition(table)
    ranges = {"batch": segment.batch_range, "sequence_id": segment.sequence_range, "token": segment.token_range}
    bound: dict[str, Any] = {"run": segment.shard.run_id}
    for name, (first, end) in ranges.items():
        if f"${name}_first" in condition:
            bound |= {f"{name}_first": first, f"{name}_end": end}
    query = f"""
        SELECT {", ".join(moved)}
        FROM "{table.name}"
        WHERE run_id = $run AND {condition}
    """
    copied = _insert(connection, run_id, source, (table.name, query, bound))
    expected = {
        "batches": len(segment.batches),
        "sequences": sum(batch.sequences for batch in segment.batches),
        "tokens": sum(batch.tokens for batch in segment.batches),
    }.get(table.name, copied)
    if copied != expected:
        raise StoreError(
            f"{segment.shard.path} is not whole: its {table.name} are not those of its batches",
            expected=f"{expected:,}",
            found=f"{copied:,}",
            fix="record these batches again",
        )


def _plain(table: str, shard: Shard) -> tuple[str, str, Mapping[str, Any]]:
    query = f'SELECT * EXCLUDE (run_id) FROM "{table}" WHERE run_id = $run ORDER BY rowid'
    return table, query, {"run": shard.run_id}


def _insert(
    connection: duckdb.DuckDBPyConnection,
    run_id: str,
    source: Store,
    what: tuple[str, str, Mapping[str, Any]],
    *,
    new_only: str | None = None,
) -> int:
    """Insert what a query on a shard gives, and tell how many rows; with `new_only`, rows whose value there is new."""
    table, query, bound = what
    stream = source.sql(query, bound).to_arrow_reader(ROWS_A_PIECE)
    names = ", ".join(f'"{name}"' for name in stream.schema.names)
    known = f'WHERE "{new_only}" NOT IN (SELECT "{new_only}" FROM "{table}" WHERE run_id = $run)' if new_only else ""
    connection.register("moescope_rows", stream)
    try:
        found = connection.execute(
            f'INSERT INTO "{table}" (run_id, {names}) SELECT $run, {names} FROM moescope_rows {known}',
            {"run": run_id},
        ).fetchall()
    finally:
        connection.unregister("moescope_rows")
    return int(found[0][0])


def _check_foreign(source: Store, shard: Shard) -> None:
    counts = {
        table.name: source.fetch(f'SELECT count(*) FROM "{table.name}" WHERE run_id = ?', [shard.run_id])[0][0]
        for table in foreign_tables()
    }
    for table, count in {**counts, "heads": other_heads(source.connection, shard.run_id)}.items():
        if count:
            raise InputError(
                f"{shard.path} cannot be merged: nothing says how rows of {table} are put together",
                found=f"{count:,} rows",
                fix=f"delete them from the shard, and compute {table} from the merged run",
            )


def _check_contents(connection: duckdb.DuckDBPyConnection, run_id: str, source: Store, shard: Shard) -> None:
    query = "SELECT sequence_id, content_hash FROM sequences WHERE run_id = $run"
    stream = source.sql(query, {"run": shard.run_id}).to_arrow_reader(ROWS_A_PIECE)
    connection.register("moescope_rows", stream)
    try:
        differing = connection.execute(
            """
            SELECT sequence_id, theirs.content_hash, ours.content_hash
            FROM moescope_rows AS theirs
            JOIN sequences AS ours USING (sequence_id)
            WHERE ours.run_id = ? AND ours.content_hash IS DISTINCT FROM theirs.content_hash
            ORDER BY sequence_id
            LIMIT 1
            """,
            [run_id],
        ).fetchall()
    finally:
        connection.unregister("moescope_rows")
    for sequence, theirs, ours in differing:
        raise InputError(
            f"{shard.path} has another sequence {sequence} than the other shards",
            expected=f"content hash {ours}",
            found=str(theirs),
            fix="shards of one plan read the same corpus with the same tokenizer; leave out the one that did not",
        )


@contextmanager
def _reading(shard: Shard) -> Iterator[Store]:
    with Store(shard.path, read_only=True) as source:
        yield source
