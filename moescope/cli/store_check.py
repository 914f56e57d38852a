"""What a command says of a store that has to be there already."""

from __future__ import annotations

from pathlib import Path

from moescope.core.errors import InputError


def check_store(store: Path, *, option: bool = True) -> None:
    """Refuse a store that is not there, before a command opens, and so makes, it.

    Args:
        store: its path.
        option: whether the command takes it as `--store`, so that it may have been left out.

    Raises:
        InputError: there is none.
    """
    if not store.exists():
        raise InputError(f"there is no store at {store}", fix="name it with --store" if option else "check the path")
