"""Deleting runs: every row of theirs in every table, and the vectors beside the store."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import duckdb

from moescope.core.errors import InputError, RunError
from moescope.store.run import Run
from moescope.store.schema import TABLES, Table
from moescope.store.transaction import transaction
from moescope.store.vector_shards import vectors_folder

if TYPE_CHECKING:
    from moescope.store.store import Store

# What belongs to the file and to no run: an autoencoder outlives the vectors that it was trained on.
_OF_THE_FILE = ("store_info", "saes")


@dataclass(frozen=True)
class Deleted:
    """What deleting took away.

    Attributes:
        rows: table → rows; tables without any are left out.
        vector_bytes: bytes of the files of vectors beside the store.
    """

    rows: Mapping[str, int]
    vector_bytes: int


def rows_of_run() -> dict[str, str]:
    """Table → the condition that its rows belong to the run `$run`, those without a run of their own first.

    It is read from the schema, so that a table that is added is not forgotten. An effect belongs to the run it was measured
    against; rows that only name something of a run, as `effect_sequences` names an effect, go with it.

    Raises:
        RunError: a table tells neither way whose its rows are: a mistake in the schema.

    Example:
        >>> rows_of_run()["tokens"]
        'run_id = $run'
    """
    owned = {table.name: f"{column} = $run" for table in TABLES if (column := _run_column(table))}
    identified = {t.columns[0].name: t.name for t in TABLES if _run_column(t) not in (None, t.columns[0].name)}
    through = {}
    for table in TABLES:
        if table.name in owned or table.name in _OF_THE_FILE:
            continue
        links = [(c.name, identified[c.name]) for c in table.columns if c.name in identified]
        if not links:
            raise RunError(f"rows of {table.name} name no run, so that a run cannot be deleted")
        column, owner = links[0]
        through[table.name] = f'{column} IN (SELECT {column} FROM "{owner}" WHERE {owned[owner]})'
    return {**through, **{name: where for name, where in owned.items() if name != "runs"}, "runs": owned["runs"]}


def delete_runs(store: Store, runs: Sequence[Run]) -> Deleted:
    """Delete `runs` from `store`, all of them in one transaction; their room is free for the next run.

    Args:
        store: open for writing.
        runs: of this store.

    Raises:
        InputError: the store is open for reading only, a run is being recorded, or is no longer there. Nothing is deleted.
        RunError: the rows are deleted, but files of vectors could not be.
    """
    store.check_writable()
    connection = store.connection
    rows: dict[str, int] = {}
    try:
        with transaction(connection):
            for run in runs:
                _check(run, connection)
                for table, count in _delete(run, connection).items():
                    rows[table] = rows.get(table, 0) + count
    except duckdb.Error as refused:
        raise RunError(
            "the runs could not be deleted", found=str(refused), fix="nothing was deleted; free some space on the disk"
        ) from refused
    with suppress(duckdb.Error):  # while others write, blocks become free at the next checkpoint instead
        connection.execute("CHECKPOINT")
    return Deleted(rows, sum(_delete_vectors(store, run) for run in runs))


def _run_column(table: Table) -> str | None:
    names = {column.name for column in table.columns}
    return next((name for name in ("base_run_id", "run_id") if name in names), None)


def _check(run: Run, connection: duckdb.DuckDBPyConnection) -> None:
    found = connection.execute("SELECT status FROM runs WHERE run_id = ?", [run.run_id]).fetchall()
    if not found:
        raise InputError(f"run {run.name!r} is no longer in {run.store.path}", fix="nothing was deleted")
    if found[0][0] == "running":
        raise InputError(
            f"run {run.name!r} is being recorded", fix="wait until it is done, or stop it first; nothing was deleted"
        )


def _delete(run: Run, connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    deleted = {}
    for table, where in rows_of_run().items():
        found = connection.execute(f'DELETE FROM "{table}" WHERE {where}', {"run": run.run_id}).fetchall()
        if count := int(found[0][0]):
            deleted[table] = count
    # What was measured with this run against another stays; that its run was kept is no longer true.
    connection.execute("UPDATE effects SET run_id = NULL WHERE run_id = ?", [run.run_id])
    return deleted


def _delete_vectors(store: Store, run: Run) -> int:
    folder = vectors_folder(store.path, run.run_id)
    if not folder.is_dir() or folder.is_symlink():
        return 0
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    try:
        shutil.rmtree(folder)
    except OSError as refused:
        raise RunError(
            f"run {run.name!r} is deleted, but its vectors are not", found=str(refused), fix=f"delete {folder} yourself"
        ) from refused
    with suppress(OSError):  # the folder of all runs goes with the last of them
        folder.parent.rmdir()
    return size
