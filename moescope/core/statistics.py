"""Intervals, controls and false-discovery control, shared by every analysis.

Documents are the unit of resampling everywhere: tokens and fragments of one text are not independent.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


def quotient(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[np.float64]:
    """Numerator over denominator, NaN where that is 0: a mean over nothing is no number.

    Args:
        numerator: any shape.
        denominator: broadcastable to the numerator.

    Example:
        >>> quotient(np.array([3.0, 1.0]), np.array([2.0, 0.0]))
        array([1.5, nan])
    """
    missing = np.full(np.shape(numerator), np.nan)
    found: NDArray[np.float64] = np.divide(numerator, denominator, out=missing, where=np.asarray(denominator) != 0)
    return found


def document_weights(documents: int, *, draws: int, seed: int) -> NDArray[np.int64]:
    """How often each document is drawn in each bootstrap resample: [draws, documents], rows summing to `documents`."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(documents, np.full(documents, 1.0 / documents), size=draws)


def bootstrap_ratio(
    numerator: Floats, denominator: Floats, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """Ratio of sums over documents with a percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    Args:
        numerator: [documents, ...] a sum for each document.
        denominator: [documents, ...] broadcastable to the numerator.
        draws: resamples of documents.
        level: coverage of the interval.

    Returns:
        estimate, lower and upper bound, each of the numerator's trailing shape; NaN where the denominator is 0, and
        bounds NaN where there is only one document.

    Example:
        >>> ratio, low, high = bootstrap_ratio(np.array([1.0, 3.0]), np.array([2.0, 2.0]))
        >>> float(ratio)
        1.0
    """
    denominator = np.broadcast_to(denominator, numerator.shape)
    estimate = quotient(numerator.sum(0), denominator.sum(0))
    if len(numerator) < 2:
        return estimate, np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)
    weights = document_weights(len(numerator), draws=draws, seed=seed).astype(np.float64)
    resampled = quotient(np.tensordot(weights, numerator, axes=1), np.tensordot(weights, denominator, axes=1))
    tail = (1 - level) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column without any ratio has no quantile: NaN
        low, high = np.nanquantile(resampled, [tail, 1 - tail], axis=0)
    return estimate, low, high


def permutation_p(observed: Floats, permuted: Floats) -> Floats:
    """Share of permutations at least as large as what was observed, counting the observation itself (Phipson & Smyth 2010).

    Args:
        observed: any shape.
        permuted: [draws, ...] the same statistic with the labels shuffled.

    Example:
        >>> permutation_p(np.array(3.0), np.array([1.0, 2.0, 4.0])).item()
        0.5
    """
    at_least: Floats = (1.0 + (permuted >= observed).sum(0)) / (1.0 + len(permuted))
    return at_least


def benjamini_hochberg(p: Floats) -> Floats:
    """q-values: the smallest false-discovery rate at which each test would be called (Benjamini & Hochberg 1995).

    Example:
        >>> benjamini_hochberg(np.array([0.01, 0.04, 0.03])).tolist()
        [0.03, 0.04, 0.04]
    """
    flat = p.ravel()
    order = np.argsort(flat)
    scaled = flat[order] * len(flat) / np.arange(1, len(flat) + 1)
    q = np.empty_like(flat)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1.0)
    return q.reshape(p.shape)
