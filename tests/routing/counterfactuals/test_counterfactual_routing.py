"""Counterfactual routing: what is said of the rules' decisions, against loops, controls and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
RULES = ("top_p", "ratio", "gap", "null", "expert_choice", "balanced", "grouped", "hash")
NAME = "counterfactual_routing"


def _top(logits: NDArray[Any], top_k: int) -> NDArray[Any]:
    return np.argsort(-logits, axis=1, kind="stable")[:, :top_k]


def _router(planted: ModuleType, logits: NDArray[Any], top_k: int, **fields: Any) -> Any:
    return planted.Router(_top(logits, top_k), logits.shape[1], logits=logits, **fields)


def _random(seed: int, tokens: int, experts: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(tokens, experts)).astype(np.float32)


def _of(frame: pd.DataFrame, metric: str, column: str = "value", **where: Any) -> float:
    part = frame[frame["metric"] == metric]
    for name, value in where.items():
        part = part[part[name] == value]
    assert len(part) == 1
    return float(part[column].iloc[0])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_k_experts_a_token_on_average(plant: Plant, planted: ModuleType, rule: str) -> None:
    routers = [_router(planted, _random(layer, 240, 8), 2, layer=layer) for layer in range(2)]
    frame = analyze(plant(lengths=[20] * 12, routers=routers), NAME, rule=rule, window=60).df()
    size = frame[frame["metric"] == "experts per token"]
    assert (size["recorded"] == 2).all()
    assert float(np.average(size["value"], weights=size["n"])) == pytest.approx(2, abs=0.005)


def test_one_threshold_a_layer_gives_every_layer_k(plant: Plant, planted: ModuleType) -> None:
    routers = [_router(planted, _random(layer, 200, 8) * (1 + layer), 2, layer=layer) for layer in range(3)]
    run = plant(lengths=[20] * 10, routers=routers)
    together = analyze(run, NAME).df().query("metric == 'experts per token'")["value"]
    each = analyze(run, NAME, tune="layer").df()
    assert each.query("metric == 'experts per token'")["value"].tolist() == pytest.approx([2] * 3, abs=0.01)
    assert together.max() - together.min() > 0.3
    assert len(each[each["metric"] == "threshold p"]) == 3


def test_uniform_logits_need_a_share_p_of_all_experts(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[5, 5], routers=[_router(planted, np.zeros((10, 8)), 2)])
    for value, expected in ((0.125, 1), (0.13, 2), (0.5, 4), (1.0, 8)):
        assert _of(analyze(run, NAME, value=value).df(), "experts per token") == expected


def test_rule_that_decides_alike_agrees_wholly(plant: Plant, planted: ModuleType) -> None:
    """Two experts of 0.4 each and six of 0.2 ÷ 6: p = 0.5 takes the two, as the top-2 did."""
    generator = np.random.default_rng(0)
    logits = np.full((40, 8), math.log(0.2 / 6))
    for row in logits:
        row[generator.permutation(8)[:2]] = math.log(0.4)
    result = analyze(plant(lengths=[10] * 4, routers=[_router(planted, logits, 2)]), NAME)
    frame = result.df()
    for metric in ("agreement", "Jaccard", "score kept"):
        assert _of(frame, metric) == pytest.approx(1)
    assert _of(frame, "agreement", "null") == pytest.approx(0.25, abs=0.05)
    assert _of(frame, "tokens with m experts") == 1
    assert "keep 100.0% of decisions" in result.title


def test_grouped_agrees_where_the_top_experts_lie_in_different_groups(plant: Plant, planted: ModuleType) -> None:
    logits = np.tile([9.0, 8.0, 0.0, 0.0], (6, 1))
    logits[3:] = [9.0, 0.0, 8.0, 0.0]
    frame = analyze(plant(lengths=[3, 3], routers=[_router(planted, logits, 2)]), NAME, rule="grouped").df()
    assert _of(frame, "agreement") == pytest.approx(0.75)
    assert _of(frame, "Jaccard") == pytest.approx((1 / 3 + 1) / 2)


def test_balanced_and_expert_choice_load_all_experts_alike(plant: Plant, planted: ModuleType) -> None:
    logits = _random(0, 128, 8) + np.linspace(0, 3, 8)
    run = plant(lengths=[64, 64], routers=[_router(planted, logits, 2)])
    for rule in ("balanced", "expert_choice"):
        frame = analyze(run, NAME, rule=rule, window=64).df()
        assert _of(frame, "largest load") == pytest.approx(1)
        assert _of(frame, "largest load", "recorded") > 1.5
        assert 0.25 < _of(frame, "agreement") < 1


def test_balanced_price_is_stated_with_its_bound(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[64, 64], routers=[_router(planted, _random(0, 128, 8), 2)])
    result = analyze(run, NAME, rule="balanced", window=32, windows=2)
    assert result.n == 64
    assert any("no balanced ones could exceed" in note for note in result.notes)


@given(data=st.data())
def test_comparison_equals_a_loop_over_tokens(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    tokens = sum(lengths)
    labels = data.draw(st.lists(st.sampled_from(["a", "b", None]), min_size=len(lengths), max_size=len(lengths)))
    experts = data.draw(st.sampled_from([1, 3, 8, 256]))
    top_k = data.draw(st.integers(1, min(experts, 3)))
    logits = _random(data.draw(st.integers(0, 99)), tokens, experts)
    value = data.draw(st.floats(0.0625, 1, width=16))
    router = _router(planted, logits, top_k)
    by = "label" if any(labels) else "layer"
    frame = analyze(plant(lengths=lengths, labels=labels, routers=[router]), NAME, value=value, by=by, draws=3).df()
    of_token = [label for label, length in zip(labels, lengths, strict=True) for _ in range(length)]
    for place in {label for label in of_token if label} if by == "label" else {None}:
        part = frame[frame["label"] == place] if by == "label" else frame
        members = [token for token in range(tokens) if of_token[token] == place or by == "layer"]
        size = kept = jaccard = mass = own = 0.0
        chosen_load, real_load = [0] * experts, [0] * experts
        for token in members:
            weights = np.exp(logits[token].astype(np.float64))
            weights /= weights.sum()
            chosen, total = set(), 0.0
            for expert in sorted(range(experts), key=lambda e: (-logits[token][e], e)):
                chosen.add(expert)
                total += weights[expert]
                if total >= value - 1e-6:
                    break
            real = {int(expert) for expert in router.experts[token]}
            size += len(chosen)
            kept += len(chosen & real)
            jaccard += len(chosen & real) / len(chosen | real)
            mass += sum(weights[expert] for expert in chosen)
            own += sum(weights[expert] for expert in real)
            for expert in range(experts):
                chosen_load[expert] += expert in chosen
                real_load[expert] += expert in real
        n = len(members)
        met = sum(a * b for a, b in zip(chosen_load, real_load, strict=True))
        assert _of(part, "experts per token") == pytest.approx(size / n)
        assert _of(part, "agreement") == pytest.approx(kept / (n * top_k))
        assert _of(part, "agreement", "null") == pytest.approx(met / (n * n * top_k))
        assert _of(part, "Jaccard") == pytest.approx(jaccard / n)
        assert _of(part, "score kept") == pytest.approx(mass / own, rel=1e-4)
        assert _of(part, "largest load") == pytest.approx(max(chosen_load) * experts / sum(chosen_load))
        assert _of(part, "largest load", "recorded") == pytest.approx(max(real_load) * experts / (n * top_k))


def test_agreement_by_chance_is_that_of_shuffled_tokens(plant: Plant, planted: ModuleType) -> None:
    """A hash table over ids that say nothing agrees no more than chance; both nulls tell the same."""
    generator = np.random.default_rng(4)
    logits = generator.normal(size=(2000, 8)) + np.linspace(0, 2, 8)
    ids = generator.integers(10_000, size=2000).tolist()
    run = plant(lengths=[100] * 20, ids=ids, routers=[_router(planted, logits, 2)])
    frame = analyze(run, NAME, rule="hash").df()
    row = frame[frame["metric"] == "agreement"].iloc[0]
    assert row["ci_low"] - 0.01 <= row["null"] <= row["ci_high"] + 0.01
    assert _of(frame, "Jaccard") == pytest.approx(_of(frame, "Jaccard", "null"), abs=0.02)


def test_hard_tokens_that_get_more_experts_correlate_with_nll(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(300) < 0.5
    logits = generator.normal(size=(300, 8)) * np.where(hard, 0.2, 4.0)[:, None]
    nll = np.r_[0.0, np.where(hard, 5.0, 1.0)[:-1]]  # of the token that follows a hard one
    run = plant(lengths=[30] * 10, nll=nll, routers=[_router(planted, logits, 2)])
    row = analyze(run, NAME).df().query("metric == 'correlation with NLL'").iloc[0]
    assert row["value"] > 0.7
    assert row["ci_low"] > 0.5
    assert row["n"] == 290
    flat = plant(lengths=[30] * 10, routers=[_router(planted, logits, 2)])
    assert "correlation with NLL" not in set(analyze(flat, NAME).df()["metric"])


def test_correlation_equals_numpys(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(1)
    logits, nll = _random(1, 60, 6), generator.exponential(size=60).astype(np.float32)
    run = plant(lengths=[60], nll=nll, routers=[_router(planted, logits, 2)])
    found = _of(analyze(run, NAME, value=0.6).df(), "correlation with NLL")
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    mass = np.cumsum(np.sort(shares, axis=1)[:, ::-1], axis=1)
    sizes = (mass < 0.6).sum(1) + 1
    assert found == pytest.approx(np.corrcoef(sizes[:-1], nll[1:])[0, 1], abs=1e-5)


def test_routers_whose_logits_do_not_decide_are_left_out_or_refused(plant: Plant, planted: ModuleType) -> None:
    logits = _random(0, 80, 8)
    rule = {"score": "softmax", "choice": "score", "bias": "correction", "groups": None}
    experts = _top(logits + np.linspace(0, 4, 8), 2)
    biased = planted.Router(experts, 8, layer=1, logits=logits, rule=rule)
    both = plant(lengths=[20] * 4, routers=[_router(planted, logits, 2), biased])
    result = analyze(both, NAME)
    assert set(result.df()["layer"].dropna()) == {0}
    assert any("left out: L1" in note for note in result.notes)
    alone = plant(lengths=[20] * 4, routers=[biased])
    with pytest.raises(InputError, match="any_router"):
        analyze(alone, NAME)
    assert analyze(alone, NAME, any_router=True).n == 80
    unnamed = plant(lengths=[20] * 4, routers=[planted.Router(experts, 8, logits=logits)])
    assert any("taken in all the same: L0" in note for note in analyze(unnamed, NAME).notes)


def test_group_limited_sigmoid_router_is_followed(plant: Plant, planted: ModuleType) -> None:
    """Experts 0 and 1 lead, in groups of which only the better may be used."""
    logits = np.tile([3.0, 2.9, -9.0, -9.0, 2.95, -9.0, -9.0, -9.0], (6, 1))
    rule = {
        "score": "sigmoid",
        "choice": "score",
        "bias": None,
        "groups": {"number": 2, "kept": 1, "by": "top2", "others": "-inf"},
    }
    limited = planted.Router(np.tile([0, 1], (6, 1)), 8, logits=logits, rule=rule)
    frame = analyze(plant(lengths=[3, 3], routers=[limited]), NAME, rule="balanced", window=6).df()
    assert _of(frame, "experts per token") == 2
    unlimited = planted.Router(np.tile([0, 1], (6, 1)), 8, logits=logits, rule=rule | {"groups": None})
    with pytest.raises(InputError, match="do not follow"):
        analyze(plant(lengths=[3, 3], routers=[unlimited]), NAME)


def test_sigmoid_scores_are_taken_over_their_sum(plant: Plant, planted: ModuleType) -> None:
    logits = np.tile([0.0, 0.0, 0.0, -60.0], (4, 1))
    rule = {"score": "sigmoid", "choice": "score", "bias": None, "groups": None}
    run = plant(lengths=[4], routers=[_router(planted, logits, 1, rule=rule)])
    assert _of(analyze(run, NAME, value=0.6).df(), "experts per token") == 2
    assert _of(analyze(run, NAME, value=0.7).df(), "experts per token") == 3


def test_logits_missing_for_some_tokens_leave_those_out(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[10] * 3, routers=[_router(planted, _random(0, 30, 6), 2)])
    run.store.connection.execute("DELETE FROM router_logits WHERE run_id = ? AND token IN (0, 17)", [run.run_id])
    for rule in RULES:
        assert analyze(run, NAME, rule=rule, window=7).n == 28


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 4), (256, 8)])
def test_every_rule_answers_for_extreme_sizes_and_one_token_sequences(
    plant: Plant, planted: ModuleType, rule: str, experts: int, top_k: int
) -> None:
    run = plant(lengths=[1, 1, 3], routers=[_router(planted, _random(0, 5, experts), top_k)])
    frame = analyze(run, NAME, rule=rule).df()
    assert _of(frame, "experts per token") == pytest.approx(top_k, abs=0.5)
    assert frame["value"].notna().all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rule": "grouped", "value": 0.5}, "no threshold"),
        ({"value": 1.5}, "probability mass"),
        ({"rule": "null", "slots": 1}, "slots"),
        ({"rule": "null", "slots": 9}, "slots"),
        ({"rule": "best"}, "top_p"),
        ({"by": "label"}, "no labels"),
    ],
)
def test_senseless_questions_are_refused(
    plant: Plant, planted: ModuleType, parameters: dict[str, Any], message: str
) -> None:
    run = plant(lengths=[6], routers=[_router(planted, _random(0, 6, 8), 2)])
    with pytest.raises(InputError, match=message):
        analyze(run, NAME, **parameters)


def test_run_without_logits_is_told_which_probe_to_add(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[3], routers=[planted.Router(np.zeros((3, 1), int), 4)])
    with pytest.raises(InputError, match="router_logits"):
        analyze(run, NAME)


@pytest.mark.parametrize("by", ["layer", "label", "class", "phase", "position"])
@pytest.mark.parametrize("rule", ["top_p", "grouped"])
def test_figures_are_drawn(plant: Plant, planted: ModuleType, by: str, rule: str) -> None:
    routers = [_router(planted, _random(layer, 24, 8), 2, layer=layer) for layer in range(2)]
    run = plant(lengths=[6] * 4, labels=["<b>x</b>", "y"] * 2, classes=["word", "digit"] * 12, routers=routers)
    figure = analyze(run, NAME, by=by, rule=rule, draws=20).figure()
    assert figure.data
    assert "<b>x" not in figure.to_json()
