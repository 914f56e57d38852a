"""Intervals of numbers made from several sums, resampled by groups of documents."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import document_weights

Floats = NDArray[np.float64]
LEVEL = 0.95
_PAIRS = 1024


def with_interval(
    statistic: Callable[..., Floats], sums: Sequence[Floats], *, draws: int, seed: int
) -> tuple[Floats, Floats, Floats]:
    """A statistic of sums with a percentile bootstrap interval of 95 % over their first axis.

    Args:
        statistic: of sums [..., pair] (each summed over groups) to a number a pair; NaN where there is none.
        sums: [group, pair] each, or [group, 1].
        draws, seed: of the bootstrap.

    Returns:
        The statistic, lower and upper bound, each [pair]; bounds NaN where there is one group only.

    Example:
        >>> value, low, high = with_interval(lambda a, n: a / n, [np.ones((4, 2)), np.full((4, 1), 2.0)], draws=10, seed=0)
        >>> value.tolist(), low.tolist()
        ([0.5, 0.5], [0.5, 0.5])
    """
    value = _quietly(statistic, [part.sum(0) for part in sums])
    groups, width = max(len(part) for part in sums), max(part.shape[1] for part in sums)
    low, high = np.full(width, np.nan), np.full(width, np.nan)
    if groups < 2:
        return value, low, high
    weights = document_weights(groups, draws=draws, seed=seed).astype(np.float64)
    tail = (1 - LEVEL) / 2
    for start in range(0, width, _PAIRS):
        at = slice(start, start + _PAIRS)
        drawn = _quietly(statistic, [weights @ (part if part.shape[1] == 1 else part[:, at]) for part in sums])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a column without any number has no quantile: NaN
            quantile = (
                np.quantile if np.isfinite(drawn).all() else np.nanquantile
            )  # the latter takes columns one by one
            low[at], high[at] = quantile(drawn, [tail, 1 - tail], axis=0)
    return value, low, high


def _quietly(statistic: Callable[..., Floats], sums: Sequence[Floats]) -> Floats:
    """The statistic, NaN where it divides by 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = statistic(*sums)
    return np.where(np.isfinite(found), found, np.nan)
