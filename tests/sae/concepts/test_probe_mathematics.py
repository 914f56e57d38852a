"""Rankings, fits and scores of probes, against loops written to be read and closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csc_array

from moescope.sae.concepts.logistic import balanced, fit_lasso, fit_logistic
from moescope.sae.concepts.probe_scores import interval, rows_tested, score_probe
from moescope.sae.concepts.ranking import best, rank_units
from moescope.sae.concepts.units import Units


@pytest.fixture
def data() -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]:
    random = np.random.default_rng(0)
    values = random.normal(size=(60, 5)).astype(np.float32)
    values[values < 0] = 0
    y = random.random(60) < 0.4
    values[y, 3] += 1
    return values, y, np.arange(60) < 40


def units_of(values: Any) -> Units:
    return Units("neuron", "blocks.0.mlp.hook_post", values, None)  # type: ignore[arg-type]  # rankings do not look at tokens


@pytest.mark.parametrize("sparse", [False, True])
def test_rankings_agree_with_loops(data: Any, *, sparse: bool) -> None:
    values, y, train = data
    units = units_of(csc_array(values) if sparse else values)
    alive = np.ones(5, bool)
    x, labels = values[train].astype(float), y[train]
    inside, outside = x[labels], x[~labels]
    difference = [abs(inside[:, i].mean() - outside[:, i].mean()) for i in range(5)]
    found = rank_units(units, train, y[None], "mean_difference", alive)[0]
    assert found.tolist() == pytest.approx(difference)
    f = []
    for i in range(5):
        grand = x[:, i].mean()
        between = sum(len(part) * (part[:, i].mean() - grand) ** 2 for part in (inside, outside))
        within = sum(((part[:, i] - part[:, i].mean()) ** 2).sum() for part in (inside, outside))
        f.append(between / (within / (len(x) - 2)))
    assert rank_units(units, train, y[None], "f", alive)[0].tolist() == pytest.approx(f, rel=1e-6)
    for ranking in ("mean_difference", "f", "mutual_information", "l1"):
        assert best(rank_units(units, train, y[None], ranking, alive)[0], 1).tolist() == [3]


def test_mutual_information_of_a_copy_of_the_label_is_one_bit(data: Any) -> None:
    _, y, train = data
    values = np.stack([y, ~y, np.zeros(60), np.arange(60) % 2], 1).astype(np.float32)
    found = rank_units(units_of(values), train, y[None], "mutual_information", np.array([True, True, False, True]))[0]
    assert found[:2] == pytest.approx(1)
    assert found[2] == -1
    assert found[3] < 0.2


def test_units_that_never_vary_are_not_chosen() -> None:
    assert best(np.array([0.5, -1.0, 0.7, 0.7]), 4).tolist() == [2, 3, 0]


def test_fit_of_one_binary_unit_is_its_log_odds() -> None:
    """Without a penalty to speak of: of the class, 3 in 4 have the unit; of the rest, 1 in 5."""
    x = np.array([[1.0]] * 3 + [[0.0]] + [[1.0]] + [[0.0]] * 4)
    y = np.array([True] * 4 + [False] * 5)
    fit = fit_logistic(x, y, weights=balanced(y), penalty=1e-9)
    with_it, without = math.log((3 / 4) / (1 / 5)), math.log((1 / 4) / (4 / 5))
    assert fit.intercept == pytest.approx(without, abs=1e-3)
    assert fit.intercept + fit.coefficients[0] == pytest.approx(with_it, abs=1e-3)


@pytest.mark.parametrize("width", [3, 90])
def test_fit_has_no_slope_left(width: int) -> None:
    random = np.random.default_rng(width)
    x = random.normal(size=(300, width))
    y = x[:, 0] + random.normal(size=300) > 0.5
    weights, penalty = balanced(y), 1 / 300
    fit = fit_logistic(x, y, weights=weights, penalty=penalty, steps=500)
    p = 1 / (1 + np.exp(-(x @ fit.coefficients + fit.intercept)))
    slope = (weights * (p - y)) @ x + penalty * fit.coefficients
    assert np.abs(slope).max() < 1e-4
    assert abs((weights * (p - y)).sum()) < 1e-4
    sparse = fit_logistic(csc_array(x), y, weights=weights, penalty=penalty, steps=500)
    assert sparse.coefficients == pytest.approx(fit.coefficients, abs=2e-3)


def test_lasso_leaves_the_unit_that_matters() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(400, 20))
    y = x[:, 7] > 0
    weights = balanced(y)
    found = fit_lasso(x, y, weights=weights, penalty=0.05)
    assert np.flatnonzero(np.abs(found) > 1e-6).tolist() == [7]
    p = 1 / (1 + np.exp(-(x @ found + np.log(1))))
    assert np.abs((weights * (p - y)) @ x).max() < 0.06  # no more than the penalty, at the optimum
    assert fit_lasso(x, y, weights=weights, penalty=1.0).tolist() == [0] * 20


def test_scores_are_those_of_classes_made_equal_by_repetition() -> None:
    random = np.random.default_rng(2)
    y = np.array([True] * 4 + [False] * 12)
    scores = np.round(random.normal(size=16) + y, 1)
    found = {
        name: values[0] for name, values in score_probe(scores, rows_tested(y, np.arange(16), draws=0, seed=0)).items()
    }
    truth, own = np.concatenate([np.repeat(y[y], 3), y[~y]]), np.concatenate([np.repeat(scores[y], 3), scores[~y]])
    tp, fp = (truth & (own > 0)).sum(), (~truth & (own > 0)).sum()
    fn, tn = (truth & (own <= 0)).sum(), (~truth & (own <= 0)).sum()
    assert found["precision"] == pytest.approx(tp / (tp + fp))
    assert found["recall"] == pytest.approx(tp / (tp + fn))
    assert found["F1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert found["MCC"] == pytest.approx((tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(scores[y], scores[~y])]
    assert found["AUC"] == pytest.approx(np.mean(pairs))
    losses = np.where(truth, np.log1p(np.exp(-own)), np.log1p(np.exp(own)))
    assert found["log_loss"] == pytest.approx(losses.mean())


def test_resampled_scores_are_those_of_the_documents_drawn() -> None:
    random = np.random.default_rng(3)
    y = random.random(80) < 0.5
    document = np.repeat(np.arange(8), 10)
    scores = random.normal(size=80) + y
    part = rows_tested(y, document, draws=5, seed=1)
    found = score_probe(scores, part)
    for draw in range(1, 6):
        rows = np.concatenate(
            [np.flatnonzero(document == d) for d in range(8) for _ in range(int(part.weights[draw, d]))]
        )
        again = score_probe(scores[rows], rows_tested(y[rows], np.arange(len(rows)), draws=0, seed=0))
        for name in ("F1", "MCC", "AUC", "log_loss"):
            assert found[name][draw] == pytest.approx(again[name][0], abs=1e-9)


def test_nothing_called_scores_zero_and_one_document_has_no_interval() -> None:
    y = np.array([True, False, True, False])
    found = score_probe(np.full(4, -1.0), rows_tested(y, np.zeros(4, int), draws=20, seed=0))
    assert [found[name][0] for name in ("F1", "precision", "recall", "MCC", "AUC")] == [0, 0, 0, 0, 0.5]
    lacking = score_probe(np.zeros(2), rows_tested(np.array([True, False]), np.arange(2), draws=400, seed=0))
    assert 0.3 < np.isnan(lacking["F1"][1:]).mean() < 0.7
    assert interval(np.array([0.5, np.nan, np.nan, 0.4])) == (None, None)
