"""A folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moescope.core.errors import InputError

# Lies in every export: what it is of. A folder without it is never overwritten.
ABOUT = "moescope.json"


@contextmanager
def folder_written_whole(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder beside `target` to write to; on success it takes the target's name, else it is removed.

    Args:
        target: the folder that is to be.
        overwrite: whether an earlier export may lie there; it goes once the new one is whole.

    Raises:
        InputError: something lies there that may not be overwritten, or the place cannot be written.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "export"
        >>> with folder_written_whole(target, overwrite=False) as folder:
        ...     _ = (folder / "a.txt").write_text("hello")
        >>> [path.name for path in target.iterdir()]
        ['a.txt']
    """
    target = Path(os.path.abspath(target))
    _check(target, overwrite=overwrite)
    partial, old = (target.with_name(f".{target.name}.{os.getpid()}.{word}") for word in ("partial", "old"))
    try:
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except PermissionError as refused:
        raise InputError(
            f"cannot write {target}", found="no permission", fix="choose a folder you may write to"
        ) from refused
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _check(target: Path, *, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}", found="no such folder", fix=f"mkdir -p {target.parent}")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise InputError(f"{target} is there already", fix="choose another folder, or overwrite it (--overwrite)")
    if not _is_export(target):
        raise InputError(
            f"{target} is not an export of moescope, and is not overwritten",
            expected=f"a folder with a {ABOUT}",
            fix="choose another folder, or remove it yourself",
        )


def _is_export(target: Path) -> bool:
    if target.is_symlink() or not (target / ABOUT).is_file():
        return False
    try:
        found = json.loads((target / ABOUT).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("application") == "moescope"
