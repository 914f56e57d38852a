"""Rank correlations against scipy, one pair at a time."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from moescope.routing.importance.rank_correlation import (
    kendall,
    kendall_null,
    pooled_spearman_null,
    spearman,
    spearman_null,
)


@given(items=st.integers(2, 30), kinds=st.integers(2, 9), seed=st.integers(0, 10**6))
def test_correlations_are_scipys_with_ties(items: int, kinds: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, kinds, (3, items)).astype(float)
    ours = {"spearman": spearman(values), "kendall": kendall(values)}
    for i in range(3):
        for j in range(3):
            if np.ptp(values[i]) == 0 or np.ptp(values[j]) == 0:
                assert np.isnan(ours["spearman"][i, j])
                assert np.isnan(ours["kendall"][i, j])
                continue
            assert np.isclose(ours["spearman"][i, j], spearmanr(values[i], values[j]).statistic)
            assert np.isclose(ours["kendall"][i, j], kendalltau(values[i], values[j]).statistic, atol=1e-6)


def test_batches_are_each_their_own() -> None:
    values = np.random.default_rng(0).normal(size=(4, 3, 12))
    for measure in (spearman, kendall):
        for number, together in enumerate(measure(values)):
            assert np.allclose(together, measure(values[number]), atol=1e-6)


@given(items=st.integers(2, 5), kinds=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_nulls_are_the_moments_over_every_permutation(items: int, kinds: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, kinds, (2, items)).astype(float)
    for measure, null in ((spearman, spearman_null), (kendall, kendall_null)):
        every = [measure(np.stack([values[0], values[1][list(order)]]))[0, 1] for order in permutations(range(items))]
        if np.isnan(every).any():
            continue
        mean, variance = null(values)
        assert np.isclose(np.mean(every), mean[0, 1], atol=1e-6)
        assert np.isclose(np.var(every), variance[0, 1], atol=1e-6)


def test_pooled_null_is_the_moments_over_permutations_within_groups() -> None:
    values = np.array([[1.0, 5.0, 2.0, 9.0, 7.0, 7.0], [2.0, 1.0, 1.0, 6.0, 9.0, 4.0]])
    group = np.array([0, 0, 0, 1, 1, 1])
    every = [
        spearman(np.stack([values[0], np.concatenate([values[1, :3][list(a)], values[1, 3:][list(b)]])]))[0, 1]
        for a in permutations(range(3))
        for b in permutations(range(3))
    ]
    mean, variance = pooled_spearman_null(values, group)
    assert np.isclose(np.mean(every), mean[0, 1])
    assert np.isclose(np.var(every), variance[0, 1])
