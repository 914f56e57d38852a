"""A ratio of sums over documents and its interval, as fields of a row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import bootstrap_ratio


def estimate(total: NDArray[Any], size: NDArray[Any], *, draws: int, seed: int) -> dict[str, float | None]:
    """`value`, `ci_low` and `ci_high` of Σ total / Σ size, from [document] sums; bounds are None for a single document.

    Documents of size 0 are not resampled.

    Example:
        >>> estimate(np.array([1.0, 1.0, 0.0]), np.array([2.0, 2.0, 0.0]), draws=10, seed=0)
        {'value': 0.5, 'ci_low': 0.5, 'ci_high': 0.5}
    """
    present = size > 0
    found = bootstrap_ratio(total[present].astype(np.float64), size[present].astype(np.float64), draws=draws, seed=seed)
    names = ("value", "ci_low", "ci_high")
    return {name: None if np.isnan(part) else float(part) for name, part in zip(names, found, strict=True)}


def mean_by_document(
    values: NDArray[np.float64], document: NDArray[np.int64], *, draws: int, seed: int
) -> dict[str, float | None]:
    """The same for the mean of `values`, each of which belongs to a document; NaN values are left out."""
    known = ~np.isnan(values)
    documents = int(document.max(initial=-1)) + 1
    size = np.bincount(document[known], minlength=documents)
    total = np.bincount(document[known], weights=values[known], minlength=documents)
    return estimate(total, size, draws=draws, seed=seed)


def quotient(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """Above over below, NaN where that is 0."""
    result: NDArray[np.float64] = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
    return result
