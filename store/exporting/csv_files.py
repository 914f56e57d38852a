"""CSV: one file a table; lists are written as `[1, 2]`, missing values as nothing, empty text as `""`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.csv as pacsv

from moescope.store.exporting.tables import decisions, rows_of
from moescope.store.run import Run

_ROWS_A_PIECE = 122_880


def write_csv(run: Run, folder: Path, tables: Sequence[str], tell: Callable[[str], None]) -> None:
    """Write `{table}.csv` for each table."""
    for table in tables:
        tell(table)
        rows = decisions(run) if table == "routing" else rows_of(run, table)
        columns = ", ".join(_as_text(name, str(kind)) for name, kind in zip(rows.columns, rows.types, strict=True))
        reader = rows.project(columns).to_arrow_reader(_ROWS_A_PIECE)
        with pacsv.CSVWriter(str(folder / f"{table}.csv"), reader.schema) as writer:
            for batch in reader:
                writer.write_batch(batch)


def _as_text(name: str, kind: str) -> str:
    """Lists and bytes as text, which CSV has nothing else for."""
    return f'CAST("{name}" AS VARCHAR) AS "{name}"' if kind.endswith("]") or kind == "BLOB" else f'"{name}"'
