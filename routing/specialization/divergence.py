"""Entropy and Jensen–Shannon divergence in bits, over the last axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


def distribution(counts: Floats) -> NDArray[np.float64]:
    """Counts over their sum along the last axis; zeros where nothing was counted."""
    total = counts.sum(axis=-1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    return shares


def entropy_bits(p: Floats) -> NDArray[np.float64]:
    """−Σ p log2 p, with 0 log 0 = 0.

    Example:
        >>> entropy_bits(np.array([0.5, 0.5, 0.0])).item()
        1.0
    """
    entropy: NDArray[np.float64] = -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1)
    return entropy


def divergence_bits(p: Floats) -> NDArray[np.float64]:
    """Jensen–Shannon divergence of several distributions of equal weight: H(mean) − mean H (Lin 1991).

    Args:
        p: [..., distribution, outcome].

    Returns:
        [...] bits, from 0 (all alike) to log2 of their number (none shares an outcome with another).

    Example:
        >>> divergence_bits(np.array([[1.0, 0.0], [0.0, 1.0]])).item()
        1.0
    """
    difference = entropy_bits(p.mean(axis=-2)) - entropy_bits(p).mean(axis=-1)
    divergence: NDArray[np.float64] = np.maximum(difference, 0.0)
    return divergence
