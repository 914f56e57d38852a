"""Partitioned Parquet: `{table}/run_id=…/part-0.parquet`, decisions also by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from moescope.store.exporting.tables import decisions, routed_layers, rows_of
from moescope.store.run import Run

_ROWS_A_GROUP = 122_880


def write_parquet(run: Run, folder: Path, tables: Sequence[str], tell: Callable[[str], None]) -> None:
    """Write tables as hive partitions, which Spark, Ray Data, Polars and DuckDB read as they are."""
    for table in tables:
        inside = folder / table / f"run_id={run.run_id}"
        if table != "routing":
            tell(table)
            inside.mkdir(parents=True)
            _write(rows_of(run, table), inside / "part-0.parquet")
            continue
        for layer in routed_layers(run):
            tell(f"routing, layer {layer}")
            place = inside / f"layer={layer}"
            place.mkdir(parents=True)
            _write(decisions(run, layer), place / "part-0.parquet")


def _write(rows: duckdb.DuckDBPyRelation, path: Path) -> None:
    """Piece by piece through Arrow: a store that is open for reading lets no query write a file."""
    reader = rows.to_arrow_reader(_ROWS_A_GROUP)
    with pq.ParquetWriter(path, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)
