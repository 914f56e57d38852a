"""Power-law fits of counts: exponent, distance of the fit, smallest count that it holds from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEAST = 25
_CANDIDATES = 150


@dataclass(frozen=True)
class PowerLaw:
    """A fit of P(x) ∝ x^−exponent to counts x ≥ x_min.

    Attributes:
        exponent: 1 + n / Σ ln(x / (x_min − ½)).
        distance: the Kolmogorov–Smirnov distance between the counts and the fit.
        x_min: the smallest count that is fitted.
        n: how many counts are fitted.
    """

    exponent: float
    distance: float
    x_min: int
    n: int


def fit_power_law(counts: NDArray[np.integer[Any]], x_min: int | None = None) -> PowerLaw | None:
    """Fit a discrete power law by the approximate maximum-likelihood estimate (Clauset, Shalizi & Newman 2009, eq. 3.7).

    Args:
        counts: positive whole numbers.
        x_min: smallest count fitted; None for the one of least Kolmogorov–Smirnov distance among those that leave at least
            25 counts (of at most 150 candidates, denser where they are small).

    Returns:
        The fit, or None where fewer than two counts reach x_min, or all that do are equal to it and no tail can be seen.

    Example:
        >>> fit_power_law(np.array([1, 1, 1, 2]), 1).n
        4
    """
    values, number = np.unique(counts, return_counts=True)
    if x_min is not None:
        return _fit(values, number, x_min)
    above = number[::-1].cumsum()[::-1]
    candidates = values[(above >= _LEAST) | (values == values[0])]
    spaced = np.unique(np.geomspace(1, len(candidates), _CANDIDATES).astype(np.int64)) - 1
    fits = [fit for fit in (_fit(values, number, int(x)) for x in candidates[spaced]) if fit is not None]
    return min(fits, key=lambda fit: fit.distance) if fits else None


def _fit(values: NDArray[Any], number: NDArray[Any], x_min: int) -> PowerLaw | None:
    from scipy.special import zeta

    kept = values >= x_min
    x, weight = values[kept].astype(np.float64), number[kept].astype(np.float64)
    n = weight.sum()
    if n < 2 or len(x) < 2:
        return None
    exponent = 1 + n / float(weight @ np.log(x / (x_min - 0.5)))
    scale = zeta(exponent, x_min)
    below = 1 - zeta(exponent, x + 1) / scale  # P(X ≤ x)
    before = 1 - zeta(exponent, x) / scale  # P(X < x)
    empirical = weight.cumsum() / n
    distance = np.maximum(np.abs(empirical - below), np.abs(empirical - weight / n - before)).max()
    return PowerLaw(exponent, float(distance), x_min, int(n))
