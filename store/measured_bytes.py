"""Bytes as they are found: how well a run's floats compress, and how much of a store's file is in use."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import duckdb
import pyarrow as pa

from moescope.store.store import Store
from moescope.store.table_rows import FLOAT_BYTES

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
    """Bytes of the blocks that a store's file uses, once what waits in its log is in the file."""
    with suppress(duckdb.Error):  # while another connection writes, the log stays where it is
        store.connection.execute("CHECKPOINT")
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
