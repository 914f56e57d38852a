"""How well a probe tells a concept, with intervals over documents; both classes count alike however rare one is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import document_weights

Floats = NDArray[np.float64]
_STEPS = 512
METRICS = ("F1", "precision", "recall", "MCC", "AUC", "log_loss")


@dataclass(frozen=True)
class RowsTested:
    """Rows that a probe is tested on.

    Attributes:
        y: [row] whether the concept holds.
        document: [row] index of the document, dense.
        weights: [draw, document] how often each document is drawn; the first row is all ones.
    """

    y: NDArray[np.bool_]
    document: NDArray[np.int64]
    weights: Floats


def rows_tested(y: NDArray[np.bool_], document: NDArray[np.int64], *, draws: int, seed: int) -> RowsTested:
    """Rows of the test part with the resamples of their documents."""
    known, of = np.unique(document, return_inverse=True)
    drawn = document_weights(len(known), draws=draws, seed=seed) if draws else np.empty((0, len(known)))
    return RowsTested(y, of.astype(np.int64), np.vstack([np.ones(len(known)), drawn]))


def score_probe(scores: Floats, part: RowsTested) -> dict[str, Floats]:
    """Metrics of a probe: name → [draw + 1], the first from all documents, NaN where a resample lacks a class.

    With r = share of the concept's tokens that are called so and f = share of the others that are, at equal weight of both:
    precision = r ÷ (r + f), F1 = 2r ÷ (1 + r + f), MCC = (r − f) ÷ √((r + f)(2 − r − f)); 0 where nothing is called, or
    everything. AUC: probability that a token of the concept scores higher than another one, ties half. log_loss: mean of
    the two classes' mean −ln p(own class), nats.

    Args:
        scores: [row] log-odds.
        part: the rows.

    Example:
        >>> part = rows_tested(np.array([True, True, False, False]), np.arange(4), draws=0, seed=0)
        >>> found = score_probe(np.array([1.0, -1.0, -1.0, -1.0]), part)
        >>> round(float(found["F1"][0]), 3), float(found["precision"][0]), float(found["AUC"][0])
        (0.667, 1.0, 0.75)
    """
    called = scores > 0
    n1, n0 = _count(part, part.y), _count(part, ~part.y)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = _count(part, part.y & called) / n1
        f = _count(part, ~part.y & called) / n0
        losses = np.logaddexp(0, np.where(part.y, -scores, scores))
        loss = (_count(part, part.y * losses) / n1 + _count(part, ~part.y * losses) / n0) / 2
        spread = (r + f) * (2 - r - f)
        found = {
            "F1": 2 * r / (1 + r + f),
            "precision": np.where(r + f > 0, r / (r + f), 0.0),
            "recall": r,
            "MCC": np.where(spread > 0, (r - f) / np.sqrt(spread), 0.0),
            "AUC": _auc(scores, part, n1 * n0),
            "log_loss": loss,
        }
    lacking = (n1 == 0) | (n0 == 0)
    return {name: np.where(lacking, np.nan, values) for name, values in found.items()}


def interval(values: Floats, *, level: float = 0.95) -> tuple[float | None, float | None]:
    """Percentile bounds over the resamples; None where fewer than half of them have a value."""
    drawn = values[1:]
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < max(2, (len(values) - 1) / 2):
        return None, None
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _count(part: RowsTested, rows: NDArray[np.floating] | NDArray[np.bool_]) -> Floats:
    """Weighted sum of rows in every resample."""
    by_document = np.bincount(part.document, weights=rows.astype(np.float64), minlength=part.weights.shape[1])
    found: Floats = part.weights @ by_document
    return found


def _auc(scores: Floats, part: RowsTested, pairs: Floats) -> Floats:
    """Exact over all documents; in the resamples with scores in at most 512 steps of equal counts, ties half."""
    _, codes = np.unique(scores, return_inverse=True)
    exact = _of_codes(codes, part, part.weights[:1])
    if len(part.weights) == 1:
        return exact / pairs
    if codes.max() >= _STEPS:
        codes = np.searchsorted(np.quantile(scores, np.arange(1, _STEPS) / _STEPS), scores, side="right")
    return np.append(exact, _of_codes(codes, part, part.weights[1:])) / pairs


def _of_codes(codes: NDArray[np.integer], part: RowsTested, weights: Floats) -> Floats:
    """Pairs of the two classes in the right order, ties half, for each row of weights of documents."""
    steps = int(codes.max()) + 1
    sides = (part.y, ~part.y)
    if len(weights) == 1:
        above, below = (np.bincount(codes[side], minlength=steps)[None].astype(np.float64) for side in sides)
    else:
        shape = (weights.shape[1], steps)
        place = part.document * steps + codes
        above, below = (
            weights @ np.bincount(place[side], minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
            for side in sides
        )
    found: Floats = (above * (np.cumsum(below, axis=1) - below / 2)).sum(1)
    return found
