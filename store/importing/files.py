"""Paths as DuckDB and NumPy take them, and what is wrong with a file told in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError


def glob_free(path: Path) -> str:
    """A path that DuckDB takes as it stands: its signs for patterns mean themselves.

    Example:
        >>> glob_free(Path("runs[1].parquet"))
        'runs[[]1].parquet'
    """
    return re.sub(r"([\[*?])", r"[\1]", str(path))


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Errors of DuckDB, NumPy and the system while a file is read, told as `InputError`."""
    try:
        yield
    except duckdb.Error as refused:
        first = str(refused).split("\n\n")[0].replace("\n", " ")
        raise InputError(f"{path} cannot be read", found=first) from refused
    except OSError as refused:
        raise InputError(f"{path} cannot be read", found=refused.strerror or str(refused)) from refused
    except UnicodeDecodeError as refused:
        raise InputError(f"{path} is not UTF-8 text", found=str(refused)) from refused


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays of a .npy file (under the name "") or a .npz file, by name; arrays of objects are refused.

    An .npy file is mapped into memory, not read.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
    except OSError as refused:
        raise InputError(f"{path} cannot be read", found=refused.strerror or str(refused)) from refused
    except (ValueError, EOFError, KeyError) as refused:
        objects = "allow_pickle" in str(refused)
        raise InputError(
            f"{path} cannot be read",
            expected="arrays of numbers or text",
            found="an array of Python objects, which are pickles" if objects else str(refused),
            fix="save plain arrays: np.savez(path, experts=ids, …)" if objects else None,
        ) from refused
    except Exception as damage:  # zipfile and zlib raise their own
        if type(damage).__name__ not in ("BadZipFile", "error"):
            raise
        raise InputError(f"{path} is damaged", found=str(damage)) from damage
