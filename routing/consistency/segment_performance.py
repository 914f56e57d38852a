"""Segment routing best performance: from window counts to F1, its best threshold, its null and its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import document_weights

Floats = NDArray[np.float64]
# Resampled histograms are held for at most so many numbers at a time.
_HELD = 4_000_000


@dataclass(frozen=True)
class Performance:
    """How well a fixed set of experts stands for what the tokens of a window choose.

    Attributes:
        srp: best F1 over thresholds; NaN where no token chooses anything.
        threshold: the smallest threshold that reaches it: an expert is in a window's set when chosen so often there.
        relative_size: size of the sets at that threshold, over the experts chosen (ρ̂).
        always_on: F1 with every expert in every set.
        activation_ratio: share of (token, expert) pairs chosen.
    """

    srp: Floats
    threshold: Floats
    relative_size: Floats
    always_on: Floats
    activation_ratio: Floats


def f1_curve(histogram: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """F1(θ) = 2·TP(θ) ÷ (P(θ) + A) for every threshold θ.

    Args:
        histogram: [..., m + 1] (window, expert) pairs in which the expert is chosen 0 … m times.

    Returns:
        F1 [..., m + 1], P [..., m + 1] and A [...]; F1 is 0 where nothing is predicted and nothing chosen.

    Example:
        >>> f1, positives, chosen = f1_curve(np.array([7, 6, 2]))   # ids 0,0,1,1,0,2 of 3 experts, windows of 2
        >>> f1.round(4).tolist(), float(chosen)
        ([0.5, 0.7692, 0.5714], 10.0)
    """
    counts = np.asarray(histogram, np.float64)
    segment = counts.shape[-1] - 1
    at_least = _reverse_sums(counts)
    hits = _reverse_sums(counts * np.arange(segment + 1))
    positives, chosen = segment * at_least, hits[..., 0]
    total = positives + chosen[..., None]
    return np.divide(2 * hits, total, out=np.zeros_like(total), where=total > 0), positives, chosen


def performance(histogram: NDArray[Any]) -> Performance:
    """Best F1 and what goes with it, ties to the smallest threshold, from [..., m + 1] counts."""
    f1, positives, chosen = f1_curve(histogram)
    threshold = f1.argmax(-1)
    some = chosen > 0
    best, size = (np.take_along_axis(part, threshold[..., None], -1)[..., 0] for part in (f1, positives))
    return Performance(
        srp=np.where(some, best, np.nan),
        threshold=np.where(some, threshold, np.nan),
        relative_size=np.divide(size, chosen, out=np.full_like(chosen, np.nan), where=some),
        always_on=np.where(some, f1[..., 0], np.nan),
        activation_ratio=np.divide(chosen, positives[..., 0], out=np.zeros_like(chosen), where=positives[..., 0] > 0),
    )


def binomial_histogram(segment: int, ratio: float) -> Floats:
    """[m + 1] chances that an expert is chosen 0 … m times by m independent tokens that each choose it with `ratio`.

    Example:
        >>> binomial_histogram(2, 0.5).tolist()
        [0.25, 0.5, 0.25]
    """
    counts = np.arange(segment + 1)
    if ratio >= 1:
        certain: Floats = (counts == segment).astype(np.float64)
        return certain
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, segment + 1)))])
    ways = factorials[-1] - factorials - factorials[::-1]
    chances: Floats = np.exp(ways + counts * np.log(ratio) + (segment - counts) * np.log1p(-ratio))
    chances /= chances.sum()
    return chances


def basic_interval(histogram: NDArray[Any], *, draws: int, seed: int) -> tuple[Floats, Floats]:
    """Basic (reverse) 95 % bootstrap of the SRP over documents: 2·SRP minus the upper and lower resampled quantile.

    Args:
        histogram: [document, group, m + 1].

    Returns:
        lower and upper bound [group]; NaN for fewer than two documents with a window.
    """
    from moescope.routing.consistency.window_kernels import best_f1

    counts = np.asarray(histogram)
    counts = counts[counts.sum((1, 2)) > 0]
    documents, groups, width = counts.shape
    if documents < 2:
        return np.full(groups, np.nan), np.full(groups, np.nan)
    estimate = performance(counts.sum(0)).srp
    # Whole numbers below 2^24 are exact in single precision, which is twice as quick to multiply.
    exact = documents * int(counts.sum(-1).max()) < 2**24
    kind = np.float32 if exact else np.float64
    weights = document_weights(documents, draws=draws, seed=seed).astype(kind)
    resampled = np.empty((draws, groups))
    step = max(1, _HELD // (draws * width))
    for first in range(0, groups, step):
        part = counts[:, first : first + step].astype(kind).reshape(documents, -1)
        drawn = (weights @ part).reshape(-1, width)
        resampled[:, first : first + step] = best_f1(drawn).reshape(draws, -1)
    resampled.sort(axis=0)
    tail = round(draws * 0.025)
    low, high = resampled[min(draws - tail, draws - 1)], resampled[tail]
    return 2 * estimate - low, 2 * estimate - high


def excess(value: Floats, null: Floats) -> Floats:
    """κ = (SRP − null) ÷ (1 − null): 0 at chance, 1 for constant routing; NaN where chance is 1 already.

    Example:
        >>> excess(np.array([0.75]), np.array([0.5])).tolist()
        [0.5]
    """
    value, null = np.broadcast_arrays(value, null)
    missing = np.full(value.shape, np.nan)
    share: Floats = np.divide(value - null, 1 - null, out=missing, where=1 - null > 1e-9)
    return share


def _reverse_sums(values: Floats) -> Floats:
    return values[..., ::-1].cumsum(-1)[..., ::-1]
