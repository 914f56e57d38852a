"""Mean, scale and variance of vectors, in one pass over them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError


@dataclass(frozen=True)
class VectorStatistics:
    """What a pass over some vectors finds.

    Attributes:
        count: how many.
        mean: [component].
        mean_norm: of the vectors.
        total_variance: Σ over components of the variance, mean ‖x − mean‖²: what an FVU of 1 leaves unexplained.
    """

    count: int
    mean: NDArray[np.float64]
    mean_norm: float
    total_variance: float

    @property
    def scale(self) -> float:
        """√d / mean norm: the factor of SAELens' `expected_average_only_in`, after which the mean norm is √d."""
        return math.sqrt(len(self.mean)) / self.mean_norm if self.mean_norm > 0 else 1.0


def statistics_of(parts: Iterable[NDArray[np.float32]]) -> VectorStatistics:
    """Statistics of vectors that come in parts, [row, component] each; summed in float64.

    Variance is joined part by part by Chan, Golub and LeVeque's update (1979), so that a large mean does not drown it.

    Raises:
        InputError: there is no vector.

    Example:
        >>> found = statistics_of([np.array([[3.0, 4.0]], np.float32), np.array([[-3.0, -4.0]], np.float32)])
        >>> found.mean_norm, found.total_variance
        (5.0, 25.0)
    """
    count, mean, squares, norms = 0, np.zeros(0), 0.0, 0.0
    for part in parts:
        if not len(part):
            continue
        whole = part.astype(np.float64)
        here = whole.mean(0)
        norms += float(np.sqrt(np.einsum("ij,ij->i", whole, whole)).sum())
        whole -= here
        within = float(np.einsum("ij,ij->", whole, whole))
        shift = here - mean if count else np.zeros_like(here)
        squares += within + float(shift @ shift) * count * len(part) / (count + len(part))
        mean = mean + shift * len(part) / (count + len(part)) if count else here
        count += len(part)
    if not count:
        raise InputError("there is no vector to measure", fix="record more text, or leave less out")
    return VectorStatistics(count, mean, norms / count, squares / count)
