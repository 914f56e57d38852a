"""A test of means over tokens with documents as the unit, and an interval of a rank correlation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def ratio_p(totals: Array, n: Array) -> Array:
    """Two-sided p of the test that a mean over tokens is 0: Student's t on the documents' residuals.

    The mean is R = Σ total ÷ Σ n; its variance is D ÷ (D − 1) · Σ (total − R·n)² ÷ (Σ n)² over the D documents that have
    tokens (the linearised variance of a ratio, Cochran 1977, ch. 6), with D − 1 degrees of freedom. 1 where every total is
    0, NaN where there is one document.

    Args:
        totals: [document, column] sums over tokens.
        n: [document, column] tokens.

    Example:
        >>> totals = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
        >>> ratio_p(totals, np.ones((3, 2))).round(4).tolist()
        [0.0742, 1.0]
    """
    from scipy.stats import t

    documents = (n > 0).sum(0)
    whole = n.sum(0)
    mean = np.divide(totals.sum(0), whole, out=np.zeros(totals.shape[1]), where=whole > 0)
    squares = ((totals - mean * n) ** 2).sum(0)
    error = np.sqrt(squares * documents / np.maximum(documents - 1, 1)) / np.maximum(whole, 1)
    score = np.divide(mean, error, out=np.zeros_like(mean), where=error > 0)
    found: Array = 2 * t.sf(np.abs(score), np.maximum(documents - 1, 1))
    found[(error == 0) & (mean != 0)] = 0.0
    found[(error == 0) & (mean == 0)] = 1.0
    found[documents < 2] = np.nan
    return found


def rho_interval(rho: float, n: int) -> tuple[float, float]:
    """95 % interval of Spearman's ρ over n sampled pairs: tanh(artanh ρ ± 1.96 · √((1 + ρ² ÷ 2) ÷ (n − 3))) (Bonett & Wright 2000).

    A ρ of ±1 counts as halfway to the next value that n pairs can have.

    Example:
        >>> [round(x, 2) for x in rho_interval(0.8, 28)]
        [0.57, 0.91]
    """
    most = 1 - 6 / (n * (n**2 - 1))
    z = np.arctanh(np.clip(rho, -most, most))
    spread = 1.959964 * np.sqrt((1 + rho**2 / 2) / (n - 3))
    return float(np.tanh(z - spread)), float(np.tanh(z + spread))
