"""Compiled: the different experts that several tokens ask for together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def unite(
    ids: NDArray[Any],
    starts: NDArray[np.int64],
    step_starts: NDArray[np.int64],
    batch: int,
    experts: int,
    out: NDArray[Any],
) -> None:
    """Fill `out` [step, place] with the different experts of each step."""
    seen = np.full(experts, -1, np.int64)
    for s in range(len(starts) - 1):
        for t in range(starts[s], starts[s + 1]):
            offset = t - starts[s]
            step = step_starts[s] + offset // batch
            if offset % batch == 0:
                filled = 0
            for column in range(ids.shape[1]):
                expert = ids[t, column]
                if expert < experts and seen[expert] != step:
                    seen[expert] = step
                    out[step, filled] = expert
                    filled += 1
