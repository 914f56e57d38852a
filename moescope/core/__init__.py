"""The bottom layer: errors, results, registries, statistics and names. No torch, no DuckDB."""

from moescope.core.errors import IncompleteError, InputError, MoescopeError, RunError, StoreError
from moescope.core.result import Result

__all__ = ["IncompleteError", "InputError", "MoescopeError", "Result", "RunError", "StoreError"]
