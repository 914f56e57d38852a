"""Bytes as they are found: how well a run's floats compress, and how much of a store's file is in use."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import duckdb
import pyarrow as pa

from moescope.core.errors import MoescopeError
from moescope.core.json_data import to_json
from moescope.store.store import Store
from moescope.store.table_rows import FLOAT_BYTES
from moescope.store.vector_shards import vectors_folder

# So few that the column ends in the block it begins in, and so many that it compresses as in a whole row group.
_MOST, _LEAST = 49_152, 8_192
_PLACES = """
    SELECT column_name, block_id, block_offset
    FROM pragma_storage_info('measured')
    WHERE segment_type IN ('FLOAT', 'UINTEGER') AND persistent
"""


def measured_floats(batches: Iterable[Mapping[str, pa.Table]]) -> dict[str, float]:
    """Bytes of a compressed value for each column of floats, as DuckDB stores these very records.

    Args:
        batches: table → rows, for each of some batches of a recording; a column of which they hold too little is left out.
    """
    found: dict[str, list[pa.Array]] = {name: [] for name in FLOAT_BYTES}
    for tables in batches:
        for name in FLOAT_BYTES:
            table, column = name.split(".")
            if table in tables:
                found[name].append(_flat(tables[table][column]))
    bytes_a_value = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, parts) in enumerate(found.items()):
            values = pa.concat_arrays(parts) if parts else pa.array([], pa.float32())
            if len(values) - values.null_count < _LEAST:
                continue
            if stored := _stored(values[:_MOST], Path(folder) / f"{number}.duckdb"):
                bytes_a_value[name] = stored
    return bytes_a_value


def bytes_in_use(store: Store) -> int:
    """Bytes of the blocks that a store's file uses, once what waits in its log is in the file. Free blocks do not count."""
    connection = store.connection
    with suppress(duckdb.Error):  # while another connection writes, or settings are locked, the log stays where it is
        merging = connection.execute("SELECT current_setting('max_vacuum_tasks')").fetchall()[0][0]
        # Otherwise the checkpoint would write row groups anew to merge them, and leave as many blocks free.
        connection.execute("SET max_vacuum_tasks = 0")
        try:
            connection.execute("CHECKPOINT")
        finally:
            connection.execute(f"SET max_vacuum_tasks = {int(merging)}")
    return int(store.fetch("SELECT used_blocks * block_size FROM pragma_database_size()")[0][0])


def _flat(column: pa.ChunkedArray) -> pa.Array:
    values = column.combine_chunks()
    return values.flatten() if pa.types.is_nested(values.type) else values


def _stored(values: pa.Array, path: Path) -> float | None:
    """Bytes a value: where the next column begins, less where this one does; None where they lie in blocks of their own."""
    rows = pa.table({"value": values, "after": pa.array(range(len(values)), pa.uint32())})
    with duckdb.connect(str(path)) as connection:
        connection.register("rows", rows)
        connection.execute("CREATE TABLE measured AS SELECT * FROM rows")
        connection.execute("CHECKPOINT")
        place = {column: (block, offset) for column, block, offset in connection.execute(_PLACES).fetchall()}
    (block, start), (following, end) = place["value"], place["after"]
    return (end - start) / len(values) if block == following and end > start else None


def bytes_before(store: Store) -> int:
    """Bytes that a store has in use before a run is recorded into it; 0 where it will be the first."""
    return bytes_in_use(store) if store.runs() else 0


def bytes_taken(store: Store, run_id: str, before: int) -> int:
    """Bytes that a run took: of the file, more than were in use before it, and of its vectors."""
    folder = vectors_folder(store.path, run_id)
    vectors = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return max(0, bytes_in_use(store) - before) + vectors


def note_costs(store: Store, run_id: str, *, planned: Mapping[str, float] | None, seconds: float, before: int) -> None:
    """Keep with a run that has ended what it was planned to take and what it took: `planned` and `actual` of its summary.

    Args:
        store, run_id: of the run, whose summary is written.
        planned: bytes and seconds as `moescope.plan` gave them; None where nothing was planned, and nothing is kept of it.
        seconds: that it took.
        before: `bytes_before` it.
    """
    noted: dict[str, Mapping[str, float]] = {"planned": planned} if planned else {}
    with suppress(MoescopeError, duckdb.Error, OSError):  # a disk that broke is told by whoever met it first
        noted["actual"] = {"bytes": bytes_taken(store, run_id, before), "seconds": round(seconds, 3)}
        store.connection.execute(
            "UPDATE runs SET summary = json_merge_patch(summary, ?) WHERE run_id = ?", [to_json(noted), run_id]
        ).fetchall()
