"""Compiled loops over pairs of chosen experts; imported inside functions, for numba takes its time to load."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def count_pairs(first: NDArray[Any], second: NDArray[Any], group: NDArray[Any], counts: NDArray[Any]) -> None:
    """Add to counts[group, i, j] every pair of an expert i of `first` [token, k] and j of `second` [token, k']."""
    for token in range(first.shape[0]):
        into = counts[group[token]]
        for a in range(first.shape[1]):
            row = into[first[token, a]]
            for b in range(second.shape[1]):
                row[second[token, b]] += 1


@njit(cache=True, nogil=True)
def summed_hits(
    given: NDArray[Any],
    table: NDArray[Any],
    fallback: NDArray[Any],
    target: NDArray[Any],
    size: int,
    hits: NDArray[Any],
) -> None:
    """How many of each token's experts are among the `size` best by the sum of `table` rows over what is given.

    Args:
        given: [token, slot] row of `table`; −1 for nothing given, where `fallback` is scored instead.
        table: [row, expert] float32 scores.
        fallback: [expert] scores.
        target: [token, k] experts chosen.
        size: experts predicted.
        hits: [token] filled with the count; ties go to the lower id.
    """
    experts = table.shape[1]
    score = np.empty(experts, np.float32)
    for token in range(given.shape[0]):
        if given[token, 0] < 0:
            score[:] = fallback
        else:
            score[:] = table[given[token, 0]]
            for slot in range(1, given.shape[1]):
                score += table[given[token, slot]]
        found = 0
        for slot in range(target.shape[1]):
            expert = target[token, slot]
            own = score[expert]
            ahead = 0
            for other in range(expert):
                ahead += score[other] >= own
            for other in range(expert + 1, experts):
                ahead += score[other] > own
            found += ahead < size
        hits[token] = found
