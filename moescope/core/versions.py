"""Versions of everything a number depends on."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

VERSION = "0.2.0"


@cache
def library_versions() -> dict[str, str]:
    """Installed versions of moescope, Python and the libraries that compute, name → version; without importing them."""
    found = {"moescope": VERSION, "python": platform.python_version()}
    for name in ("torch", "transformers", "duckdb", "numpy", "pyarrow", "plotly"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
