"""The rules one by one: definitions, ties, closed forms, the exact optimum of balanced assignment."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moescope.core.errors import InputError
from moescope.routing.counterfactuals import assignments, thresholds
from moescope.routing.counterfactuals.assignments import dual_bound
from moescope.routing.counterfactuals.auction_kernels import auction

NO_IDS = np.zeros(0, np.int32)


def _softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return (shifted / shifted.sum(1, keepdims=True)).astype(np.float32)


def _logits(seed: int, tokens: int, experts: int, *, coarse: bool = False) -> NDArray[np.float32]:
    found = np.random.default_rng(seed).normal(size=(tokens, experts))
    return (np.round(found) if coarse else found).astype(np.float32)


def _ranked(values: NDArray[Any]) -> list[int]:
    return sorted(range(len(values)), key=lambda expert: (-values[expert], expert))


shapes = st.tuples(st.integers(0, 99), st.integers(1, 6), st.sampled_from([1, 2, 5, 8, 256]), st.booleans())


@given(shape=shapes, value=st.floats(0.0625, 1, width=16))
def test_top_p_takes_the_fewest_experts_that_reach_p(shape: tuple[int, int, int, bool], value: float) -> None:
    logits = _logits(*shape[:3], coarse=shape[3])
    shares, rule = _softmax(logits), thresholds.TopP()
    chosen = rule.choose(logits, shares, rule.limit(value))
    for token, row in enumerate(shares):
        mass, expected = 0.0, set()
        for expert in _ranked(row):
            expected.add(expert)
            mass += float(row[expert])
            if mass >= value:
                break
        assert set(np.flatnonzero(chosen[token])) == expected


@given(shape=shapes, value=st.floats(0, 1, width=16))
def test_ratio_and_gap_compare_with_the_largest(shape: tuple[int, int, int, bool], value: float) -> None:
    logits = _logits(*shape[:3], coarse=shape[3])
    shares = _softmax(logits)
    ratio, gap = thresholds.Ratio(), thresholds.Gap()
    by_ratio = ratio.choose(logits, shares, ratio.limit(value))
    by_gap = gap.choose(logits, shares, gap.limit(value))
    for token, row in enumerate(shares):
        for expert, share in enumerate(row):
            assert by_ratio[token, expert] == (share / row.max() >= value)
            assert by_gap[token, expert] == (row.max() - share <= value)


@given(shape=shapes, value=st.floats(-2, 2, width=16), data=st.data())
def test_null_experts_push_out_what_lies_below_them(
    shape: tuple[int, int, int, bool], value: float, data: st.DataObject
) -> None:
    logits = _logits(*shape[:3], coarse=shape[3])
    slots = data.draw(st.integers(1, logits.shape[1]))
    nulls = data.draw(st.integers(1, slots + 1))
    rule = thresholds.NullExperts(slots, nulls)
    chosen = rule.choose(logits, _softmax(logits), rule.limit(value))
    for token, row in enumerate(logits):
        competitors = [(-float(row[expert]), 0, expert) for expert in range(len(row))]
        competitors += [(-value, 1, -1)] * nulls
        expected = {expert for _, null, expert in sorted(competitors)[:slots] if not null}
        assert set(np.flatnonzero(chosen[token])) == expected


@pytest.mark.parametrize(
    "rule", [thresholds.TopP(), thresholds.Ratio(), thresholds.Gap(), thresholds.NullExperts(4, 4)]
)
@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_tuned_limit_gives_the_wanted_mean(rule: thresholds.ThresholdRule, wanted: int) -> None:
    logits = _logits(0, 500, 8)
    shares = _softmax(logits)
    limit = thresholds.tuned_limit(rule.costs(logits, shares), wanted * len(logits))
    chosen = rule.choose(logits, shares, limit)
    if wanted == 1 and not isinstance(rule, thresholds.NullExperts):
        assert (chosen.sum(1) == 1).all()
    assert chosen.sum() == pytest.approx(wanted * len(logits), abs=1)
    again = rule.choose(logits, shares, rule.limit(rule.value(limit)))
    assert (again == chosen).all()


@given(shape=shapes, data=st.data())
def test_choices_are_the_costs_up_to_the_limit(shape: tuple[int, int, int, bool], data: st.DataObject) -> None:
    logits = _logits(*shape[:3], coarse=shape[3])
    shares = _softmax(logits)
    slots = data.draw(st.integers(1, logits.shape[1]))
    rules = [thresholds.TopP(), thresholds.Ratio(), thresholds.Gap(), thresholds.NullExperts(slots, slots)]
    for rule in rules:
        costs = rule.costs(logits, shares)
        limit = float(data.draw(st.sampled_from(np.unique(costs[np.isfinite(costs)]).tolist())))
        assert (rule.choose(logits, shares, limit) == (costs <= limit)).all()


@pytest.mark.parametrize(
    ("rule", "value"),
    [(thresholds.TopP(), 0.0), (thresholds.TopP(), 1.1), (thresholds.Ratio(), 2.0), (thresholds.Gap(), -1)],
)
def test_impossible_thresholds_are_refused(rule: thresholds.ThresholdRule, value: float) -> None:
    with pytest.raises(InputError):
        rule.limit(value)


@given(shape=shapes, data=st.data())
def test_expert_choice_fills_every_expert_with_its_best_tokens(
    shape: tuple[int, int, int, bool], data: st.DataObject
) -> None:
    logits = _logits(*shape[:3], coarse=shape[3])
    tokens, experts = logits.shape
    top_k, window = data.draw(st.integers(1, min(experts, 8))), data.draw(st.integers(1, 7))
    shares = _softmax(logits)
    chosen = assignments.ExpertChoice(top_k, window).choose(logits, shares, NO_IDS)
    assert chosen.sum() == tokens * top_k
    for start in range(0, tokens, window):
        here = range(start, min(start + window, tokens))
        for expert in range(experts):
            room = (expert + 1) * len(here) * top_k // experts - expert * len(here) * top_k // experts
            best = sorted(here, key=lambda token: (-shares[token, expert], token))[:room]
            assert set(start + np.flatnonzero(chosen[here, expert])) == set(best)


@given(shape=shapes, data=st.data())
def test_balanced_assignment_is_balanced_and_optimal(shape: tuple[int, int, int, bool], data: st.DataObject) -> None:
    """k = 1: scipy's exact assignment to as many copies of each expert as it has places."""
    logits = _logits(*shape[:3], coarse=shape[3])
    tokens, experts = logits.shape
    chosen = assignments.Balanced(1, tokens).choose(logits, logits, NO_IDS)
    room = assignments.capacities(tokens, experts, 1)
    assert (chosen.sum(0) == room).all()
    assert (chosen.sum(1) == 1).all()
    copies = np.repeat(logits, room, axis=1)
    rows, columns = linear_sum_assignment(copies, maximize=True)
    assert logits[chosen].sum() >= copies[rows, columns].sum() - tokens * assignments.BID_STEP - 1e-4


