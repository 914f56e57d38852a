"""Reader of the neutral form: Parquet, CSV, a folder of Parquet files, npz, a table in memory, an export of moescope."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from moescope.core.errors import InputError
from moescope.store.importing.files import glob_free, load_arrays, reading
from moescope.store.importing.trace import COLUMNS, REQUIRED, Options, Trace, list_column

_ROWS_A_TABLE = 245_760
_EXAMPLE = "sequence_id, position, layer, experts; see docs/import-export.md"


def read_neutral(source: Any, connection: duckdb.DuckDBPyConnection, options: Options) -> Trace:
    """A trace in the neutral form.

    Args:
        source: path of a .parquet, .csv or .npz file, of a folder of Parquet files or of an export; or a table of pyarrow,
            pandas, Polars, datasets or DuckDB.
        connection: reads files, piece by piece.
        options: unused; a neutral trace says everything itself.

    Raises:
        InputError: columns are missing or of a wrong type, or the file cannot be read.
    """
    if not isinstance(source, Path):
        return Trace("table", decisions=_table(source, connection))
    if source.is_dir():
        return _folder(source, connection)
    if source.suffix == ".npz":
        return Trace("npz", decisions=_arrays(source))
    with reading(source):
        if source.suffix == ".csv":
            return Trace("csv", decisions=_csv(source, connection))
        return Trace("parquet", decisions=connection.read_parquet(glob_free(source), file_row_number=True))


def _folder(folder: Path, connection: duckdb.DuckDBPyConnection) -> Trace:
    """Every Parquet file below a folder; of an export, those of `routing`, with what it says of sequences and layers."""
    inside = folder / "routing" if (folder / "routing").is_dir() else folder
    files = sorted(p for p in inside.rglob("*.parquet") if p.is_file() and not p.name.startswith((".", "_")))
    if not files:
        raise InputError(
            f"{folder} holds no Parquet files", expected="a folder of .parquet files, or an export of moescope"
        )
    with reading(folder):
        decisions = connection.read_parquet(
            [glob_free(path) for path in files], file_row_number=True, filename=True, hive_partitioning=True
        )
        trace = Trace("parquet", decisions=decisions)
        if inside == folder:
            return trace
        runs = decisions.project("run_id").distinct().fetchall()
        if len(runs) > 1:
            raise InputError(
                f"{folder} holds {len(runs)} runs", fix=f"import one of them: {inside / f'run_id={runs[0][0]}'}"
            )
        trace.model = _model(folder)
        for name in ("sequences", "layers"):
            parts = sorted(p for p in (folder / name).rglob("*.parquet") if p.is_file())
            if parts:
                found = connection.read_parquet([glob_free(path) for path in parts], hive_partitioning=True)
                setattr(trace, name, found.to_arrow_table() if name == "layers" else found)
    return trace


def _model(folder: Path) -> str | None:
    """Of an export, what it was taken from."""
    try:
        about = json.loads((folder / "moescope.json").read_text(encoding="utf-8"))
        return str(about["run"]["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _csv(path: Path, connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    with path.open(encoding="utf-8-sig") as file:
        header = [name.strip().strip('"') for name in file.readline().split(",")]
    types = {name: COLUMNS[name][0] for name in header if name in COLUMNS}
    return connection.read_csv(glob_free(path), header=True, delimiter=",", dtype=types, allow_quoted_nulls=False)


def _arrays(path: Path) -> Any:
    """Tables of at most `_ROWS_A_TABLE` rows."""
    arrays = {name: array for name, array in load_arrays(path).items() if name in COLUMNS}
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise InputError(f"{path} lacks the arrays {', '.join(missing)}", expected=_EXAMPLE)
    rows = len(arrays["experts"])
    for name, array in arrays.items():
        wide = COLUMNS[name][0].endswith("[]")
        if array.ndim != (2 if wide else 1) or len(array) != rows:
            raise InputError(
                f"the array {name} of {path} has the shape {list(array.shape)}",
                expected=f"[{rows}, k]" if wide else f"[{rows}]",
            )
    return _sliced(arrays, rows)


def _sliced(arrays: dict[str, Any], rows: int) -> Any:
    for start in range(0, rows, _ROWS_A_TABLE):
        part = {name: array[start : start + _ROWS_A_TABLE] for name, array in arrays.items()}
        yield pa.table(
            {
                name: list_column(values, pa.from_numpy_dtype(values.dtype)) if values.ndim == 2 else _column(values)
                for name, values in part.items()
            }
        )


def _column(values: Any) -> pa.Array:
    return pa.array(values.astype(object) if values.dtype.kind == "U" else np.ascontiguousarray(values))


def _table(source: Any, connection: duckdb.DuckDBPyConnection) -> Any:
    if isinstance(source, duckdb.DuckDBPyRelation):
        return [source.to_arrow_table()]  # of another connection, perhaps
    if hasattr(source, "with_format") and hasattr(source, "features"):  # datasets.Dataset
        source = source.with_format("arrow")[:]
    elif hasattr(source, "to_arrow"):  # polars.DataFrame
        source = source.to_arrow()
    if isinstance(source, (pa.Table, pa.RecordBatchReader)) or hasattr(source, "iloc"):
        with reading("the table"):
            connection.register("moescope_source", source)
            return connection.table("moescope_source")
    raise InputError(
        f"a trace cannot be read from a {type(source).__name__}",
        expected="a path, or a table of pyarrow, pandas, Polars, datasets or DuckDB",
    )
