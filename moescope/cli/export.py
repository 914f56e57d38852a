"""`moescope export`: a run as files of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moescope.cli.completion import table_names
from moescope.cli.flags import GivenStore, Json, OneRun
from moescope.cli.output import as_json, facts, news
from moescope.cli.stages import stages
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.store.run import Run
    from moescope.store.store import Store


def export(
    store: GivenStore,
    folder: Annotated[Path, typer.Argument(help="Folder to write; made here.", show_default=False)],
    run: OneRun = None,
    format: Annotated[  # noqa: A002  the flag's name
        str, typer.Option(help="parquet (partitioned), csv, or hf (a Hugging Face dataset of the decisions).")
    ] = "parquet",
    tables: Annotated[
        str | None,
        typer.Option(
            help="Tables, comma-separated.",
            show_default="all of which the run has rows",
            autocompletion=table_names,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    json: Json = False,
) -> None:
    """Write a run as partitioned Parquet, CSV, or a Hugging Face dataset on disk.

    Example: moescope export runs.duckdb exported --run base --format parquet
    """
    from moescope.store.exporting.export_run import export_run
    from moescope.store.store import Store as OpenedStore

    chosen = tables.replace(" ", "").split(",") if tables else None
    with OpenedStore(store, read_only=True) as opened, stages("exporting") as tell:
        found = only_run(opened, run)
        written = export_run(found, folder, format=format, tables=chosen, overwrite=overwrite, tell=tell)
        files = [path for path in written.rglob("*") if path.is_file()]
        summary = {
            "run": found.name,
            "status": found.status,
            "format": format,
            "folder": str(written),
            "files": len(files),
            "bytes": sum(path.stat().st_size for path in files),
        }
    as_json(summary) if json else facts(summary)
    if summary["status"] != "complete":
        news(f"run {summary['run']} is {summary['status']}: the export lacks what the run lacks")


def only_run(store: Store, name: str | None) -> Run:
    """The run of that name, or the only one there is."""
    runs = store.runs()
    if name is not None or len(runs) == 1:
        return store.run(name) if name is not None else runs[0]
    raise InputError(
        f"{store.path} holds {len(runs)} runs",
        found=", ".join(run.name for run in runs[:10]) or None,
        fix="name one: --run" if runs else "record one first",
    )
