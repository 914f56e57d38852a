"""`export_run`: a run as files of other programs, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb

from moescope.core.errors import InputError, RunError
from moescope.core.json_data import to_json
from moescope.core.versions import library_versions
from moescope.store.exporting.csv_files import write_csv
from moescope.store.exporting.folder import ABOUT, folder_written_whole
from moescope.store.exporting.hf_dataset import write_hf_dataset
from moescope.store.exporting.parquet import write_parquet
from moescope.store.exporting.tables import chosen_tables
from moescope.store.run import Run

Writer = Callable[[Run, Path, Sequence[str], Callable[[str], None]], None]
FORMATS: dict[str, Writer] = {"parquet": write_parquet, "csv": write_csv, "hf": write_hf_dataset}


def export_run(
    run: Run,
    folder: str | Path,
    *,
    format: str = "parquet",  # noqa: A002  the flag's name
    tables: Sequence[str] | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Write a run to a folder.

    `routing` is written in the neutral form that `import_trace` reads: with sequence, position, label and the token's text;
    every other table as it is. `moescope.json` says which run it was.

    Args:
        run: from `store.run(name)`.
        folder: made here; its parent must be there.
        format: `parquet` (hive partitions run_id and layer), `csv`, or `hf` (a Hugging Face dataset of the decisions).
        tables: to write; None for all of which the run has rows.
        overwrite: replace an earlier export.
        tell: called with the name of each part before it is written.

    Returns:
        The folder.

    Raises:
        InputError: the folder is there already, there is nothing to write, or no such format or table.
        RunError: the disk is full; nothing is left behind.

    Example:
        >>> import tempfile, pyarrow as pa
        >>> from moescope.store.importing.import_trace import import_trace
        >>> from moescope.store.store import Store
        >>> trace = pa.table({"sequence_id": [0], "position": [0], "layer": [3], "experts": [[5, 1]]})
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Store(folder / "runs.duckdb") as store:
        ...     run = import_trace(store, trace, name="tiny", n_experts=8)
        ...     sorted(path.name for path in export_run(run, folder / "out", tables=["routing", "loads"]).iterdir())
        ['loads', 'moescope.json', 'routing']
    """
    if format not in FORMATS:
        raise InputError(f"there is no format {format!r}", expected=", ".join(FORMATS))
    chosen = chosen_tables(run, tables)
    target = Path(folder)
    about = {
        "application": "moescope",
        "format": format,
        "run": {"run_id": run.run_id, **run.info},
        "tables": chosen if format != "hf" else ["routing"],
        "versions": library_versions(),
    }
    try:
        with folder_written_whole(target, overwrite=overwrite) as partial:
            FORMATS[format](run, partial, chosen, tell or (lambda _: None))
            (partial / ABOUT).write_text(to_json(about, indent=1), encoding="utf-8")
    except (duckdb.Error, OSError) as refused:
        raise RunError(
            f"{target} could not be written",
            found=str(refused).split("\n", maxsplit=1)[0],
            fix="free some space on the disk",
        ) from refused
    return target
