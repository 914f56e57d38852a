"""CETT: how much of an MLP's output is lost when its small neurons are left out, and the threshold that a loss allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError

# Thresholds that the authors' code searches through.
_CANDIDATES = 65536
_QUANTILE = 0.99


@dataclass(frozen=True)
class Cut:
    """A threshold, and what it does.

    Attributes:
        threshold: neurons of smaller output norm are left out.
        cett: mean over tokens of the norm of what is left out over the norm of the whole output.
        kept: [row] share of neurons of each token that stay.
    """

    threshold: float
    cett: float
    kept: NDArray[np.float64]


def cut_at(neurons: NDArray[np.floating], target: float, *, down: NDArray[np.floating] | None = None) -> Cut:
    """The largest threshold whose cumulative error of tail truncation stays within a target.

    Neuron i of a token puts out n_i = |x_i|·‖W_down[:, i]‖. With threshold t, the tail is Σ over n_i < t of
    x_i·W_down[:, i], and CETT(t) is the mean over tokens of ‖tail‖ ÷ ‖FFN output‖ (arXiv 2411.02335). As in the authors'
    code, t is found by bisection among 65,536 evenly spaced candidates from the smallest n_i to the 0.99 quantile. A
    neuron stays where n_i ≥ t and n_i > 0, so that at CETT 0 the share that stays is the share of neurons not exactly 0.

    Args:
        neurons: [token, neuron] inputs of the down projection.
        target: CETT to stay within, 0 to 1.
        down: [channel, neuron] W_down. Without it its columns are taken as orthogonal and of one length, so that
            CETT(t) is ‖x below t‖ ÷ ‖x‖.

    Raises:
        InputError: no token has any neuron but 0, or shapes do not fit.

    Example:
        >>> cut = cut_at(np.array([[3.0, 4.0, 0.0, 0.0]]), 0.0)
        >>> cut.kept.tolist()
        [0.5]
    """
    if down is not None and down.shape[1] != neurons.shape[1]:
        raise InputError(
            "W_down does not fit the neurons", expected=f"[channel, {neurons.shape[1]}]", found=f"{list(down.shape)}"
        )
    neurons = neurons[(neurons != 0).any(axis=1)]
    if not len(neurons):
        raise InputError("no token has a neuron other than 0", found="vectors of zeros")
    return _unit_columns(neurons, target) if down is None else _with_columns(neurons, target, down)


def _unit_columns(neurons: NDArray[np.floating], target: float) -> Cut:
    """Sorted once, so that each candidate costs one comparison."""
    size = np.sort(np.abs(neurons), axis=1)
    energy = np.cumsum(size.astype(np.float64) ** 2, axis=1)
    energy = np.concatenate([np.zeros((len(size), 1)), energy], axis=1)
    rows = np.arange(len(size))

    def error(threshold: float) -> float:
        below = (size < threshold).sum(axis=1)
        return float(np.sqrt(energy[rows, below] / energy[:, -1]).mean())

    threshold, cett = _bisected(error, _candidates(size), target)
    return Cut(threshold, cett, ((size >= threshold) & (size > 0)).mean(axis=1))


def _with_columns(neurons: NDArray[np.floating], target: float, down: NDArray[np.floating]) -> Cut:
    matrix = down.astype(np.float64)
    values = neurons.astype(np.float64)
    size = np.abs(values) * np.linalg.norm(matrix, axis=0)
    whole = np.linalg.norm(values @ matrix.T, axis=1)
    some = whole > 0

    def error(threshold: float) -> float:
        tail = np.linalg.norm(np.where(size < threshold, values, 0.0) @ matrix.T, axis=1)
        return float((tail[some] / whole[some]).mean()) if some.any() else 0.0

    threshold, cett = _bisected(error, _candidates(size), target)
    return Cut(threshold, cett, ((size >= threshold) & (size > 0)).mean(axis=1))


def _candidates(size: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.linspace(float(size.min()), float(np.quantile(size, _QUANTILE)), _CANDIDATES)


def _bisected(error: Callable[[float], float], candidates: NDArray[np.float64], target: float) -> tuple[float, float]:
    """The last candidate before the error first exceeds the target, as bisection finds it, and its error."""
    low, high = 0, len(candidates) - 1
    if error(float(candidates[high])) <= target:
        return float(candidates[high]), error(float(candidates[high]))
    while high - low > 1:
        middle = (low + high) // 2
        if error(float(candidates[middle])) <= target:
            low = middle
        else:
            high = middle
    return float(candidates[low]), error(float(candidates[low]))


def gaussian_ratio(target: float) -> float:
    """The share of neurons that stay at a CETT if neurons are independent normals, many of them, under unit columns.

    The share P(|x| > t) at the t for which √(E[x²; |x| < t] ÷ E[x²]) is the target.

    Example:
        >>> round(gaussian_ratio(0.2), 3)
        0.584
    """
    from scipy.optimize import brentq
    from scipy.special import erf, erfc

    if target <= 0:
        return 1.0
    if target >= 1:
        return 0.0

    def excess(t: float) -> float:
        return float(erf(t / np.sqrt(2)) - t * np.sqrt(2 / np.pi) * np.exp(-t * t / 2)) - target**2

    return float(erfc(brentq(excess, 0.0, 40.0) / np.sqrt(2)))
