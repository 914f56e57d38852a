"""Compiled loops over tokens that lie sorted into groups: occurrences of an id, positions, classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@njit(cache=True, nogil=True)
def group_statistics(experts: Any, order: Any, starts: Any, n_experts: int, log2: Any) -> Any:
    """What the counts of each group's decisions say, without keeping the counts.

    Args:
        experts: [token, k].
        order: tokens, group after group; starts: [group + 1] where each group begins.
        n_experts: of the router.
        log2: [n] log2 of 1, 2, 3, … at 1, 2, 3, …, up to the largest group.

    Returns:
        top: [group] tokens that chose the group's most frequent expert; winner: [group] that expert, the lowest of equals;
        squares: [group] Σ over experts of count²; bits: [group] Σ of count · log2 count.
    """
    groups, k = len(starts) - 1, experts.shape[1]
    top, winner = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    squares, bits = np.zeros(groups, np.float64), np.zeros(groups, np.float64)
    count = np.zeros(n_experts, np.int64)
    for group in range(groups):
        for place in range(starts[group], starts[group + 1]):
            for slot in range(k):
                count[experts[order[place], slot]] += 1
        # Each expert is met once for each time it was chosen; the first meeting takes its count and clears it.
        for place in range(starts[group], starts[group + 1]):
            for slot in range(k):
                expert = experts[order[place], slot]
                times = count[expert]
                if times == 0:
                    continue
                count[expert] = 0
                squares[group] += float(times) * times
                bits[group] += times * log2[times]
                if times > top[group] or (times == top[group] and expert < winner[group]):
                    top[group], winner[group] = times, expert
    return top, winner, squares, bits


@njit(cache=True, nogil=True)
def top_share_influence(
    experts: Any, order: Any, starts: Any, winner: Any, mean: Any, scale: Any, column: Any, document: Any, out: Any
) -> None:
    """Add to `out` [document, column] how each document moves the mean share of the groups' most frequent experts.

    A group weighs in its mean as much as its tokens are drawn, so that groups seen in few documents come and go.

    Args:
        experts, order, starts: as in `group_statistics`.
        winner: [group] its most frequent expert, held fixed.
        scale: [group] weight of the group in the mean; column: [group] which mean it belongs to; mean: [column].
        document: [token].
    """
    k = experts.shape[1]
    for group in range(len(starts) - 1):
        step = scale[group] / (starts[group + 1] - starts[group])
        for place in range(starts[group], starts[group + 1]):
            token = order[place]
            hit = 0.0
            for slot in range(k):
                if experts[token, slot] == winner[group]:
                    hit = 1.0
            out[document[token], column[group]] += step * (hit - mean[column[group]])


@njit(cache=True, nogil=True)
def spread_influence(
    experts: Any, order: Any, starts: Any, n_experts: int, squares: Any, means: Any, document: Any, out: Any
) -> None:
    """Add to `out` [document, 2] how each document moves the mean spread over experts, and the mean agreement.

    Spread: standard deviation over experts of a group's distribution. Agreement: share of experts that two tokens of a group
    have in common, over all pairs. Groups, of two tokens or more, weigh in the mean as much as their tokens (pairs) are
    drawn.

    Args:
        experts, order, starts, n_experts: as in `group_statistics`.
        squares: [group] Σ over experts of count².
        means: the mean spread and the mean agreement.
        document: [token].
    """
    groups, k = len(starts) - 1, experts.shape[1]
    count = np.zeros(n_experts, np.int64)
    for group in range(groups):
        tokens = starts[group + 1] - starts[group]
        decisions = float(tokens * k)
        total = squares[group] / decisions**2
        spread = np.sqrt(max(total / n_experts - 1.0 / n_experts**2, 0.0))
        for place in range(starts[group], starts[group + 1]):
            for slot in range(k):
                count[experts[order[place], slot]] += 1
        for place in range(starts[group], starts[group + 1]):
            token = order[place]
            met = 0
            for slot in range(k):
                met += count[experts[token, slot]]
            moved = (spread - means[0]) / tokens
            if spread > 1e-12:
                moved += (met / decisions - k * total) / (decisions * n_experts * spread)
            shared = (met - k) / (k * (tokens - 1.0))
            out[document[token], 0] += moved / groups
            out[document[token], 1] += 2.0 * (shared - means[1]) / tokens / groups
        for place in range(starts[group], starts[group + 1]):
            for slot in range(k):
                count[experts[order[place], slot]] = 0


@njit(cache=True, nogil=True)
def information_influence(
    experts: Any,
    order: Any,
    starts: Any,
    n_experts: int,
    log2: Any,
    expert_bits: Any,
    mean: float,
    document: Any,
    out: Any,
) -> None:
    """Add to `out` [document] how each document moves the mutual information of group and expert, in bits.

    Args:
        experts, order, starts, n_experts, log2: as in `group_statistics`.
        expert_bits: [expert] −log2 of the expert's share of all decisions.
        mean: the mutual information itself.
        document: [token].
    """
    k = experts.shape[1]
    decisions = float(len(order) * k)
    count = np.zeros(n_experts, np.int64)
    for group in range(len(starts) - 1):
        group_log = np.log2(float((starts[group + 1] - starts[group]) * k))
        for place in range(starts[group], starts[group + 1]):
            for slot in range(k):
                count[experts[order[place], slot]] += 1
        for place in range(starts[group], starts[group + 1]):
            token = order[place]
            for slot in range(k):
                expert = experts[token, slot]
                pointwise = log2[count[expert]] - group_log + expert_bits[expert]
                out[document[token]] += (pointwise - mean) / decisions
        for place in range(starts[group], starts[group + 1]):
            for slot in range(k):
                count[experts[order[place], slot]] = 0
