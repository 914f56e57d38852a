"""Paths as DuckDB and NumPy take them, and what is wrong with a file told in one sentence."""

from __future__ import annotations

import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError

_UNPACKED = 1 << 30  # bytes that any archive may unpack to
_TIMES = 200  # how many times its own size a larger one may unpack to
# What archives and headers of arrays raise where their bytes are wrong; NotImplementedError and RuntimeError tell of kinds of
# compression and of encryption.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, SyntaxError, TypeError, OverflowError, IndexError,
    NotImplementedError, RuntimeError,
)  # fmt: skip


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


@contextmanager
def laid_out(called: object, as_: str) -> Iterator[None]:
    """What goes wrong while values of a file are taken apart, told as `InputError`: they are not laid out as they should be."""
    try:
        yield
    except (
        TypeError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        NotImplementedError,
        RecursionError,
    ) as bad:
        raise InputError(f"{called} is not laid out as {as_}", found=f"{type(bad).__name__}: {bad}") from bad


def _check_unpacked(path: Path) -> None:
    """Refuse a small archive that unpacks to far more than arrays of ids or scores ever do."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(_UNPACKED, _TIMES * path.stat().st_size):
        raise InputError(f"{path} unpacks to {unpacked:,} bytes", expected=f"at most {_TIMES} times its size")


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays of a .npy file (under the name "") or a .npz file, by name; arrays of objects are refused.

    An .npy file is mapped into memory, not read.
    """
    try:
        if path.suffix == ".npz":
            _check_unpacked(path)
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
    except OSError as refused:
        raise InputError(f"{path} cannot be read", found=refused.strerror or str(refused)) from refused
    except MemoryError as refused:
        raise InputError(f"{path} claims more numbers than memory holds", found=str(refused)) from refused
    except _DAMAGE as damage:
        raise InputError(f"{path} is damaged", found=f"{type(damage).__name__}: {damage}") from damage
    except (ValueError, EOFError, KeyError) as refused:
        objects = "allow_pickle" in str(refused)
        raise InputError(
            f"{path} cannot be read",
            expected="arrays of numbers or text",
            found="an array of Python objects, which are pickles" if objects else str(refused),
            fix="save plain arrays: np.savez(path, experts=ids, …)" if objects else None,
        ) from refused
