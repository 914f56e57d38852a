"""Probes of one concept: the few best units, all of them, random ones, and the same with the labels permuted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.sae.concepts.logistic import Fit, Floats, balanced, fit_logistic
from moescope.sae.concepts.probe_scores import METRICS, RowsTested, rows_tested, score_probe
from moescope.sae.concepts.ranking import Ranking, best, rank_units
from moescope.sae.concepts.units import Units

PERMUTED, ROTATED, RANDOM = "labels permuted over documents", "labels rotated along the tokens", "random units"
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)  # of the dense probe, tried from strong to weak
_C = 1.0  # of sparse probes, as scikit-learn counts it


@dataclass(frozen=True)
class Split:
    """Rows of units, and which of them train.

    Attributes:
        units: on all rows.
        train: [row] whether the row trains; the others test.
        mean, deviation: [unit] over the training rows.
        alive: [unit] which vary there.
    """

    units: Units
    train: NDArray[np.bool_]
    mean: Floats
    deviation: Floats
    alive: NDArray[np.bool_]

    @property
    def test_documents(self) -> NDArray[np.int64]:
        """[test row] document of each."""
        found: NDArray[np.int64] = self.units.tokens.document[~self.train]
        return found

    def columns(self, chosen: NDArray[np.int64]) -> Floats:
        """[row, chosen] standardised by the training rows."""
        return (self.units.columns(chosen) - self.mean[chosen]) / self.deviation[chosen]


@dataclass
class Probed:
    """One probe and its numbers.

    Attributes:
        ranking: how its units were ranked.
        k: how many it reads; 0 for all.
        units, coefficients: which, and their weights for standardised units; empty for all.
        metrics: name → [draw + 1] value over all test documents, then over resamples of them.
        nulls: kind → name → mean over the draws of that null.
    """

    ranking: str
    k: int
    units: NDArray[np.int64]
    coefficients: Floats
    metrics: dict[str, Floats]
    nulls: dict[str, dict[str, float]] = field(default_factory=dict)


def split_units(units: Units, tested: NDArray[np.int64]) -> Split:
    """Rows whose document is to be tested on, and the others, with the spread of units over these."""
    train = ~np.isin(units.tokens.document, tested)
    mean, deviation = units.spread(train)
    return Split(units, train, mean, deviation, deviation > 1e-6 * np.maximum(np.abs(mean), 1e-6))


def permuted(
    y: NDArray[np.bool_], split: Split, *, of_documents: bool, draws: int, random: np.random.Generator
) -> NDArray[np.bool_]:
    """[draw, row] labels without meaning: dealt out anew among the documents of each part, or rotated along each part's tokens."""
    found = np.empty((draws, len(y)), bool)
    document = split.units.tokens.document
    for part in (np.flatnonzero(split.train), np.flatnonzero(~split.train)):
        _, first, of = np.unique(document[part], return_index=True, return_inverse=True)
        for draw in range(draws):
            if of_documents:
                found[draw, part] = random.permutation(y[part][first])[of]
            else:
                found[draw, part] = np.roll(y[part], int(random.integers(1, max(len(part), 2))))
    return found