@given(seed=st.integers(0, 99), tokens=st.integers(1, 4), coarse=st.booleans())
def test_balanced_assignment_of_two_experts_equals_trying_all(seed: int, tokens: int, coarse: bool) -> None:
    logits = _logits(seed, tokens, 4, coarse=coarse)
    room, prices = assignments.capacities(tokens, 4, 2), np.zeros(4)
    chosen = auction(logits, room, 2, prices, 1e-4)
    assert (chosen.sum(0) == room).all()
    assert (chosen.sum(1) == 2).all()
    pairs = list(itertools.combinations(range(4), 2))
    best = -np.inf
    for picks in itertools.product(pairs, repeat=tokens):
        load = [sum(expert in pick for pick in picks) for expert in range(4)]
        if load == room.tolist():
            best = max(best, sum(float(logits[token, list(pick)].sum()) for token, pick in enumerate(picks)))
    assert float(logits[chosen].sum()) == pytest.approx(best, abs=2e-4 * tokens + 1e-5)
    assert dual_bound(logits, room, 2, prices) >= best - 1e-4


def test_balanced_assignment_of_windows_lies_within_its_step_of_the_bound() -> None:
    rule = assignments.Balanced(4, 100)
    logits = _logits(0, 300, 16) + np.linspace(0, 2, 16, dtype=np.float32)
    chosen = rule.choose(logits, logits, NO_IDS)
    for start in (0, 100, 200):
        assert set(chosen[start : start + 100].sum(0)) == {25}
    assert rule.reached == pytest.approx(float(logits[chosen].sum()), rel=1e-5)
    assert 0 <= rule.bound - rule.reached <= 1200 * assignments.BID_STEP


@given(shape=shapes, data=st.data())
def test_grouped_takes_the_best_of_each_group(shape: tuple[int, int, int, bool], data: st.DataObject) -> None:
    logits = _logits(*shape[:3], coarse=shape[3])
    experts = logits.shape[1]
    top_k = data.draw(st.integers(1, min(experts, 8)))
    chosen = assignments.Grouped(top_k).choose(logits, logits, NO_IDS)
    for token, row in enumerate(logits):
        expected = set()
        for group in range(top_k):
            members = range(group * experts // top_k, (group + 1) * experts // top_k)
            expected.add(max(members, key=lambda expert: (row[expert], -expert)))
        assert set(np.flatnonzero(chosen[token])) == expected


def test_hash_depends_on_the_id_alone_and_spreads_over_experts() -> None:
    ids = np.arange(4000, dtype=np.int32)
    logits = np.zeros((4000, 8), np.float32)
    chosen = assignments.Hash(2, 0).choose(logits, logits, ids)
    assert (chosen.sum(1) == 2).all()
    some = assignments.Hash(2, 0).choose(logits[:3], logits[:3], np.array([7, 7, 3999], np.int32))
    assert (some == chosen[[7, 7, 3999]]).all()
    assert chosen.mean(0) == pytest.approx([0.25] * 8, abs=0.03)
    assert (assignments.Hash(2, 2**40).choose(logits, logits, ids) != chosen).any()
