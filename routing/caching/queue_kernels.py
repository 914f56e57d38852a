"""Compiled: first in first out, and last in first out, at all chosen sizes side by side.

FIFO holds what was brought in last, counted in arrivals: an expert is there while fewer than C others arrived after it. LIFO
keeps the first C − 1 for good and changes only its last place, which holds the expert used last among all others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def first_in_first_out(
    ids: NDArray[Any],
    bounds: NDArray[np.int64],
    starts: NDArray[np.int64],
    owner: NDArray[np.int64],
    weight: NDArray[np.float64],
    experts: int,
    sizes: NDArray[Any],
    out: NDArray[np.float64],
) -> None:
    """Add the weight of each sequence's hits at each size to `out` [row, size]; arguments as in `recency_depths`.

    Arrivals are counted in the type of `sizes`, and each sequence adds `sizes` to them.
    """
    arrived = np.full((experts, len(sizes)), -(1 << 30), sizes.dtype)
    arrivals = np.zeros(len(sizes), sizes.dtype)
    hits = np.zeros(len(sizes), np.int32)
    for s in range(len(owner)):
        hits[:] = 0
        arrivals += sizes  # as if every place had been filled anew: nothing of the sequence before is left
        for t in range(starts[s], starts[s + 1]):
            for group in range(len(bounds) - 1):
                for column in range(bounds[group], bounds[group + 1]):
                    if ids[t, column] >= experts:
                        continue
                    mine = arrived[ids[t, column]]
                    for c in range(len(sizes)):
                        hits[c] += np.int32(arrivals[c] - mine[c] < sizes[c])
                for column in range(bounds[group], bounds[group + 1]):
                    if ids[t, column] >= experts:
                        continue
                    mine = arrived[ids[t, column]]
                    for c in range(len(sizes)):
                        absent = arrivals[c] - mine[c] >= sizes[c]
                        arrivals[c] += absent
                        mine[c] = arrivals[c] if absent else mine[c]
        for c in range(len(sizes)):
            out[owner[s], c] += weight[s] * hits[c]


@njit(cache=True, nogil=True)
def last_in_first_out(
    ids: NDArray[Any],
    bounds: NDArray[np.int64],
    starts: NDArray[np.int64],
    owner: NDArray[np.int64],
    weight: NDArray[np.float64],
    experts: int,
    sizes: NDArray[Any],
    out: NDArray[np.float64],
) -> None:
    """Add the weight of each sequence's hits at each size to `out` [row, size]; arguments as in `recency_depths`."""
    arrival = np.full(experts, -1, np.int64)
    newest = np.full(len(sizes), -1, np.int64)
    hits_from = np.zeros(len(sizes) + 1, np.int64)
    # Sizes whose changing place an expert that came as number r may hold: those of at most r + 1.
    changing = np.searchsorted(sizes, np.arange(1, experts + 1), side="right")
    for s in range(len(owner)):
        arrival[:] = -1
        newest[:] = -1
        hits_from[:] = 0
        known = 0
        for t in range(starts[s], starts[s + 1]):
            for group in range(len(bounds) - 1):
                for column in range(bounds[group], bounds[group + 1]):
                    expert = np.int64(ids[t, column])
                    if expert >= experts or arrival[expert] < 0:
                        continue
                    smallest = changing[arrival[expert]]
                    while smallest > 0 and newest[smallest - 1] == expert:
                        smallest -= 1
                    hits_from[smallest] += 1
                for column in range(bounds[group], bounds[group + 1]):
                    expert = np.int64(ids[t, column])
                    if expert >= experts:
                        continue
                    if arrival[expert] < 0:
                        arrival[expert] = known
                        known += 1
                    newest[: changing[arrival[expert]]] = expert
        hits = 0
        for c in range(len(sizes)):
            hits += hits_from[c]
            out[owner[s], c] += weight[s] * hits
