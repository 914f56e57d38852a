"""Opening a store's file: every way it can be wrong, told apart and explained."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import duckdb

from moescope.core.errors import StoreError
from moescope.store.file_checks import checked_path
from moescope.store.locking import lock_down
from moescope.store.making import make
from moescope.store.migrations.steps import oldest
from moescope.store.migrations.upgrade import upgrade
from moescope.store.schema import SCHEMA_VERSION

_OTHER_OBJECTS = """
    SELECT
        (SELECT count(*) FROM duckdb_views() WHERE NOT internal)
        + (SELECT count(*) FROM duckdb_sequences())
        + (SELECT count(*) FROM duckdb_types() WHERE NOT internal)
        + (SELECT count(*) FROM duckdb_functions() WHERE NOT internal)
        + (SELECT count(*) FROM duckdb_schemas() WHERE NOT internal)
"""
_PATIENCE_SECONDS = 5.0
_OPENING = threading.Lock()  # between looking at a file and holding it, no other thread may open the same one
_HOLDER = re.compile(r"held in (?P<program>.+?) \(PID (?P<pid>\d+)\)")


def open_connection(
    path: Path, *, read_only: bool, folders: Sequence[Path] = (), locked: bool = False, memory: str | None = None
) -> duckdb.DuckDBPyConnection:
    """Connect to the store at `path`, making it where it is not there yet, and upgrading it where it is older.

    Args:
        path: the file; links are followed.
        read_only: change nothing. No query can then touch a file outside the store, nor undo that: a file from
            elsewhere may hold views that would read yours.
        folders: where queries may read and write files all the same.
        locked: close a store that is open for writing in on itself too, as one for reading always is.
        memory: with either, what DuckDB may keep in memory.

    Raises:
        StoreError: not a DuckDB file, another program's file, written by a newer version, held by another process, no
            permission, damaged; missing, or older, where `read_only`; older where `locked`. Nothing is changed in any of
            these cases.
    """
    with _OPENING:
        path, shared = checked_path(path, read_only=read_only)
        connection, version = _connect(path, read_only=read_only, folders=folders, locked=locked, memory=memory)
    if version < SCHEMA_VERSION:
        if shared:
            connection.close()
            raise StoreError(
                f"{path} has schema version {version} and is already open in this process",
                fix="close that connection first: the store is upgraded when it is next opened",
            )
        upgrade(path, connection, version)
        connection, _ = _connect(path, read_only=False)
    return connection


def _connect(
    path: Path, *, read_only: bool, folders: Sequence[Path] = (), locked: bool = False, memory: str | None = None
) -> tuple[duckdb.DuckDBPyConnection, int]:
    """A connection to what is there, and its schema version, which may be older where it can be upgraded."""
    connection = _connected(path, read_only=read_only)
    try:
        if not read_only:
            with suppress(duckdb.Error):  # a locked configuration stays as it is
                # Checkpoints would write row groups anew to merge them, and leave a fifth of the file as holes.
                connection.execute("SET max_vacuum_tasks = 0")
        if read_only or locked:
            # before anything in the file is asked
            lock_down(connection, path, folders, writing=not read_only, memory=memory)
        return connection, _check_contents(path, connection, read_only=read_only, upgrading=not (read_only or locked))
    except duckdb.Error as refused:
        connection.close()
        raise explained(path, refused) from refused
    except BaseException:
        connection.close()
        raise


def _connected(path: Path, *, read_only: bool) -> duckdb.DuckDBPyConnection:
    patience = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return duckdb.connect(str(path), read_only=read_only)
        except duckdb.Error as refused:
            if "is already attached by database" in str(refused) and time.monotonic() < patience:
                time.sleep(0.01)  # another thread is closing it: DuckDB knows it neither as open nor as closed
                continue
            raise explained(path, refused) from refused


def explained(path: Path, refused: duckdb.Error) -> StoreError:
    """What DuckDB refused, in words that say what to do about the store."""
    text = str(refused)
    if holder := _HOLDER.search(text):
        return StoreError(
            f"{path} is in use",
            found=f"held by {holder['program']} (process {holder['pid']})",
            fix="close that program, or wait until it is done: one process at a time may hold a store for writing",
        )
    if "different configuration" in text:
        return StoreError(
            f"{path} is already open in this process in another mode", fix="close that Store first, or use it"
        )
    if "version number" in text or "newer version" in text:
        return StoreError(
            f"{path} was written by another version of DuckDB", found=text, fix="upgrade duckdb and moescope"
        )
    if disk := _about_the_disk(path, text):
        return disk
    if is_damage(refused):
        return StoreError(f"{path} is damaged", found=text, fix="restore it from a copy; the file was left as it is")
    return StoreError(f"cannot open {path}", found=text)


def _about_the_disk(path: Path, text: str) -> StoreError | None:
    if "ermission denied" in text or "ead-only file system" in text:
        return StoreError(
            f"cannot write {path}", found="no permission", fix="choose another folder, or open it with read_only=True"
        )
    if "has been invalidated" in text:
        return StoreError(
            f"{path} could not be written, and DuckDB lets nobody use it until it is opened anew",
            found=text.rsplit("Original error:", maxsplit=1)[-1].strip().strip('"'),
            fix="free some space where the disk is full, close the store and open it again: what was committed is whole",
        )
    if "No space left" in text or "disk full" in text.lower():
        return StoreError(f"{path} cannot be written: the disk is full", found=text, fix="free some space")
    return None


def concerns_file(refused: duckdb.Error) -> bool:
    """Whether it is the file or its disk that refused, and not the query."""
    kinds = (duckdb.IOException, duckdb.FatalException, duckdb.TransactionException)
    disk = isinstance(refused, kinds) and any(w in str(refused) for w in ("has been invalidated", "No space left"))
    return disk or is_damage(refused)


def is_damage(refused: duckdb.Error) -> bool:
    """Whether DuckDB tells of a file that is not as it was written."""
    kinds = (duckdb.IOException, duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException)
    known = isinstance(refused, kinds) or type(refused) is duckdb.Error  # a wrong checksum has no class of its own
    words = ("enough bytes", "orrupt", "hecksum", "Could not read")
    return known and any(word in str(refused) for word in words)


def _check_contents(path: Path, connection: duckdb.DuckDBPyConnection, *, read_only: bool, upgrading: bool) -> int:
    """The schema version of what is there, made where the file is new."""
    tables = {name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
    if not tables and connection.execute(_OTHER_OBJECTS).fetchall() == [(0,)]:
        if read_only:
            raise StoreError(f"{path} is empty", fix="record into it first: moescope profile … --store")
        make(connection)
        return SCHEMA_VERSION
    info = _info(connection) if "store_info" in tables else {}
    if info.get("application") != "moescope":
        raise StoreError(
            f"{path} belongs to another program",
            expected="a store made by moescope",
            found=f"a DuckDB file with {'the tables ' + ', '.join(sorted(tables)[:5]) if tables else 'no tables'}",
            fix="choose another path; the file was left as it is",
        )
    text = info.get("schema_version", "")
    version = int(text) if text.isdecimal() else 0
    maker = info.get("upgraded_by") or info.get("created_by", "an unknown program")
    if version > SCHEMA_VERSION or version < oldest():
        raise StoreError(
            f"{path} has schema version {text or 'unknown'}",
            expected=f"version {oldest()} to {SCHEMA_VERSION}",
            found=f"a store written by {maker}",
            fix=f"install {maker} or later; the file was left as it is",
        )
    if version < SCHEMA_VERSION and not upgrading:
        raise StoreError(
            f"{path} has schema version {version}, which must be upgraded before it is read",
            expected=f"version {SCHEMA_VERSION}",
            found=f"a store written by {maker}",
            fix=f"moescope runs upgrade {path} (a copy of the file is kept beside it), or open it once with Store(path); "
            "where you may not write, upgrade a copy",
        )
    return version


def _info(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """Facts of the file, none where its table of that name is another program's."""
    try:
        return dict(connection.execute("SELECT key, value FROM store_info").fetchall())
    except duckdb.BinderException:
        return {}
