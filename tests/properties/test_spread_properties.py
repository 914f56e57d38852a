"""What must hold of measures of spread, overlap and divergence whatever the numbers, beside the definitions written as loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.routing.balance.measures import MEASURES, batch_loads, chance_levels, chance_loads, load_measures
from moescope.routing.comparison.set_overlap import overlap, random_floor, weighted_overlap
from moescope.routing.specialization.chance_pairs import chance_pairs
from moescope.routing.specialization.divergence import distribution, divergence_bits, entropy_bits

loads = st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any)


def _by_loop(counts: list[int], starved: float) -> dict[str, float]:
    """The measures as their definitions read."""
    n, total = len(counts), sum(counts)
    mean = total / n
    shares = [count / total for count in counts]
    entropy = -sum(share * math.log(share) for share in shares if share)
    return {
        "CV": math.sqrt(sum((count - mean) ** 2 for count in counts) / n) / mean,
        "max ÷ mean": max(counts) / mean,
        "MaxVio": max(counts) / mean - 1,
        "normalised entropy": entropy / math.log(n),
        "effective experts": math.exp(entropy),
        "Jain's index": total**2 / (n * sum(count**2 for count in counts)),
        "experts used": sum(count > 0 for count in counts) / n,
        "dead experts": sum(count == 0 for count in counts) / n,
        "starved experts": sum(count / mean < starved for count in counts) / n,
    }


@given(loads, st.sampled_from([0.05, 0.1, 0.5]))
def test_measures_of_load_equal_their_definitions(counts: list[int], starved: float) -> None:
    found = load_measures(np.array(counts), starved=starved)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(_by_loop(counts, starved))


@given(loads, st.integers(2, 50), st.randoms(use_true_random=False))
def test_measures_of_load_know_neither_names_nor_scale(counts: list[int], factor: int, dice: Any) -> None:
    changed = [factor * count for count in counts]
    dice.shuffle(changed)
    for name, value in load_measures(np.array(changed)).items():
        assert float(value) == pytest.approx(float(load_measures(np.array(counts))[name]), abs=1e-9), name
        _, low, high = MEASURES[name]
        assert low - 1e-9 <= float(value) <= high + 1e-9, name


def test_the_bounds_of_measures_are_those_of_an_even_load_and_of_one_expert_that_takes_all() -> None:
    even, single = load_measures(np.full(8, 5.0)), load_measures(np.eye(8)[0])
    for name, value in {"CV": 0, "max ÷ mean": 1, "MaxVio": 0, "dead experts": 0, "starved experts": 0}.items():
        assert even[name] == MEASURES[name][1] == value, name
    for name in ("normalised entropy", "Jain's index", "experts used"):
        assert even[name] == pytest.approx(MEASURES[name][2]) == 1, name
    assert single["effective experts"] == MEASURES["effective experts"][1] == 1
    assert single["normalised entropy"] == MEASURES["normalised entropy"][1] == 0
    most = load_measures(np.eye(10_000)[0])
    for name, limit in {"dead experts": 1, "starved experts": 1, "experts used": 0, "Jain's index": 0}.items():
        assert most[name] == pytest.approx(limit, abs=1e-3), name
        assert limit in MEASURES[name][1:], name


def test_measures_of_load_are_undefined_where_nothing_was_chosen_and_whole_for_one_expert() -> None:
    assert all(np.isnan(value) for value in load_measures(np.zeros(4)).values())
    one = {name: float(value) for name, value in load_measures(np.array([7.0])).items()}
    assert one["normalised entropy"] == one["max ÷ mean"] == one["Jain's index"] == one["experts used"] == 1.0
    assert one["CV"] == one["MaxVio"] == one["dead experts"] == one["starved experts"] == 0.0


def test_an_expert_is_starved_below_a_tenth_of_its_share_unless_said_otherwise() -> None:
    nearly = np.array([10.0, 99.0, 891.0, 3000.0])  # of the mean 1000: 0.01, 0.099, 0.891, 3
    assert float(load_measures(nearly)["starved experts"]) == 0.5


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True), min_size=1, max_size=20),
    st.integers(1, 25),
)
def test_loads_of_batches_count_each_whole_batch(decisions: list[list[int]], batch: int) -> None:
    found = batch_loads(np.array(decisions), 5, batch)
    size = min(batch, len(decisions))
    expected = [
        [sum(row.count(expert) for row in decisions[start : start + size]) for expert in range(5)]
        for start in range(0, len(decisions) - size + 1, size)
    ]
    assert found.tolist() == expected


@given(st.integers(0, 200), st.integers(1, 6), st.integers(0, 5), st.integers(0, 99))
def test_chance_loads_keep_their_margins(tokens: int, experts: int, more: int, seed: int) -> None:
    k = min(experts, 1 + more)
    found = chance_loads(tokens, experts, k, draws=7, seed=seed)
    assert found.shape == (7, experts)
    assert (found.sum(1) == tokens * k).all()
    assert (found >= 0).all()
    assert (found <= tokens).all()


def test_chance_loads_vary_as_hypergeometric_draws_do() -> None:
    """Each expert's load is binomial(tokens, k ÷ E); two experts' covariance is tokens · (k(k−1)/(E(E−1)) − k²/E²)."""
    tokens, experts, k = 400, 5, 2
    found = chance_loads(tokens, experts, k, draws=40_000, seed=3).astype(float)
    assert found.mean(0) == pytest.approx(np.full(experts, tokens * k / experts), rel=0.003)
    assert found.var(0) == pytest.approx(np.full(experts, tokens * 0.4 * 0.6), rel=0.05)
    pairs = np.cov(found.T)[np.triu_indices(experts, 1)]
    assert pairs == pytest.approx(np.full(10, tokens * (2 / 20 - 4 / 25)), rel=0.08)


def test_chance_levels_lie_in_their_own_spread() -> None:
    levels = chance_levels(500, 8, 2, starved=0.1, draws=200, seed=0)
    drawn = load_measures(chance_loads(500, 8, 2, draws=200, seed=0), starved=0.1)
    for name, (mean, low, high) in levels.items():
        assert mean == pytest.approx(drawn[name].mean())
        assert (low, high) == pytest.approx(tuple(np.quantile(drawn[name], [0.025, 0.975])))


rows_of_counts = st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any), min_size=2, max_size=5)


@given(rows_of_counts)
def test_divergence_is_symmetric_bounded_and_0_for_equals(rows: list[list[int]]) -> None:
    p = distribution(np.array(rows, float))
    assert p.sum(-1) == pytest.approx(np.ones(len(rows)))
    found = float(divergence_bits(p))
    entropies = [-sum(x * math.log2(x) for x in row if x) for row in p.tolist()]
    mean = [sum(column) / len(rows) for column in zip(*p.tolist(), strict=True)]
    assert entropy_bits(p).tolist() == pytest.approx(entropies)
    assert found == pytest.approx(-sum(x * math.log2(x) for x in mean if x) - sum(entropies) / len(rows), abs=1e-9)
    assert 0 <= found <= math.log2(len(rows)) + 1e-9
    assert float(divergence_bits(p[::-1])) == pytest.approx(found, abs=1e-12)
    assert float(divergence_bits(np.stack([p[0]] * 3))) == pytest.approx(0, abs=1e-9)
    assert float(entropy_bits(p[0])) <= 2 + 1e-9


def test_a_distribution_of_nothing_is_zeros() -> None:
    assert distribution(np.array([[0.0, 0.0], [1.0, 3.0]])).tolist() == [[0.0, 0.0], [0.25, 0.75]]


@given(st.data())
def test_overlap_is_that_of_sets(data: Any) -> None:
    first, second = (
        data.draw(st.lists(st.lists(st.integers(0, 6), min_size=k, max_size=k, unique=True), min_size=3, max_size=3))
        for k in (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    )
    found = overlap(np.array(first, np.uint16), np.array(second, np.uint16)).tolist()
    assert found == [len(set(a) & set(b)) for a, b in zip(first, second, strict=True)]
    w, v = (np.array([[data.draw(st.integers(1, 9)) for _ in row] for row in ids], float) for ids in (first, second))
    shared = weighted_overlap(np.array(first, np.uint16), w, np.array(second, np.uint16), v)
    for row in range(3):
        mine = dict(zip(first[row], w[row] / w[row].sum(), strict=True))
        theirs = dict(zip(second[row], v[row] / v[row].sum(), strict=True))
        assert shared[row] == pytest.approx(sum(min(mine[e], theirs.get(e, 0.0)) for e in mine), abs=1e-6)
    assert (shared <= 1 + 1e-6).all()


def test_overlap_counts_more_experts_than_a_byte_holds_and_knows_no_weights() -> None:
    ids = np.arange(300, dtype=np.uint16)[None]
    assert overlap(ids, ids).tolist() == [300]
    one = np.array([[1, 2]], np.uint16)
    assert np.isnan(weighted_overlap(one, np.zeros((1, 2)), one, np.ones((1, 2)))).all()


@pytest.mark.parametrize(("experts", "k", "other"), [(5, 2, 2), (5, 2, 3), (4, 3, 3), (6, 1, 4), (3, 3, 3)])
def test_the_floor_of_random_choices_is_the_mean_over_all_of_them(experts: int, k: int, other: int) -> None:
    both = list(
        itertools.product(itertools.combinations(range(experts), k), itertools.combinations(range(experts), other))
    )
    shared = [(len(set(a) & set(b)), len(set(a) | set(b))) for a, b in both]
    jaccard = sum(inside / all_ for inside, all_ in shared) / len(both)
    expected = {
        "agreement": sum(set(a) == set(b) for a, b in both) / len(both),
        "top-1 agreement": 1 / experts,
        "saturation": sum(inside for inside, _ in shared) / len(both) / other,
        "Jaccard": jaccard,
        "selection shift": 1 - jaccard,
    }
    assert dict(random_floor(experts, k, other)) == pytest.approx(expected)


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=6), st.integers(2, 3))
def test_chance_pairs_are_those_of_draws_with_the_same_loads(odds: list[float], k: int) -> None:
    """Conditional Poisson draws enumerated: the loads that they have lead back to their pairs."""
    k = min(k, len(odds) - 1)
    sets = list(itertools.combinations(range(len(odds)), k))
    weight = np.exp([sum(odds[e] for e in chosen) for chosen in sets])
    weight /= weight.sum()
    share, joint = np.zeros(len(odds)), np.zeros((len(odds),) * 2)
    for chosen, p in zip(sets, weight, strict=True):
        for a in chosen:
            share[a] += p
            for b in chosen:
                joint[a, b] += p * (a != b)
    found = chance_pairs(share, k)
    assert found == pytest.approx(joint, abs=1e-6)
    assert found.sum(1) == pytest.approx((k - 1) * share, abs=1e-6)


def test_chance_pairs_with_an_expert_of_every_token_and_one_of_none() -> None:
    share = np.array([1.0, 0.5, 0.5, 0.0])
    assert chance_pairs(share, 2).tolist() == [[0, 0.5, 0.5, 0], [0.5, 0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0]]
    both = chance_pairs(np.array([1.0, 1.0, 0.25, 0.75]), 3)
    assert both.tolist() == [[0, 1, 0.25, 0.75], [1, 0, 0.25, 0.75], [0.25, 0.25, 0, 0], [0.75, 0.75, 0, 0]]
