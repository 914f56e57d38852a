"""Compiled count of pairs of experts in the same decision."""

from __future__ import annotations

from typing import Any

from numba import njit


@njit(cache=True, nogil=True)
def count_pairs(experts: Any, unit: Any, column: Any, step: int, counts: Any) -> None:
    """Add to `counts` [unit, column] each pair of experts that a token chose.

    Args:
        experts: [token, k].
        unit: [token] row to count in.
        column: [expert, expert] where a pair is counted, the lower id first; −1 for nowhere.
        step: the farthest two slots of a pair lie apart: k − 1 for all pairs, 1 for neighbours only.
    """
    k = experts.shape[1]
    for token in range(len(experts)):
        for slot in range(k):
            for other in range(slot + 1, min(slot + step + 1, k)):
                a, b = experts[token, slot], experts[token, other]
                place = column[a, b] if a < b else column[b, a]
                if place >= 0:
                    counts[unit[token], place] += 1
