"""Compacting: the file written anew, without the room that deleted rows left."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from moescope.core.atomic import written_whole
from moescope.core.errors import StoreError
from moescope.store.sql_text import literal, quoted_name

_TABLES = """
    SELECT schema_name, table_name
    FROM duckdb_tables()
    WHERE database_name = 'store' AND NOT internal AND NOT temporary
"""
# A new file is a little larger where its row groups fall otherwise, and holds a few blocks of bookkeeping.
_SLACK = 4 << 20


@dataclass(frozen=True)
class Compacted:
    """Size of a store's file in bytes, before and after it was written anew."""

    before: int
    after: int


def compact_file(path: Path) -> Compacted:
    """Write the store at `path` anew beside itself, and put the new file in its place in one step.

    Everything in the file is taken over: also tables and views that the user put there, comments, and the order of rows.

    Args:
        path: of a store that no connection is open to, neither of this process nor of a writer elsewhere.

    Raises:
        StoreError: something else uses the file, there is no room for the second one, or writing failed. The store is then
            as it was.
    """
    path = path.resolve()
    # Both connections stay open until the new file is in place, for they keep writers of other processes out; closing one
    # would give up the locks of both. The first is refused where this process has another one open, which would go on
    # writing into the file that is replaced; the second can write a new file beside one that is only read.
    with ExitStack() as opened:
        opened.enter_context(_alone_in(path.parent))
        try:
            held = opened.enter_context(duckdb.connect(str(path), read_only=True))
        except duckdb.Error as refused:
            here = "different configuration" in str(refused)
            raise StoreError(
                f"{path} cannot be compacted while it is in use",
                found="another Store, cursor or unread result of this process" if here else str(refused),
                fix="close it, and compact again",
            ) from refused
        try:
            _check_room(path, held)
            _clear_away(path)
            before = path.stat().st_size
            with written_whole(path) as partial:
                copier = opened.enter_context(duckdb.connect(":memory:", config={"temp_directory": f"{partial}.tmp"}))
                try:
                    _copy(copier, path, partial)
                finally:
                    partial.with_name(partial.name + ".wal").unlink(missing_ok=True)
                shutil.copymode(path, partial)
        except (duckdb.Error, OSError) as refused:
            raise StoreError(
                f"{path} could not be compacted",
                found=str(refused),
                fix="free some space, or restore it from a copy where it is damaged; the store is as it was",
            ) from refused
        return Compacted(before, path.stat().st_size)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One compaction at a time: two would each put their own file in place, and what was written between is lost."""
    try:
        import fcntl
    except ImportError as missing:
        raise StoreError("stores cannot be compacted on this system", found="no locks of POSIX") from missing
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as refused:
        raise StoreError(f"a store in {folder} is being compacted", fix="wait until that is done") from refused
    finally:
        os.close(handle)


def _clear_away(path: Path) -> None:
    """What compactions that were killed have left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _check_room(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    if path.with_name(path.name + ".wal").exists():
        raise StoreError(
            f"{path} cannot be compacted", found="a log beside it that is not part of it yet", fix="open it once first"
        )
    query = "SELECT used_blocks * block_size FROM pragma_database_size()"
    needed = int(connection.execute(query).fetchall()[0][0]) + _SLACK
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise StoreError(
            f"there is no room to compact {path}: it is written anew before the old file goes",
            expected=f"{needed:,} bytes free in {path.parent}",
            found=f"{free:,}",
            fix="free some space, or move the store to a larger disk; new runs use the room of deleted ones all the same",
        )


def _copy(connection: duckdb.DuckDBPyConnection, path: Path, target: Path) -> None:
    connection.execute(f"ATTACH {literal(str(path))} AS store (READ_ONLY)")
    connection.execute(f"ATTACH {literal(str(target))} AS compacted")
    connection.execute("COPY FROM DATABASE store TO compacted")
    for schema, table in connection.execute(_TABLES).fetchall():
        name = f"{quoted_name(schema)}.{quoted_name(table)}"
        query = f"SELECT (SELECT count(*) FROM store.{name}), (SELECT count(*) FROM compacted.{name})"
        old, new = connection.execute(query).fetchall()[0]
        if old != new:
            raise StoreError(
                f"{path} could not be compacted",
                expected=f"{old:,} rows of {table}",
                found=f"{new:,}",
                fix="the store is as it was",
            )
    connection.execute("CHECKPOINT compacted")
    connection.execute("DETACH compacted")
    with target.open("rb") as file:
        os.fsync(file.fileno())
