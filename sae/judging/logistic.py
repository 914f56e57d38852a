"""Logistic probes on a few numbers, fitted by Newton's method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RIDGE = 1e-4
_STEPS = 30
_STILL = 1e-8

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
    standard = np.column_stack([(x - centre) / scale, np.ones(len(x))])
    share = float(yes.mean())
    weights = np.zeros(standard.shape[1])
    weights[-1] = np.log(share / (1 - share))
    ridge = np.full(len(weights), _RIDGE)
    ridge[-1] = 0.0
    objective = _objective(weights, standard, yes, ridge)
    for _ in range(_STEPS):
        p = _sigmoid(standard @ weights)
        gradient = standard.T @ (p - yes) / len(x) + ridge * weights
        hessian = (standard * (p * (1 - p))[:, None]).T @ standard / len(x) + np.diag(ridge + 1e-10)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-6 and (new := _objective(weights - size * step, standard, yes, ridge)) > objective:
            size /= 2  # Newton's step may reach too far where the curve is flat
        if size <= 1e-6:
            break
        weights, objective = weights - size * step, new
        if float(np.abs(size * step).max()) < _STILL:
            break
    return Logistic(weights[:-1], float(weights[-1]), centre, scale)


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


def _objective(weights: Floats, x: Floats, yes: NDArray[np.bool_], ridge: Floats) -> float:
    return float(log_losses(x @ weights, yes).mean() + (ridge * weights**2).sum() / 2)


def _sigmoid(scores: Floats) -> Floats:
    found: Floats = np.exp(-np.logaddexp(0.0, -scores))
    return found
