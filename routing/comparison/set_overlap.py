"""How alike two choices of experts are, token by token, and what chance gives."""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def overlap(first: NDArray[np.uint16], second: NDArray[np.uint16]) -> NDArray[np.int64]:
    """[token] experts that both chose.

    Args:
        first: [token, k] ids, each at most once a token.
        second: [token, k'] likewise.

    Example:
        >>> overlap(np.array([[1, 2]], np.uint16), np.array([[2, 3]], np.uint16)).tolist()
        [1]
    """
    left, right = np.ascontiguousarray(first.T), np.ascontiguousarray(second.T)
    shared: NDArray[Any] = np.zeros(len(first), np.uint8 if min(len(left), len(right)) < 256 else np.uint16)
    for one in left:
        for two in right:
            shared += np.equal(one, two)
    counted: NDArray[np.int64] = shared.astype(np.int64)
    return counted


def weighted_overlap(
    first: NDArray[np.uint16], weights: NDArray[np.floating], second: NDArray[np.uint16], others: NDArray[np.floating]
) -> Array:
    """[token] Σ over experts of the smaller of the two weights, each token's weights made to sum to 1; NaN without weights.

    Example:
        >>> ids, w = np.array([[1, 2]], np.uint16), np.array([[0.75, 0.25]])
        >>> weighted_overlap(ids, w, ids[:, ::-1], w).round(9).tolist()
        [0.5]
    """
    left, right = np.ascontiguousarray(first.T), np.ascontiguousarray(second.T)
    own, theirs = _normalised(weights), _normalised(others)
    shared = np.zeros(len(first), np.float32)
    for one, weight in zip(left, own, strict=True):
        for two, other in zip(right, theirs, strict=True):
            shared += np.minimum(weight, other) * (one == two)
    return shared.astype(np.float64)


def _normalised(weights: NDArray[np.floating]) -> NDArray[np.float32]:
    """[slot, token] in float32, sums over slots 1."""
    columns = np.ascontiguousarray(weights.T, dtype=np.float32)
    total = columns.sum(0)
    shares: NDArray[np.float32] = np.divide(columns, total, out=np.full_like(columns, np.nan), where=total > 0)
    return shares


def random_floor(n_experts: int, first_k: int, second_k: int) -> Mapping[str, float]:
    """What two independent uniform choices of k and k' of E experts give.

    |A ∩ B| is hypergeometric; saturation divides it by k', of the second.

    Example:
        >>> random_floor(64, 8, 8)["saturation"]
        0.125
    """
    ways = comb(n_experts, second_k)
    chance = {
        shared: comb(first_k, shared) * comb(n_experts - first_k, second_k - shared) / ways
        for shared in range(max(0, first_k + second_k - n_experts), min(first_k, second_k) + 1)
    }
    jaccard = sum(p * shared / (first_k + second_k - shared) for shared, p in chance.items())
    return {
        "agreement": chance.get(first_k, 0.0) if first_k == second_k else 0.0,
        "top-1 agreement": 1 / n_experts,
        "saturation": first_k / n_experts,
        "Jaccard": jaccard,
        "selection shift": 1 - jaccard,
    }
