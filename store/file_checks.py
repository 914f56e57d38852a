"""What lies at a path, told before DuckDB touches it: DuckDB would fetch an extension to read another program's file."""

from __future__ import annotations

import os
from pathlib import Path

from moescope.core.errors import StoreError

_MAGIC = b"DUCK"
_KINDS = {b"SQLite format 3": "an SQLite database", b"PAR1": "a Parquet file", b"PK": "a zip archive"}


def checked_path(path: Path, *, read_only: bool) -> tuple[Path, bool]:
    """The file itself, links followed, and whether this process has it open already."""
    try:
        if path.is_symlink():
            path = path.resolve(strict=False)
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError) as refused:  # Python up to 3.12 tells a loop of links by a RuntimeError
        raise StoreError(f"cannot read {path}", found=str(refused), fix="check the path and its links") from refused
    # On POSIX systems, closing any handle of a file gives up every lock that the process has on it: reading the head of a
    # store that is open here would let another process write into it.
    shared = path.is_file() and _open_here(path)
    if not shared:
        _check_file(path, read_only=read_only)
    if not read_only and not may_write(path.parent):
        raise StoreError(
            f"cannot write {path}",
            found="no permission for its folder, where the log of changes is kept",
            fix="choose another folder, or open it with read_only=True",
        )
    return path, shared


def may_write(folder: Path) -> bool:
    """Whether this process may make files in `folder`."""
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _open_here(path: Path) -> bool:
    identity = path.stat()
    try:
        handles = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        return False
    for handle in handles:
        try:
            found = os.fstat(handle)
        except OSError:  # the handle of the listing itself is gone
            continue
        if os.path.samestat(found, identity):
            return True
    return False


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
    if not path.is_file():
        raise StoreError(f"{path} is not a store", found="a device or a pipe", fix="choose another path")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as refused:
        raise StoreError(f"cannot read {path}", found=str(refused)) from refused
    if not head:
        raise StoreError(
            f"{path} is not a store", found="an empty file of 0 bytes", fix="delete it, or choose another path"
        )
    if head[8:12] != _MAGIC:
        kind = next((name for magic, name in _KINDS.items() if head.startswith(magic)), "a file of another kind")
        raise StoreError(
            f"{path} is not a store",
            expected="a DuckDB file made by moescope",
            found=kind,
            fix="choose another path; the file was left as it is",
        )
