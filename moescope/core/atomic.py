"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moescope.core.errors import InputError


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target` to write to; on success it takes the target's name, else it is removed.

    Raises:
        InputError: the folder is not there or cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with written_whole(folder / "a.txt") as partial:
        ...     _ = partial.write_text("hello")
        >>> (folder / "a.txt").read_text()
        'hello'
    """
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}", found="no such folder", fix=f"mkdir -p {target.parent}")
    if target.is_dir():
        raise InputError(f"cannot write {target}", found="a folder of that name", fix="choose another name")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(target)
    except PermissionError as refused:
        raise InputError(
            f"cannot write {target}", found="no permission", fix="choose a folder you may write to"
        ) from refused
    finally:
        partial.unlink(missing_ok=True)
