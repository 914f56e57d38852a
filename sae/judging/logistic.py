"""Logistic probes on a few numbers, standardised and held by a small ridge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.sae.concepts.logistic import Fit
from moescope.sae.concepts.logistic import fit_logistic as solve

_RIDGE = 1e-4

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Logistic:
    """A fitted probe: log-odds = bias + weights · (x − centre) ÷ scale.

    Attributes:
        weights, centre, scale: [number].
        bias: log-odds at the centre.
    """

    weights: Floats
    bias: float
    centre: Floats
    scale: Floats

    def scores(self, x: Floats) -> Floats:
        """[row] log-odds of yes."""
        found: Floats = ((x - self.centre) / self.scale) @ self.weights + self.bias
        return found


def fit_logistic(x: Floats, yes: NDArray[np.bool_]) -> Logistic:
    """Fit a logistic probe; numbers are standardised, and a ridge of 1e-4 on their weights keeps separable ones finite.

    Args:
        x: [row, number].
        yes: [row] answers, some of either kind.

    Example:
        >>> probe = fit_logistic(np.array([[0.0], [0.0], [1.0], [1.0]]), np.array([False, True, True, True]))
        >>> (probe.scores(np.array([[0.0], [1.0]])) > 0.1).tolist()
        [False, True]
    """
    x = x.astype(np.float64, copy=False)
    centre, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    share = float(yes.mean())
    fit = solve(
        (x - centre) / scale, yes, weights=np.full(len(x), 1 / len(x)), penalty=_RIDGE,
        start=Fit(np.zeros(x.shape[1]), float(np.log(share / (1 - share)))),
    )  # fmt: skip
    return Logistic(fit.coefficients, fit.intercept, centre, scale)


def log_losses(scores: Floats, yes: NDArray[np.bool_]) -> Floats:
    """[row] −ln p(answer) in nats.

    Example:
        >>> log_losses(np.array([0.0]), np.array([True])).round(4).tolist()
        [0.6931]
    """
    found: Floats = np.logaddexp(0.0, np.where(yes, -scores, scores))
    return found


def f1_score(guessed: NDArray[np.bool_], yes: NDArray[np.bool_]) -> float:
    """2 · hits ÷ (guessed + yes), 0 where there is neither."""
    total = int(guessed.sum()) + int(yes.sum())
    return 2 * int((guessed & yes).sum()) / total if total else 0.0
