"""What must hold of ratios, ranks, fits and tests whatever the numbers, beside SciPy's answers and enumerations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from moescope.core.statistics import bootstrap_ratio, document_weights
from moescope.routing.effects.document_p_values import ratio_p, rho_interval
from moescope.routing.importance.rank_correlation import (
    kendall,
    kendall_null,
    pooled_spearman_null,
    ranks,
    spearman,
    spearman_null,
)
from moescope.routing.pathways.estimates import estimate, mean_by_document, quotient
from moescope.routing.pathways.path_codes import path_codes
from moescope.routing.pathways.power_law import fit_power_law
from moescope.routing.serving.replicas import copies_of_hottest, copies_of_random, spread
from moescope.routing.specialization.resampling import centred_interval, drawn_beyond_once, linearised_interval

documents = st.lists(st.tuples(st.integers(-20, 20), st.integers(1, 9)), min_size=2, max_size=12)
rankings = st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=2, max_size=3)


@given(documents, st.integers(2, 9))
def test_an_interval_scales_with_what_it_measures_and_stays_within_documents(
    pairs: list[tuple[int, int]], factor: int
) -> None:
    top, bottom = (np.array(part, float) for part in zip(*pairs, strict=True))
    found, low, high = bootstrap_ratio(top, bottom, draws=50)
    assert float(found) == pytest.approx(top.sum() / bottom.sum())
    assert low <= high
    assert (top / bottom).min() - 1e-9 <= low
    assert high <= (top / bottom).max() + 1e-9
    scaled = [float(x) for x in bootstrap_ratio(factor * top, bottom, draws=50)]
    assert scaled == pytest.approx([factor * float(x) for x in (found, low, high)])


@given(documents, st.integers(0, 50))
def test_an_estimate_leaves_out_documents_without_size(pairs: list[tuple[int, int]], seed: int) -> None:
    top, bottom = (np.array(part, float) for part in zip(*pairs, strict=True))
    padded = estimate(np.append(top, 5.0), np.append(bottom, 0.0), draws=50, seed=seed)
    assert padded == estimate(top, bottom, draws=50, seed=seed)
    assert padded["value"] == pytest.approx(top.sum() / bottom.sum())
    alone = estimate(np.array([3.0]), np.array([4.0]), draws=5, seed=0)
    assert alone == {"value": 0.75, "ci_low": None, "ci_high": None}


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5) | st.just(math.nan)), min_size=1, max_size=20))
def test_a_mean_by_document_is_the_mean_of_what_is_known(pairs: list[tuple[int, float]]) -> None:
    known = [value for _, value in pairs if not math.isnan(value)]
    assume(known)
    document, values = np.array([d for d, _ in pairs]), np.array([v for _, v in pairs])
    assert mean_by_document(values, document, draws=5, seed=0)["value"] == pytest.approx(
        sum(known) / len(known), abs=1e-12
    )


def test_the_interval_of_a_mean_by_document_draws_documents_and_not_values() -> None:
    values, document = np.array([1.0, 2.0, 3.0, math.nan, 10.0, 0.0]), np.array([0, 0, 0, 0, 2, 2])
    found = mean_by_document(values, document, draws=200, seed=3)
    by_hand = bootstrap_ratio(np.array([6.0, 10.0]), np.array([3.0, 2.0]), draws=200, seed=3)
    assert list(found.values()) == pytest.approx([float(part) for part in by_hand])
    nothing = mean_by_document(np.array([]), np.array([], np.int64), draws=5, seed=0)
    assert set(nothing.values()) == {None}


def test_a_quotient_over_nothing_is_unknown() -> None:
    assert quotient(np.array([3.0, 1.0]), np.array([2.0, 4.0])).tolist() == [1.5, 0.25]
    assert np.isnan(quotient(np.array([1.0, 1.0]), np.array([0.0, -1.0]))).all()


@given(rankings)
def test_rank_correlations_are_those_of_scipy(rows: list[list[int]]) -> None:
    values = np.array(rows, float)
    assert ranks(values).tolist() == [stats.rankdata(row).tolist() for row in rows]
    for ours, theirs in ((spearman, stats.spearmanr), (kendall, stats.kendalltau)):
        found = ours(values)
        for a, b in itertools.product(range(len(rows)), repeat=2):
            if len(set(rows[a])) == 1 or len(set(rows[b])) == 1:
                assert np.isnan(found[a, b])
            else:
                assert found[a, b] == pytest.approx(theirs(rows[a], rows[b]).statistic, abs=1e-6)


@given(
    st.lists(
        st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(lambda row: len(set(row)) > 1),
        min_size=2,
        max_size=2,
    )
)
def test_what_permuted_ranks_give_is_the_mean_over_all_permutations(rows: list[list[int]]) -> None:
    values = np.array(rows, float)
    for null, ours in ((spearman_null, spearman), (kendall_null, kendall)):
        every = [
            ours(np.array([rows[0], [rows[1][i] for i in order]], float))[0, 1]
            for order in itertools.permutations(range(4))
        ]
        mean, variance = null(values)
        assert mean[0, 1] == pytest.approx(np.mean(every), abs=1e-6)
        assert variance[0, 1] == pytest.approx(np.var(every), abs=1e-5)


@given(
    st.lists(
        st.lists(st.integers(0, 3), min_size=5, max_size=5).filter(lambda row: len(set(row)) > 1),
        min_size=2,
        max_size=2,
    )
)
def test_what_ranks_permuted_inside_groups_give_is_the_mean_over_all_of_those(rows: list[list[int]]) -> None:
    group = np.array([0, 1, 0, 1, 1])
    every = []
    for two, three in itertools.product(itertools.permutations((0, 2)), itertools.permutations((1, 3, 4))):
        order = np.empty(5, int)
        order[[0, 2]], order[[1, 3, 4]] = two, three
        every.append(spearman(np.array([rows[0], np.array(rows[1])[order]], float))[0, 1])
    mean, variance = pooled_spearman_null(np.array(rows, float), group)
    assert mean[0, 1] == pytest.approx(np.mean(every), abs=1e-9)
    assert variance[0, 1] == pytest.approx(np.var(every), abs=1e-9)


def test_permuted_ranks_of_one_or_two_items() -> None:
    for null in (spearman_null, kendall_null):
        mean, variance = null(np.array([[1.0], [2.0]]))
        assert (mean == 0).all()
        assert np.isnan(variance).all()
        assert null(np.array([[1.0, 2.0], [2.0, 1.0]]))[1].tolist() == [[1.0, 1.0], [1.0, 1.0]]


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=12).filter(lambda x: len(set(x)) > 1))
def test_p_of_a_mean_over_equal_documents_is_student_s(values: list[int]) -> None:
    found = ratio_p(np.array(values, float)[:, None], np.ones((len(values), 1)))
    assert found[0] == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue, abs=1e-9)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 5)), min_size=2, max_size=8))
def test_p_of_a_ratio_is_that_of_its_linearised_variance(pairs: list[tuple[int, int]]) -> None:
    top, size = (np.array(part, float) for part in zip(*pairs, strict=True))
    ratio, count = top.sum() / size.sum(), len(pairs)
    error = math.sqrt(count / (count - 1) * ((top - ratio * size) ** 2).sum()) / size.sum()
    assume(error > 1e-9)
    padded = ratio_p(np.append(top, 0.0)[:, None], np.append(size, 0.0)[:, None])
    assert padded[0] == pytest.approx(2 * stats.t.sf(abs(ratio / error), count - 1), abs=1e-9)


def test_p_where_nothing_varies() -> None:
    totals = np.array([[2.0, 0.0, 5.0], [2.0, 0.0, 0.0]])
    found = ratio_p(totals, np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]))
    assert found[:2].tolist() == [0.0, 1.0]
    assert np.isnan(found[2])


@given(st.floats(-1, 1), st.integers(4, 500))
def test_the_interval_of_a_rank_correlation_holds_it_and_mirrors(rho: float, n: int) -> None:
    low, high = rho_interval(rho, n)
    most = 1 - 6 / (n * (n * n - 1))
    assert -1 <= low <= min(max(rho, -most), most) <= high <= 1
    assert rho_interval(-rho, n) == pytest.approx((-high, -low))
    spread_ = 1.959964 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    assert math.atanh(low) == pytest.approx(math.atanh(min(max(rho, -most), most)) - spread_, abs=1e-4)


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=12))
def test_codes_of_paths_are_equal_where_paths_are(paths: list[list[int]]) -> None:
    for size in (3, 1 << 31):  # the second does not fit into one number
        codes = path_codes([np.array(column) for column in zip(*paths, strict=True)], [size] * 3).tolist()
        for (a, one), (b, other) in itertools.combinations(zip(codes, paths, strict=True), 2):
            assert (a == b) == (one == other)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=12))
def test_codes_that_fit_are_the_places_of_paths_in_an_array(paths: list[tuple[int, int, int]]) -> None:
    columns = [np.array(column) for column in zip(*paths, strict=True)]
    codes = path_codes(columns, (3, 5, 2))
    assert codes.dtype == np.int64
    assert codes.tolist() == np.ravel_multi_index(tuple(columns), (3, 5, 2)).tolist()


@given(
    st.lists(st.lists(st.sampled_from([0, 1, 2**30, 2**31 - 1]), min_size=5, max_size=5), min_size=1, max_size=12),
    st.sampled_from([2**31, 2**32 - 1, 2**40]),
)
def test_codes_tell_paths_apart_that_no_whole_number_has_room_for(paths: list[list[int]], size: int) -> None:
    codes = path_codes([np.array(column) for column in zip(*paths, strict=True)], [size] * 5)
    assert codes.dtype == np.int64
    assert len(np.unique(codes)) == len(set(map(tuple, paths)))


@given(st.lists(st.integers(1, 40), min_size=2, max_size=40), st.integers(1, 3))
def test_a_power_law_is_the_published_estimate(counts: list[int], least: int) -> None:
    kept = [count for count in counts if count >= least]
    found = fit_power_law(np.array(counts), least)
    if len(kept) < 2 or len(set(kept)) < 2:
        assert found is None
        return
    assert found is not None
    exponent = 1 + len(kept) / sum(math.log(count / (least - 0.5)) for count in kept)
    assert (found.exponent, found.n, found.x_min) == (pytest.approx(exponent), len(kept), least)
    from scipy.special import zeta

    gaps = []
    for x in set(kept):
        for edge, at in ((sum(c <= x for c in kept) / len(kept), x + 1), (sum(c < x for c in kept) / len(kept), x)):
            gaps.append(abs(edge - (1 - zeta(exponent, at) / zeta(exponent, least))))
    assert found.distance == pytest.approx(max(gaps), abs=1e-9)


def test_the_smallest_count_of_a_fit_is_that_of_least_distance() -> None:
    drawn = np.random.default_rng(0).zipf(2.2, 400)
    counts = np.concatenate([drawn[drawn < 10_000], np.full(60, 1)])
    best = fit_power_law(counts)
    tried = [fit_power_law(counts, int(x)) for x in np.unique(counts) if (counts >= x).sum() >= 25]
    assert best is not None
    assert best.distance == min(fit.distance for fit in tried if fit is not None)
    assert fit_power_law(np.array([3, 3, 3])) is None


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6), st.integers(0, 12))
def test_copies_go_to_who_has_most_for_each(counts: list[int], extra: int) -> None:
    loads = np.array(counts, float)
    expected = [1] * len(counts)
    for _ in range(extra):
        hottest = max(range(len(counts)), key=lambda e: (counts[e] / expected[e], -e))
        expected[hottest] += 1
    assert copies_of_hottest(loads, extra).tolist() == expected
    drawn = copies_of_random(len(counts), extra, np.random.default_rng(extra))
    assert drawn.sum() == len(counts) + extra
    assert (drawn >= 1).all()


def test_copies_share_the_load_of_their_expert() -> None:
    share = spread(np.array([8.0, 2.0, 2.0]), np.array([2, 1, 1]), 2)
    assert share.sum(1) == pytest.approx(np.ones(3))
    assert sorted(share[0].tolist()) in ([0.0, 1.0], [0.5, 0.5])
    assert set(share[1].tolist()) == set(share[2].tolist()) == {0.0, 1.0}


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=30), st.floats(-5, 5))
def test_a_centred_interval_holds_its_estimate_and_has_the_resamples_spread(drawn: list[float], value: float) -> None:
    low, high = centred_interval(np.array(value), np.array(drawn))
    quantiles = np.quantile(drawn, [0.025, 0.975]) - np.mean(drawn)
    assert low <= value <= high
    assert float(low) == pytest.approx(min(value, value + quantiles[0]))
    assert float(high) == pytest.approx(max(value, value + quantiles[1]))


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(0, 2))
def test_a_linearised_interval_is_that_of_the_weighted_sum(influence: list[float], value: float) -> None:
    drawn = drawn_beyond_once(len(influence), draws=100, seed=2)
    assert (drawn + 1 == document_weights(len(influence), draws=100, seed=2)).all()
    moved = [sum(w * i for w, i in zip(row, influence, strict=True)) for row in drawn.tolist()]
    low, high = linearised_interval(np.array(value), np.array(influence), drawn, most=2.5)
    down, up = np.quantile(moved, [0.025, 0.975])
    assert float(low) == pytest.approx(max(0.0, value + min(down, 0.0)), abs=1e-9)
    assert float(high) == pytest.approx(min(2.5, value + max(up, 0.0)), abs=1e-9)
    assert np.isnan(linearised_interval(np.array(1.0), np.array([0.5]), np.zeros((3, 1)))).all()
