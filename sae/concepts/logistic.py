"""Logistic regression with an L2 penalty, and an L1 one for ranking: SciPy's L-BFGS, Newton steps where few units are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_NEWTON_WIDTH = 64


@dataclass(frozen=True)
class Fit:
    """A fitted probe: p = 1 ÷ (1 + exp(−(x · coefficients + intercept)))."""

    coefficients: Floats
    intercept: float

    def scores(self, x: Any) -> Floats:
        """x · coefficients + intercept of each row."""
        found: Floats = np.asarray(x @ self.coefficients.astype(x.dtype), np.float64) + self.intercept
        return found


def balanced(y: NDArray[np.bool_]) -> Floats:
    """Weights that sum to 1, half of it on either class."""
    return np.where(y, 0.5 / max(int(y.sum()), 1), 0.5 / max(int((~y).sum()), 1))


def fit_logistic(
    x: Any, y: NDArray[np.bool_], *, weights: Floats, penalty: float, start: Fit | None = None, steps: int = 100
) -> Fit:
    """Minimise Σ w·log(1 + exp(−±s)) + penalty/2 · ‖coefficients‖², s = x · coefficients + intercept.

    Args:
        x: [row, unit], an array or a SciPy sparse one.
        y: [row] the class.
        weights: [row], summing to 1.
        penalty: over 0; the intercept is free of it. With n rows, scikit-learn's C is 1 ÷ (n · penalty).
        start: where to begin.
        steps: L-BFGS iterations at most.

    Example:
        >>> x = np.array([[-1.0], [1.0], [-1.0], [1.0]])
        >>> y = np.array([False, True, False, True])
        >>> fit_logistic(x, y, weights=balanced(y), penalty=1e-2).coefficients[0] > 0
        np.True_
    """
    width = x.shape[1]
    first = np.zeros(width + 1)
    if start is not None:
        first[: len(start.coefficients)] = start.coefficients
        first[-1] = start.intercept
    if width <= _NEWTON_WIDTH and isinstance(x, np.ndarray):
        return _newton(x, y, weights, penalty, first)
    from scipy.optimize import minimize

    found = minimize(
        _loss(x, y, weights, penalty), first, jac=True, method="L-BFGS-B",
        options={"maxiter": steps, "maxcor": 20, "ftol": 1e-8, "gtol": 1e-5},
    )  # fmt: skip
    return Fit(found.x[:-1], float(found.x[-1]))


def _loss(x: Any, y: NDArray[np.bool_], w: Floats, penalty: float) -> Callable[[Floats], tuple[float, Floats]]:
    sign = np.where(y, 1.0, -1.0)

    def value(theta: Floats) -> tuple[float, Floats]:
        margin = sign * (x @ theta[:-1].astype(x.dtype) + theta[-1])
        slope = -w * sign * _sigmoid(-margin)
        loss = float(w @ np.logaddexp(0, -margin)) + penalty / 2 * float(theta[:-1] @ theta[:-1])
        return loss, np.append(slope.astype(x.dtype) @ x + penalty * theta[:-1], slope.sum())

    return value


def _newton(x: Floats, y: NDArray[np.bool_], w: Floats, penalty: float, theta: Floats) -> Fit:
    """Newton's steps, halved while they do not lower the loss."""
    loss = _loss(x, y, w, penalty)
    value, slope = loss(theta)
    ridge = np.diag(np.append(np.full(x.shape[1], penalty), 1e-9))
    for _ in range(50):
        if np.abs(slope).max() < 1e-6:
            break
        p = _sigmoid(x @ theta[:-1] + theta[-1])
        curve = w * p * (1 - p)
        cross = curve @ x
        hessian = np.empty((len(theta), len(theta)))
        hessian[:-1, :-1] = (x * curve[:, None]).T @ x
        hessian[-1, :-1] = hessian[:-1, -1] = cross
        hessian[-1, -1] = curve.sum()
        step = np.linalg.solve(hessian + ridge, slope)
        if slope @ step < 1e-9:  # twice what is left to gain
            break
        length = 1.0
        while length > 1e-3:
            trial = theta - length * step
            better, its_slope = loss(trial)
            if better < value:
                break
            length /= 2
        else:
            break
        theta, value, slope = trial, better, its_slope
    return Fit(theta[:-1], float(theta[-1]))


def fit_lasso(x: Any, y: NDArray[np.bool_], *, weights: Floats, penalty: float, steps: int = 200) -> Floats:
    """Coefficients that minimise Σ w·log(1 + exp(−±s)) + penalty · Σ |coefficient| (FISTA; Beck and Teboulle 2009).

    Args:
        x: [row, unit].
        y, weights: as in `fit_logistic`.
        penalty: over 0; with n rows, scikit-learn's C is 1 ÷ (n · penalty).
        steps: of the descent.
    """
    loss = _loss(x, y, weights, 0.0)
    rate = 1 / _steepest(x, weights)
    theta = ahead = np.zeros(x.shape[1] + 1)
    momentum = 1.0
    for _ in range(steps):
        _, slope = loss(ahead)
        new = ahead - rate * slope
        new[:-1] = np.sign(new[:-1]) * np.maximum(np.abs(new[:-1]) - rate * penalty, 0)
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - theta)
        if np.abs(new - theta).max() < 1e-7:
            theta = new
            break
        theta, momentum = new, following
    return theta[:-1]


def _steepest(x: Any, weights: Floats) -> float:
    """A bound of the curvature: a quarter of the largest eigenvalue of xᵀ·w·x with the constant (power iteration)."""
    vector = np.ones(x.shape[1] + 1) / np.sqrt(x.shape[1] + 1)
    size = 1.0
    for _ in range(30):
        image = weights * (x @ vector[:-1] + vector[-1])
        vector = np.append(image @ x, image.sum())
        size = float(np.linalg.norm(vector))
        if size == 0:
            return 1.0
        vector = vector / size
    return 1.1 * size / 4


def _sigmoid(s: Floats) -> Floats:
    found: Floats = 0.5 * (1 + np.tanh(s / 2))
    return found
