"""Formats of routing traces: which reader reads what, told by the file itself where the caller does not say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from moescope.core.errors import InputError
from moescope.store.importing.files import load_arrays
from moescope.store.importing.llama_cpp import read_llama_cpp
from moescope.store.importing.neutral import read_neutral
from moescope.store.importing.olmoe import read_olmoe
from moescope.store.importing.router_logits import read_router_logits
from moescope.store.importing.sglang import read_sglang
from moescope.store.importing.trace import Options, Trace
from moescope.store.importing.vllm import read_vllm

Reader = Callable[[Any, duckdb.DuckDBPyConnection, Options], Trace]
FORMATS: dict[str, Reader] = {
    "neutral": read_neutral,
    "vllm": read_vllm,
    "sglang": read_sglang,
    "llama.cpp": read_llama_cpp,
    "router_logits": read_router_logits,
    "olmoe": read_olmoe,
}
_BY_SUFFIX = {".parquet": "neutral", ".pt": "sglang", ".pkl": "olmoe", ".pickle": "olmoe"}


def find_format(source: Any) -> str:
    """Name of the format of a file or table.

    Raises:
        InputError: there is no such file, or it does not say.
    """
    if not isinstance(source, Path) or source.is_dir():
        return "neutral"
    if not source.exists():
        raise InputError(f"there is no file {source}", fix="check the path")
    suffix = source.suffix.lower()
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if suffix in (".csv", ".txt"):
        return "neutral" if "sequence_id" in _first_line(source) else "llama.cpp"
    if suffix in (".json", ".jsonl"):
        return "olmoe" if '"exp_ids"' in _first_line(source, 1 << 22) else "vllm"
    if suffix in (".npy", ".npz"):
        return _of_arrays(source)
    raise InputError(
        f"it is not known which program wrote {source}",
        expected=".parquet, .csv, .npz, .npy, .json, .jsonl, .pt or .pkl",
        fix=f"name the format: {', '.join(FORMATS)}",
    )


def _first_line(path: Path, most: int = 4096) -> str:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.readline(most)
    except OSError as refused:
        raise InputError(f"{path} cannot be read", found=refused.strerror or str(refused)) from refused


def _of_arrays(path: Path) -> str:
    arrays = load_arrays(path)
    if {"sequence_id", "experts"} & set(arrays):
        return "neutral"
    wide = [array for array in arrays.values() if array.ndim >= 2 and array.dtype.kind in "iuf"]
    floats = [array for array in wide if np.issubdtype(array.dtype, np.floating)]
    return "router_logits" if floats else "vllm"
