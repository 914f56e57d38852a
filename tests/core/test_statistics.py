"""Intervals that cover, permutation p-values and q-values that equal their definitions written as loops."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.core.statistics import benjamini_hochberg, bootstrap_ratio, document_weights, permutation_p, quotient

probability = st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.049, 0.05, 0.3, 0.5, 1.0]) | st.floats(0, 1)


def test_estimate_is_the_ratio_of_sums_not_the_mean_of_ratios() -> None:
    estimate, _, _ = bootstrap_ratio(np.array([1.0, 9.0]), np.array([1.0, 3.0]))
    assert float(estimate) == 10 / 4


def test_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    """300 corpora of 40 documents: lengths vary, documents differ, the true mean is 2; a 90 % interval must hit about 270."""
    generator = np.random.default_rng(123)
    covered = 0
    for seed in range(300):
        lengths = generator.integers(20, 200, 40).astype(float)
        sums = lengths * generator.gamma(shape=16, scale=2 / 16, size=40)
        _, low, high = bootstrap_ratio(sums, lengths, draws=300, level=0.9, seed=seed)
        covered += bool(low <= 2.0 <= high)
    assert 246 <= covered <= 287


def test_interval_shrinks_as_one_over_the_root_of_documents() -> None:
    generator = np.random.default_rng(4)
    widths = []
    for documents in (100, 1600):
        values = generator.normal(5, 1, documents)
        _, low, high = bootstrap_ratio(values, np.ones(documents), draws=2000)
        widths.append(float(high - low))
        assert float(high - low) == pytest.approx(2 * 1.96 * values.std() / math.sqrt(documents), rel=0.12)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)


def test_level_widens_the_interval() -> None:
    values = np.random.default_rng(0).normal(0, 1, 50)
    narrow, wide = (bootstrap_ratio(values, np.ones(50), level=level) for level in (0.5, 0.99))
    assert wide[1] < narrow[1] < narrow[2] < wide[2]


def test_equal_documents_leave_no_uncertainty() -> None:
    estimate, low, high = bootstrap_ratio(np.full(7, 3.0), np.full(7, 4.0))
    assert (float(estimate), float(low), float(high)) == (0.75, 0.75, 0.75)


def test_one_document_has_an_estimate_and_no_interval() -> None:
    estimate, low, high = bootstrap_ratio(np.array([[3.0, 0.0]]), np.array([[4.0, 4.0]]))
    assert estimate.tolist() == [0.75, 0.0]
    assert np.isnan([low, high]).all()


@pytest.mark.parametrize("numerator", [[0.0, 0.0], [1.0, 2.0]])
def test_nothing_to_divide_by_gives_nan(numerator: list[float]) -> None:
    assert all(math.isnan(float(part)) for part in bootstrap_ratio(np.array(numerator), np.zeros(2)))


def test_a_quotient_over_nothing_is_unknown_and_others_are_exact() -> None:
    above, below = np.array([[3.0, 1.0], [0.0, -2.0]]), np.array([[2.0], [0.0]])
    assert quotient(above, np.broadcast_to(below, above.shape)).tolist()[0] == [1.5, 0.5]
    assert np.array_equal(quotient(above, below), [[1.5, 0.5], [np.nan, np.nan]], equal_nan=True)
    assert quotient(np.array([4.0]), np.array([-2.0])).tolist() == [-2.0]


def test_columns_are_resampled_together_and_broadcast() -> None:
    numerator = np.random.default_rng(0).uniform(size=(12, 3, 2))
    denominator = np.arange(1.0, 13.0)[:, None, None]
    estimate, low, high = bootstrap_ratio(numerator, denominator, draws=200, seed=3)
    assert estimate.shape == low.shape == high.shape == (3, 2)
    alone = bootstrap_ratio(numerator[:, 1, 1], denominator[:, 0, 0], draws=200, seed=3)
    assert (estimate[1, 1], low[1, 1], high[1, 1]) == pytest.approx(tuple(map(float, alone)))


def test_bootstrap_equals_drawing_documents_by_hand() -> None:
    numerator, denominator = np.array([1.0, 5.0, 2.0, 9.0]), np.array([2.0, 4.0, 1.0, 3.0])
    _, low, high = bootstrap_ratio(numerator, denominator, draws=4000, seed=0)
    generator = np.random.default_rng(99)
    drawn = [generator.integers(0, 4, 4) for _ in range(4000)]
    ratios = [numerator[d].sum() / denominator[d].sum() for d in drawn]
    assert float(low) == pytest.approx(np.quantile(ratios, 0.025), abs=0.06)
    assert float(high) == pytest.approx(np.quantile(ratios, 0.975), abs=0.06)


def test_every_resample_draws_as_many_documents_as_there_are() -> None:
    weights = document_weights(9, draws=500, seed=1)
    assert weights.shape == (500, 9)
    assert (weights.sum(1) == 9).all()
    assert weights.mean(0) == pytest.approx(np.ones(9), abs=0.2)
    assert (document_weights(9, draws=500, seed=1) == weights).all()


@given(st.integers(-5, 5), st.lists(st.integers(-5, 5), min_size=1, max_size=30))
def test_p_counts_the_observation_and_all_at_least_as_large(observed: int, permuted: list[int]) -> None:
    expected = Fraction(1 + sum(value >= observed for value in permuted), 1 + len(permuted))
    assert permutation_p(np.array(float(observed)), np.array(permuted, float)).item() == pytest.approx(float(expected))


def test_p_is_never_0() -> None:
    assert permutation_p(np.array([1e9]), np.zeros((199, 1))).tolist() == [1 / 200]


def test_p_is_taken_cell_by_cell() -> None:
    observed = np.array([[0.0, 2.0]])
    permuted = np.array([[[0.0, 0.0]], [[1.0, 1.0]], [[2.0, 3.0]]])
    assert permutation_p(observed, permuted).tolist() == [[1.0, 0.5]]


def test_p_is_uniform_where_nothing_is_there() -> None:
    generator = np.random.default_rng(8)
    draws = generator.normal(size=(100, 2000))
    p = permutation_p(draws[0], draws[1:])
    for level in (0.05, 0.25, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=5 * math.sqrt(level * (1 - level) / 2000))


def _q_by_definition(p: list[float]) -> list[float]:
    """For each test the smallest m · p_j ÷ (tests with p ≤ p_j) over all p_j that are at least its own."""
    return [
        min(1.0, *(len(p) * larger / sum(other <= larger for other in p) for larger in p if larger >= own)) for own in p
    ]


@given(st.lists(probability, min_size=1, max_size=25))
def test_q_equals_its_definition(p: list[float]) -> None:
    assert benjamini_hochberg(np.array(p)).tolist() == pytest.approx(_q_by_definition(p), abs=1e-12)


@given(st.lists(probability, min_size=2, max_size=20), st.floats(0.001, 0.999))
def test_q_below_a_level_is_what_the_step_up_rule_calls(p: list[float], level: float) -> None:
    ordered = sorted(p)
    passing = [rank for rank, value in enumerate(ordered, start=1) if value <= level * rank / len(p)]
    called = max(passing, default=0)
    q = benjamini_hochberg(np.array(p))
    borderline = np.isclose(q, level, rtol=1e-9)
    assert (q[~borderline] <= level).sum() <= called <= ((q <= level) | borderline).sum()


@given(st.lists(probability, min_size=1, max_size=12))
def test_q_does_not_depend_on_the_order_of_tests(p: list[float]) -> None:
    order = np.random.default_rng(len(p)).permutation(len(p))
    assert benjamini_hochberg(np.array(p)[order]).tolist() == benjamini_hochberg(np.array(p))[order].tolist()


def test_q_keeps_the_shape_of_p() -> None:
    assert benjamini_hochberg(np.full((2, 3, 4), 0.5)).shape == (2, 3, 4)


def test_false_discoveries_stay_near_the_level() -> None:
    """90 of 100 tests are null, 10 are strong; the mean share of nulls among discoveries at 0.1 is at most 0.1."""
    generator = np.random.default_rng(6)
    shares = []
    for _ in range(300):
        p = np.concatenate([generator.uniform(size=90), generator.uniform(0, 1e-4, 10)])
        called = benjamini_hochberg(p) <= 0.1
        shares.append(called[:90].sum() / max(called.sum(), 1))
    assert 0.05 < np.mean(shares) < 0.12
