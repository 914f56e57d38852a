"""Paths through the routers as whole numbers: equal numbers, equal paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LIMIT = 1 << 62


def path_codes(columns: Sequence[NDArray[np.integer[Any]]], sizes: Sequence[int]) -> NDArray[np.int64]:
    """[token] a number that is the same for two tokens exactly where all their columns are.

    Args:
        columns: [token] each; the expert at one place of the path.
        sizes: how many values each column can take.

    Example:
        >>> path_codes([np.array([0, 1, 0]), np.array([2, 2, 2])], [4, 4]).tolist()
        [2, 6, 2]
    """
    code = np.zeros(len(columns[0]), np.int64)
    reach = 1
    for column, size in zip(columns, sizes, strict=True):
        if reach * size >= _LIMIT:
            _, code = np.unique(code, return_inverse=True)
            code, reach = code.astype(np.int64), len(code)
        code = code * size + column
        reach *= size
    return code
