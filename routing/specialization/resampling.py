"""Bootstrap intervals over documents for measures that are not ratios of sums."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import document_weights

Floats = NDArray[np.floating[Any]]

_TAILS = (0.025, 0.975)
CENTRED = (
    "95 % bootstrap over documents{within}, {draws} resamples, centred on the estimate: resampling widens a divergence as "
    "a small sample does, and the chance level carries that bias"
)
LINEARISED = "95 % bootstrap over documents, {draws} resamples of the documents' first-order contributions{fixed}"


def centred_interval(estimate: Floats, resampled: Floats) -> tuple[Floats, Floats]:
    """The spread of resampled values about their mean, laid round the estimate.

    Entropies of a resample are too low and divergences too high, whatever the corpus; the estimate has that bias once, its
    resamples twice. So only their spread is used (compare Efron & Tibshirani 1993, ch. 10 and 13).

    Args:
        estimate: any shape.
        resampled: [draw, ...].
    """
    low, high = np.quantile(resampled, _TAILS, axis=0)
    centre = resampled.mean(axis=0)
    return np.minimum(estimate, estimate + low - centre), np.maximum(estimate, estimate + high - centre)


def drawn_beyond_once(documents: int, *, draws: int, seed: int) -> NDArray[np.float64]:
    """[draw, document] how often a document is drawn, less 1: what `linearised_interval` takes, made once an analysis."""
    return document_weights(documents, draws=draws, seed=seed).astype(np.float64) - 1.0


def linearised_interval(
    estimate: Floats, influence: Floats, drawn: Floats, *, most: float = np.inf
) -> tuple[Floats, Floats]:
    """Bootstrap over documents of the estimate's linear form: estimate + Σ (times drawn − 1) · influence.

    Args:
        estimate: [...].
        influence: [document, ...] how the estimate moves with the weight of a document; sums to 0 over documents.
        drawn: [draw, document] of `drawn_beyond_once`.
        most: the largest value the measure can take; the smallest is 0.

    Returns:
        Lower and upper bound; NaN where there is one document.
    """
    if len(influence) < 2:
        return np.full(np.shape(estimate), np.nan), np.full(np.shape(estimate), np.nan)
    low, high = np.quantile(np.tensordot(drawn, influence, axes=1), _TAILS, axis=0)
    # Both bounds lie on their side of the estimate, also where rounding or a skewed handful of documents says otherwise.
    return np.clip(estimate + np.minimum(low, 0), 0, most), np.clip(estimate + np.maximum(high, 0), 0, most)
