"""Rank correlations of many rankings at once, Spearman's ρ and Kendall's τ-b, and what permuted ranks give."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Comparisons of pairs held in memory at once: what fits into a processor's cache.
_CELLS = 1_000_000


def ranks(values: Array) -> Array:
    """[..., item] average ranks along the last axis, 1 for the smallest."""
    from scipy.stats import rankdata

    ranked: Array = rankdata(values, axis=-1)
    return ranked


def spearman(values: Array) -> Array:
    """Pearson's correlation of average ranks (Spearman 1904), between every two rankings.

    Args:
        values: [..., ranking, item] without NaN.

    Returns:
        [..., ranking, ranking]; NaN where a ranking has nothing but ties.

    Example:
        >>> spearman(np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))[0, 1].item()
        -1.0
    """
    ranked = ranks(values)
    return _cosine(ranked - ranked.mean(axis=-1, keepdims=True))


def kendall(values: Array) -> Array:
    """Kendall's τ-b (1945): concordant less discordant pairs, over the pairs tied in neither; between every two rankings.

    Args:
        values: [..., ranking, item] without NaN.

    Returns:
        [..., ranking, ranking]; NaN where a ranking has nothing but ties.

    Example:
        >>> kendall(np.array([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]]))[0, 1].round(4).item()
        0.3333
    """
    *lead, rankings, items = values.shape
    doubled = (2 * ranks(values)).astype(np.float32).reshape(-1, rankings, items)
    step = max(1, _CELLS // max(1, rankings * items * items))
    parts = [np.empty((0, rankings, rankings))]
    for start in range(0, len(doubled), step):
        part = doubled[start : start + step]
        signs = part[..., :, None] - part[..., None, :]
        np.clip(signs, -1, 1, out=signs)  # doubled ranks differ by a whole number
        parts.append(_cosine(signs.reshape(len(part), rankings, items * items)))
    return np.concatenate(parts).reshape(*lead, rankings, rankings)


def spearman_null(values: Array) -> tuple[Array, Array]:
    """Mean and variance of ρ between every two rankings when one of them is permuted: exactly 0 and 1 ÷ (n − 1).

    Args:
        values: [ranking, item].
    """
    size = (len(values), len(values))
    items = values.shape[1]
    return np.zeros(size), np.full(size, 1 / (items - 1) if items > 1 else np.nan)


def kendall_null(values: Array) -> tuple[Array, Array]:
    """Mean and variance of τ-b between every two rankings when one of them is permuted (Kendall 1970, ch. 5, with ties).

    Args:
        values: [ranking, item].

    Example:
        >>> kendall_null(np.arange(8.0).reshape(2, 4))[1][0, 1].round(6).item()
        0.240741
    """
    n = values.shape[1]
    if n < 2:
        return np.zeros((len(values),) * 2), np.full((len(values),) * 2, np.nan)
    ties = [np.unique(row, return_counts=True)[1].astype(np.float64) for row in values]
    two = np.array([(t * (t - 1)).sum() for t in ties])
    three = np.array([(t * (t - 1) * (t - 2)).sum() for t in ties])
    five = np.array([(t * (t - 1) * (2 * t + 5)).sum() for t in ties])
    variance = (n * (n - 1) * (2 * n + 5) - five[:, None] - five) / 18
    variance = variance + two[:, None] * two / (2 * n * (n - 1))
    if n > 2:
        variance = variance + three[:, None] * three / (9 * n * (n - 1) * (n - 2))
    untied = (n * (n - 1) - two) / 2
    scale = untied[:, None] * untied
    spread: Array = np.divide(variance, scale, out=np.full(scale.shape, np.nan), where=scale > 0)
    return np.zeros_like(spread), spread


def pooled_spearman_null(values: Array, group: NDArray[np.integer]) -> tuple[Array, Array]:
    """Mean and variance of ρ over all items when one ranking is permuted inside every group of items.

    Means of groups stay; inside a group the sum of products of two rows has mean 0 and variance SS·SS' ÷ (n − 1), SS their
    sums of squares round the group's mean.

    Args:
        values: [ranking, item].
        group: [item] index of its group.
    """
    centred = ranks(values)
    centred = centred - centred.mean(axis=-1, keepdims=True)
    mean = np.zeros((len(values), len(values)))
    variance = np.zeros_like(mean)
    for number in np.unique(group):
        part = centred[:, group == number]
        items = part.shape[1]
        middle = part.mean(axis=1)
        mean += items * np.outer(middle, middle)
        squares = ((part - middle[:, None]) ** 2).sum(axis=1)
        variance += np.outer(squares, squares) / max(items - 1, 1)
    scale = np.outer((centred**2).sum(axis=1), (centred**2).sum(axis=1))
    missing = np.full(scale.shape, np.nan)
    return (
        np.divide(mean, np.sqrt(scale), out=missing.copy(), where=scale > 0),
        np.divide(variance, scale, out=missing, where=scale > 0),
    )


def _cosine(rows: NDArray[Any]) -> Array:
    """[..., row, row] products over lengths; NaN for a row of zeros."""
    product = rows @ np.swapaxes(rows, -1, -2)
    square = np.einsum("...ii->...i", product).astype(np.float64)
    lengths = np.sqrt(square[..., :, None] * square[..., None, :])
    cosine = np.divide(product, lengths, out=np.full(lengths.shape, np.nan), where=lengths > 0)
    correlation: Array = np.clip(cosine, -1.0, 1.0)
    return correlation
