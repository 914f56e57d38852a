"""Opening a store's file: every way it can be wrong, told apart and explained."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from moescope.core.errors import StoreError
from moescope.store.schema import SCHEMA_VERSION, TABLES
from moescope.store.transaction import transaction

_MAGIC = b"DUCK"
_OTHER_OBJECTS = """
    SELECT
        (SELECT count(*) FROM duckdb_views() WHERE NOT internal)
        + (SELECT count(*) FROM duckdb_sequences())
        + (SELECT count(*) FROM duckdb_types() WHERE NOT internal)
        + (SELECT count(*) FROM duckdb_functions() WHERE NOT internal)
        + (SELECT count(*) FROM duckdb_schemas() WHERE NOT internal)
"""
_HOLDER = re.compile(r"held in (?P<program>.+?) \(PID (?P<pid>\d+)\)")


def open_connection(path: Path, *, read_only: bool) -> duckdb.DuckDBPyConnection:
    """Connect to the store at `path`, making it where it is not there yet.

    Raises:
        StoreError: not a DuckDB file, another program's file, written by a newer version, held by another process, no
            permission, or missing where `read_only`. Nothing is changed in any of these cases.
    """
    _check_file(path, read_only=read_only)
    try:
        connection = duckdb.connect(str(path), read_only=read_only)
    except duckdb.Error as refused:
        raise _explained(path, refused) from refused
    try:
        _check_contents(path, connection, read_only=read_only)
    except duckdb.Error as refused:
        connection.close()
        raise _explained(path, refused) from refused
    except BaseException:
        connection.close()
        raise
    return connection


def _check_file(path: Path, *, read_only: bool) -> None:
    if path.is_dir():
        raise StoreError(
            f"{path} is a folder", expected="the path of a store's file", fix=f"for instance {path}/runs.duckdb"
        )
    if not path.exists():
        if read_only:
            raise StoreError(
                f"there is no store at {path}", fix="check the path, or record into it: moescope profile … --store"
            )
        if not path.parent.is_dir():
            raise StoreError(f"cannot make a store at {path}", found="no such folder", fix=f"mkdir -p {path.parent}")
        return
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as refused:
        raise StoreError(f"cannot read {path}", found=str(refused)) from refused
    if head and head[8:12] != _MAGIC:
        raise StoreError(
            f"{path} is not a store",
            expected="a DuckDB file made by moescope",
            found="a file of another kind",
            fix="choose another path; the file was left as it is",
        )


def _explained(path: Path, refused: duckdb.Error) -> StoreError:
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
    if "ermission denied" in text or "ead-only file system" in text:
        return StoreError(
            f"cannot write {path}", found="no permission", fix="choose another folder, or open it with read_only=True"
        )
    if any(word in text for word in ("enough bytes", "orrupt", "hecksum", "Could not read")):
        return StoreError(f"{path} is damaged", found=text, fix="restore it from a copy; the file was left as it is")
    return StoreError(f"cannot open {path}", found=text)


def _check_contents(path: Path, connection: duckdb.DuckDBPyConnection, *, read_only: bool) -> None:
    tables = {name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
    if not tables and connection.execute(_OTHER_OBJECTS).fetchall() == [(0,)]:
        if read_only:
            raise StoreError(f"{path} is empty", fix="record into it first: moescope profile … --store")
        _create(connection)
        return
    info = _info(connection) if "store_info" in tables else {}
    if info.get("application") != "moescope":
        raise StoreError(
            f"{path} belongs to another program",
            expected="a store made by moescope",
            found=f"a DuckDB file with {'the tables ' + ', '.join(sorted(tables)[:5]) if tables else 'no tables'}",
            fix="choose another path; the file was left as it is",
        )
    version = info.get("schema_version", "")
    if version != str(SCHEMA_VERSION):
        raise StoreError(
            f"{path} has schema version {version}",
            expected=f"version {SCHEMA_VERSION}",
            found=f"a store made by {info.get('created_by', 'an unknown program')}",
            fix="install that version of moescope or a later one; the file was left as it is",
        )


def _info(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """Facts of the file, none where its table of that name is another program's."""
    try:
        return dict(connection.execute("SELECT key, value FROM store_info").fetchall())
    except duckdb.BinderException:
        return {}


def _create(connection: duckdb.DuckDBPyConnection) -> None:
    from moescope.core.versions import VERSION

    with transaction(connection):
        for table in TABLES:
            for statement in table.ddl():
                connection.execute(statement)
        connection.executemany(
            "INSERT INTO store_info VALUES (?, ?)",
            [
                ["application", "moescope"],
                ["schema_version", str(SCHEMA_VERSION)],
                ["created_by", f"moescope {VERSION}"],
                ["created_at", datetime.now(UTC).isoformat(timespec="seconds")],
            ],
        )
