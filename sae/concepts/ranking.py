"""Units in the order in which a sparse probe may read them, by training tokens alone."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.sae.concepts.logistic import balanced, fit_lasso
from moescope.sae.concepts.units import Units

Ranking = Literal["mean_difference", "f", "mutual_information", "l1"]
RANKINGS: tuple[Ranking, ...] = ("mean_difference", "f", "mutual_information", "l1")
_BINS = 8
_LASSO_C = 0.1


def rank_units(
    units: Units, train: NDArray[np.bool_], y: NDArray[np.bool_], ranking: Ranking, alive: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Score of every unit for every labelling: [labelling, unit], −1 for units that are the same on all training tokens.

    mean_difference: |mean over tokens of the concept − mean over the others|. (The authors' released code has a selector
    called `means` too, which sorts the indices of a maximum; it ranks nothing, and `mean_dif` is this one.) f: variance
    between the two classes over variance within (analysis of variance). mutual_information: of the label with the unit's
    value in up to 8 bins of equal counts, values of 0 in one of their own, bits, both classes weighted alike. l1:
    |coefficient| of a logistic regression with an L1 penalty (C = 0.1, standardised units, classes weighted alike).

    Args:
        units: on all rows.
        train: [row] of the training part.
        y: [labelling, row] whether the concept holds.
        ranking: which score.
        alive: [unit] which units vary over the training part.
    """
    if ranking == "l1":
        scores = _lasso(units, train, y, alive)
    elif ranking == "mutual_information":
        scores = _information(units, train, y)
    else:
        scores = _moments(units, train, y, ranking)
    scores[:, ~alive] = -1
    return scores


def best(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The `count` units of highest score, ties by lower number; those scored −1 are left out."""
    order = np.argsort(-scores, kind="stable")[:count]
    return order[scores[order] >= 0]


def _moments(units: Units, train: NDArray[np.bool_], y: NDArray[np.bool_], ranking: Ranking) -> NDArray[np.float64]:
    """Mean difference or F from sums over either class."""
    inside = (y & train).astype(np.float64)
    outside = (~y & train).astype(np.float64)
    n1, n0 = inside.sum(1)[:, None], outside.sum(1)[:, None]
    scores = np.empty((len(y), units.width))
    for piece, read in units.blocks():
        values = read.astype(np.float64)
        m1, m0 = (inside @ values) / n1, (outside @ values) / n0
        if ranking == "mean_difference":
            scores[:, piece] = np.abs(m1 - m0)
            continue
        squares = train.astype(np.float64) @ (values**2 if isinstance(values, np.ndarray) else values.power(2))
        between = n1 * n0 / (n1 + n0) * (m1 - m0) ** 2
        within = np.maximum(squares - n1 * m1**2 - n0 * m0**2, 1e-12 * np.maximum(squares, 1e-30))
        scores[:, piece] = between / (within / np.maximum(n1 + n0 - 2, 1))
    return scores


def _information(units: Units, train: NDArray[np.bool_], y: NDArray[np.bool_]) -> NDArray[np.float64]:
    inside = np.stack([balanced(one[train]) * one[train] for one in y])
    outside = np.stack([balanced(one[train]) * ~one[train] for one in y])
    scores = np.empty((len(y), units.width))
    for piece, values in units.blocks():
        dense = values[train] if isinstance(values, np.ndarray) else values.tocsr()[train].toarray()
        codes = np.stack([_binned(column) for column in dense.T], 1)
        found = np.zeros((len(y), codes.shape[1]))
        for code in range(_BINS + 1):
            member = (codes == code).astype(np.float64)
            p1, p0 = inside @ member, outside @ member
            found += _surprise(p1, p1 + p0) + _surprise(p0, p1 + p0)
        scores[:, piece] = np.maximum(found, 0)
    return scores


def _binned(column: NDArray[np.float32]) -> NDArray[np.int64]:
    """Bin of each value: 0 for zero, the others in bins of equal counts."""
    found = np.zeros(len(column), np.int64)
    other = column != 0
    if other.any():
        edges = np.unique(np.quantile(column[other], np.arange(1, _BINS) / _BINS))
        found[other] = 1 + np.searchsorted(edges, column[other], side="right")
    return found


def _surprise(joint: NDArray[np.float64], bin_share: NDArray[np.float64]) -> NDArray[np.float64]:
    """joint · log2(joint ÷ (share of the bin · ½)), 0 where joint is 0."""
    ratio = np.divide(2 * joint, bin_share, out=np.ones_like(joint), where=joint > 0)
    return joint * np.log2(ratio)


def _lasso(
    units: Units, train: NDArray[np.bool_], y: NDArray[np.bool_], alive: NDArray[np.bool_]
) -> NDArray[np.float64]:
    _, deviation = units.spread(train)
    x: Any = units.scaled(np.where(alive, 1 / np.maximum(deviation, 1e-12), 0))[np.flatnonzero(train)]
    penalty = 1 / (int(train.sum()) * _LASSO_C)
    return np.stack([np.abs(fit_lasso(x, one[train], weights=balanced(one[train]), penalty=penalty)) for one in y])
