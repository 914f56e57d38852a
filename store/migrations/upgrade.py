"""Upgrading a store's file: a copy kept beside it, then every change in one transaction."""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import duckdb

from moescope.core.atomic import written_whole
from moescope.core.errors import StoreError
from moescope.core.versions import VERSION
from moescope.store.making import note
from moescope.store.migrations.steps import run_steps
from moescope.store.schema import SCHEMA_VERSION
from moescope.store.transaction import transaction

logger = logging.getLogger(__name__)

_PIECE = 16 << 20


def upgrade(path: Path, connection: duckdb.DuckDBPyConnection, version: int) -> Path:
    """Bring the store at `path` from schema `version` to the present one, and give the path of the copy kept.

    Whatever stops it, a full disk or a kill, the file holds either the old schema or the new one, whole.

    Args:
        path: the file, links followed.
        connection: the only one to it; it is closed, for the file must be free before the copy's is.
        version: what the file says it is.

    Raises:
        StoreError: no room for the copy, no permission, or a name in the way. The file is then as it was.
    """
    # On POSIX systems, closing any handle of a file gives up every lock that the process has on it, DuckDB's too. So the
    # handle that is copied from outlives the connection.
    with path.open("rb") as file, _closed_at_end(connection):
        try:
            connection.execute("CHECKPOINT")  # what a killed writer left in the log belongs into the copy
            copy = _keep_copy(path, file, version)
            _change(connection, version)
        except (duckdb.Error, OSError) as refused:
            raise StoreError(
                f"{path} could not be upgraded from schema version {version} to {SCHEMA_VERSION}",
                found=str(refused),
                fix="free some space on the disk, or copy the store where you may write; its content is as it was",
            ) from refused
    logger.warning(
        "%s was upgraded from schema version %d to %d; the file as it was is kept as %s",
        path,
        version,
        SCHEMA_VERSION,
        copy.name,
    )
    return copy


def _change(connection: duckdb.DuckDBPyConnection, version: int) -> None:
    with transaction(connection):
        run_steps(connection, version, SCHEMA_VERSION)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        said_by = {"schema_version": str(SCHEMA_VERSION), "upgraded_by": f"moescope {VERSION}", "upgraded_at": now}
        note(connection, said_by)


@contextmanager
def _closed_at_end(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    try:
        yield
    finally:
        connection.close()


def _keep_copy(path: Path, file: BinaryIO, version: int) -> Path:
    """Copy the open `file` beside `path`, unless an earlier attempt left the very same copy; nothing is overwritten."""
    names = (f"{path.name}.v{version}" + (f".{n}" if n > 1 else "") for n in range(1, 1000))
    for target in map(path.with_name, names):
        if not target.exists():
            break
        if _same(file, target):
            return target
    for left in path.parent.glob(f".{glob.escape(path.name)}.v*.partial"):  # by an attempt that was killed
        left.unlink()
    size, free = os.fstat(file.fileno()).st_size, shutil.disk_usage(path.parent).free
    if free < size:
        raise StoreError(
            f"there is no room for the copy that is kept when {path} is upgraded",
            expected=f"{size:,} bytes free in {path.parent}",
            found=f"{free:,}",
            fix="free some space, or move the store to another disk; nothing was changed",
        )
    with written_whole(target) as partial:
        with partial.open("wb") as out:
            file.seek(0)
            shutil.copyfileobj(file, out, _PIECE)
            out.flush()
            os.fsync(out.fileno())
        shutil.copymode(path, partial)
    return target


def _same(file: BinaryIO, other: Path) -> bool:
    if not other.is_file() or other.stat().st_size != os.fstat(file.fileno()).st_size:
        return False
    file.seek(0)
    with other.open("rb") as copy:
        while piece := file.read(_PIECE):
            if copy.read(_PIECE) != piece:
                return False
    return True
