"""Compiled: tables that count what follows what, and the experts such a table expects most."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def count_pairs(keys: NDArray[Any], ids: NDArray[Any], table: NDArray[np.float32]) -> None:
    """Count each (key, expert) of the same token.

    Args:
        keys: [token, key]; ids: [token, use], experts from the width of the table on are passed by.
        table: [key, expert] changed in place.
    """
    for t in range(len(ids)):
        for i in range(keys.shape[1]):
            row = table[keys[t, i]]
            for j in range(ids.shape[1]):
                if ids[t, j] < len(row):
                    row[ids[t, j]] += np.float32(1)


@njit(cache=True, nogil=True)
def most_expected(keys: NDArray[Any], table: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """The experts with the highest sum of the table's rows at a token's keys, the least expected of them first.

    Args:
        keys: [token, key]; table: [key, expert].
        out: [token, width] changed in place; of equals the lower id is expected more.
    """
    width = out.shape[1]
    score = np.empty(table.shape[1], np.float32)
    for t in range(len(keys)):
        score[:] = table[keys[t, 0]]
        for i in range(1, keys.shape[1]):
            score += table[keys[t, i]]
        for rank in range(width):
            best = 0
            for expert in range(1, len(score)):
                if score[expert] > score[best]:
                    best = expert
            out[t, width - 1 - rank] = best
            score[best] = -np.inf


@njit(cache=True, nogil=True)
def foreseen(
    predicted: NDArray[np.uint16],
    ids: NDArray[Any],
    starts: NDArray[np.int64],
    row: NDArray[np.int64],
    experts: int,
    out: NDArray[np.float64],
) -> None:
    """Add to `out` [row] how many uses of each sequence are among those predicted for the token."""
    marked = np.full(experts, -1, np.int64)
    for s in range(len(row)):
        for t in range(starts[s], starts[s + 1]):
            for i in range(predicted.shape[1]):
                marked[predicted[t, i]] = t
            for j in range(ids.shape[1]):
                if ids[t, j] < experts and marked[ids[t, j]] == t:
                    out[row[s]] += 1