def probe_concept(
    split: Split,
    y: NDArray[np.bool_],
    nulls: NDArray[np.bool_],
    *,
    rankings: Sequence[Ranking],
    ks: Sequence[int],
    dense: bool,
    draws: int,
    seed: int,
    null_kind: str,
) -> Iterator[Probed]:
    """Probes of one concept for every ranking and k, the dense one first, each with its nulls.

    Args:
        split: units and parts.
        y: [row] whether the concept holds.
        nulls: [draw, row] labels without meaning.
        rankings, ks: which.
        dense: probe all units too.
        draws: resamples of the test documents.
        seed: of these, and of the random units.
        null_kind: what `nulls` are.
    """
    test = rows_tested(y[~split.train], split.test_documents, draws=draws, seed=seed)
    plain = [rows_tested(one[~split.train], split.test_documents, draws=0, seed=seed) for one in nulls]
    if dense:
        yield _dense(split, y, nulls, test, plain, null_kind)
    random = np.random.default_rng(seed)
    alive = np.flatnonzero(split.alive)
    of_chance: list[dict[int, dict[str, Floats]]] = []
    for _ in nulls:
        chosen = random.permutation(alive)[: max(ks)]
        fits = _nested(split.columns(chosen), y, split.train, ks)
        bare = rows_tested(y[~split.train], split.test_documents, draws=0, seed=seed)
        of_chance.append({k: score_probe(scores, bare) for k, (_, scores) in fits.items()})
    for ranking in rankings:
        scores = rank_units(split.units, split.train, np.vstack([y[None], nulls]), ranking, split.alive)
        chosen = best(scores[0], max(ks))
        found = _nested(split.columns(chosen), y, split.train, ks)
        without: list[dict[int, dict[str, Floats]]] = []
        for labels, part, score in zip(nulls, plain, scores[1:], strict=True):
            fits = _nested(split.columns(best(score, max(ks))), labels, split.train, ks)
            without.append({k: score_probe(values, part) for k, (_, values) in fits.items()})
        for k, (fit, values) in found.items():
            probed = Probed(ranking, k, chosen[:k], fit.coefficients, score_probe(values, test))
            if len(nulls):
                probed.nulls = {
                    null_kind: _means([one[k] for one in without if k in one]),
                    RANDOM: _means([one[k] for one in of_chance if k in one]),
                }
            yield probed


def _nested(
    x: Floats, y: NDArray[np.bool_], train: NDArray[np.bool_], ks: Sequence[int]
) -> dict[int, tuple[Fit, Floats]]:
    """k → a probe of the first k columns, and its scores on the test rows."""
    weights, labels = balanced(y[train]), y[train]
    before, found = None, {}
    inside, outside = x[train], x[~train]
    for k in sorted(ks):
        if k > x.shape[1]:
            break
        columns = np.ascontiguousarray(inside[:, :k])
        before = fit_logistic(columns, labels, weights=weights, penalty=1 / (len(labels) * _C), start=before)
        found[k] = before, before.scores(outside[:, :k])
    return found


def _dense(
    split: Split,
    y: NDArray[np.bool_],
    nulls: NDArray[np.bool_],
    test: RowsTested,
    plain: list[RowsTested],
    null_kind: str,
) -> Probed:
    """All units; the penalty is the one with the least loss on a fifth of the training documents, kept back."""
    x = split.units.scaled(np.where(split.alive, 1 / np.maximum(split.deviation, 1e-12), 0))
    inside, outside = x[np.flatnonzero(split.train)], x[np.flatnonzero(~split.train)]
    penalty = _penalty(inside, y[split.train], split.units.tokens.document[split.train])

    def scored(labels: NDArray[np.bool_], part: RowsTested) -> dict[str, Floats]:
        own = labels[split.train]
        fit = fit_logistic(inside, own, weights=balanced(own), penalty=penalty, steps=60)
        return score_probe(fit.scores(outside), part)

    probed = Probed("all", 0, np.empty(0, np.int64), np.empty(0), scored(y, test))
    if len(nulls):
        probed.nulls = {null_kind: _means([scored(one, part) for one, part in zip(nulls, plain, strict=True)])}
    return probed


def _penalty(x: Any, y: NDArray[np.bool_], document: NDArray[np.int64]) -> float:
    known = np.unique(document)
    kept_back = np.isin(document, known[::5])
    if not (y[kept_back].any() and (~y[kept_back]).any() and y[~kept_back].any() and (~y[~kept_back]).any()):
        return PENALTIES[1]
    fits, part = np.flatnonzero(~kept_back), rows_tested(y[kept_back], document[kept_back], draws=0, seed=0)
    rest, labels = x[fits], y[fits]
    held = x[np.flatnonzero(kept_back)]
    losses, before = [], None
    for penalty in PENALTIES:
        before = fit_logistic(rest, labels, weights=balanced(labels), penalty=penalty, start=before, steps=40)
        losses.append(float(score_probe(before.scores(held), part)["log_loss"][0]))
    return PENALTIES[int(np.argmin(losses))]


def _means(found: list[dict[str, Floats]]) -> dict[str, float]:
    if not found:
        return {}
    with np.errstate(invalid="ignore"):
        return {name: float(np.mean([one[name][0] for one in found])) for name in METRICS}
