"""Numbers of students with intervals: FVU, differences of it, and how far two ways of sorting tokens agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import document_weights

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and its resamples.

    Attributes:
        value: on the sample itself.
        draws: [draw] on resamples; NaN where there is nothing to resample.
    """

    value: float
    draws: Floats

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.draws - other.draws)

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """95 % percentile interval; None where there is none."""
        finite = self.draws[np.isfinite(self.draws)]
        if not len(finite):
            return None, None
        low, high = np.quantile(finite, [0.025, 0.975])
        return float(low), float(high)


@dataclass(frozen=True)
class Units:
    """What is resampled: documents of real inputs, vectors of Gaussian ones.

    Attributes:
        place: [vector] unit of each vector of the test part.
        spread: [unit] squared distance of its outputs from their mean.
        weights: [draw, unit] how often each unit is drawn; the same for every student, so that differences are paired.
    """

    place: NDArray[np.int64]
    spread: Floats
    weights: Floats

    @classmethod
    def of(cls, unit: NDArray[np.int64], spread: Floats, *, draws: int, seed: int) -> Units:
        """From the unit and the spread of each vector."""
        names, place = np.unique(unit, return_inverse=True)
        weights = document_weights(len(names), draws=draws, seed=seed).astype(np.float64)
        if len(names) < 2:
            weights = np.full_like(weights, np.nan)
        return cls(place, np.bincount(place, spread, len(names)).astype(np.float64), weights)

    def fvu(self, errors: Floats, *, seed: int = 0) -> Estimate:
        """Σ squared errors ÷ Σ spread, the mean over students of several seeds.

        Args:
            errors: [student, vector].
            seed: of resampling students; the interval covers their differences where there are several.

        Example:
            >>> units = Units.of(np.array([0, 0, 1]), np.array([1.0, 1.0, 2.0]), draws=100, seed=0)
            >>> units.fvu(np.array([[0.5, 0.5, 1.0]])).value
            0.5
        """
        sums = np.stack([np.bincount(self.place, row, len(self.spread)) for row in errors])
        below = self.weights @ self.spread
        by_student = (self.weights @ sums.T) / np.where(below > 0, below, np.nan)[:, None]
        students = document_weights(len(errors), draws=len(self.weights), seed=seed + 1) / len(errors)
        return Estimate(float(sums.sum(1).mean() / self.spread.sum()), (by_student * students).sum(1))


def agreement(first: NDArray[np.int64], second: NDArray[np.int64], weights: Floats | None = None) -> float:
    """Normalised mutual information of two ways to sort the same tokens: 2 I ÷ (H₁ + H₂); 0 where both sort nothing.

    Args:
        first, second: [token] classes.
        weights: [token] how often each token counts.

    Example:
        >>> a = np.array([0, 0, 1, 1])
        >>> agreement(a, a), agreement(a, np.array([0, 1, 0, 1]))
        (1.0, 0.0)
    """
    _, a = np.unique(first, return_inverse=True)
    _, b = np.unique(second, return_inverse=True)
    weight = np.ones(len(a)) if weights is None else weights
    width = int(b.max()) + 1
    joint = np.bincount(a * width + b, weight)
    parts = (np.bincount(a, weight), np.bincount(b, weight), joint)
    one, two, both = (_entropy(part.astype(np.float64)) for part in parts)
    return float(2 * (one + two - both) / (one + two)) if one + two > 0 else 0.0


def _entropy(counts: Floats) -> float:
    """Nats."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum()) + 0.0
