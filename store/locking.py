"""A store closed in on itself: its queries reach no file, no address, no extension and no variable of the program."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import duckdb

from moescope.core.errors import StoreError
from moescope.store.file_checks import may_write
from moescope.store.sql_text import literal

# Recording lowers these while it runs and puts them back; neither lets anything in or out.
_WRITERS_OWN = ("memory_limit", "threads", "max_vacuum_tasks")


def lock_down(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    folders: Sequence[Path],
    *,
    writing: bool = False,
    memory: str | None = None,
) -> None:
    """Shut the file system, the network, extensions, the program's variables, and then the settings themselves.

    Tables handed over by `register` still go in. DuckDB goes on using the file, its log and its spill folder.

    Args:
        connection: new; one configuration holds for all connections of the process to the file.
        path: the file.
        folders: where queries may read and write files all the same.
        writing: leave the settings open that recording changes for a while.
        memory: what DuckDB may keep in memory, for instance `1GiB`; beyond it large queries spill.

    Raises:
        StoreError: the file is open in this process, for other folders, or without these locks.
    """
    wanted = sorted(str(folder.resolve()) for folder in folders)
    query = "SELECT current_setting('lock_configuration'), current_setting('allowed_directories')"
    locked, allowed = connection.execute(query).fetchall()[0]
    if locked:  # by a Store of this process on the same file
        if not {f.rstrip("/") for f in wanted} <= {f.rstrip("/") for f in allowed}:
            raise StoreError(
                f"{path} is already open in this process, for other folders", fix="close that Store first, or use it"
            )
        return
    if not may_write(path.parent):
        # Large queries spill beside the store, which cannot be here.
        # Nowhere at all: queries that need more than memory then say so.
        with suppress(OSError):
            spill = tempfile.mkdtemp(prefix="moescope-")
            weakref.finalize(connection, shutil.rmtree, spill, ignore_errors=True)
            connection.execute(f"SET temp_directory = {literal(spill)}")
    if memory is not None:
        connection.execute(f"SET memory_limit = {literal(memory)}")
    if wanted:
        connection.execute("SET allowed_directories = [" + ", ".join(literal(f) for f in wanted) + "]")
    if writing:
        connection.execute("SET allowed_configs = [" + ", ".join(literal(name) for name in _WRITERS_OWN) + "]")
    connection.execute("SET python_enable_replacements = false")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def is_locked(connection: duckdb.DuckDBPyConnection) -> bool:
    """Whether queries of this connection are closed in on the store."""
    query = "SELECT current_setting('lock_configuration') AND NOT current_setting('enable_external_access')"
    return bool(connection.execute(query).fetchall()[0][0])
