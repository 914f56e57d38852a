"""Uncertainty and margins: closed forms, a loop over tokens, groups, what is missing."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.findings import finding
from moescope.store.run import Run

Plant = Callable[..., Run]


def _router(planted: ModuleType, tokens: int, *, top_k: int = 2, n_experts: int = 8, **fields: Any) -> Any:
    return planted.Router(np.tile(np.arange(top_k), (tokens, 1)), n_experts, **fields)


def test_router_that_scores_all_alike_reaches_every_bound(plant: Plant, planted: ModuleType) -> None:
    router = _router(planted, 6, entropy=np.full(6, math.log(8)), weights=np.full((6, 2), 0.125))
    frame = analyze(plant(lengths=[3, 3], routers=[router]), "router_uncertainty").df().set_index("metric")
    assert frame["value"].tolist() == pytest.approx([math.log(8), math.log(2), 1.0], rel=1e-6)
    assert frame["null"].tolist() == pytest.approx([math.log(8), math.log(2), 1.0])
    assert (frame["n"] == 6).all()


def test_entropy_of_the_chosen_forgets_the_scale_of_the_weights(plant: Plant, planted: ModuleType) -> None:
    weights = np.array([[0.75, 0.25], [7.5, 2.5], [0.3, 0.1], [1.0, 0.0]])
    frame = analyze(plant(lengths=[4], routers=[_router(planted, 4, weights=weights)]), "router_uncertainty").df()
    one = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert frame["metric"].tolist() == ["entropy of the chosen"]
    assert frame["value"].iloc[0] == pytest.approx(3 * one / 4, rel=1e-6)


def test_default_threshold_is_gw_moes_for_eight_experts(plant: Plant, planted: ModuleType) -> None:
    router = _router(planted, 4, entropy=np.array([1.59, 1.6001, 2.0, 0.1]))
    frame = analyze(plant(lengths=[4], routers=[router]), "router_uncertainty").df().set_index("metric")
    assert frame.loc["uncertain tokens", "value"] == 0.5


def test_title_names_where_tokens_are_most_and_least_uncertain(plant: Plant, planted: ModuleType) -> None:
    routers = [
        _router(planted, 4, entropy=np.array([2.0, 2.0, 2.0, 0.0]), layer=2),
        _router(planted, 4, entropy=np.zeros(4), layer=5),
    ]
    title = analyze(plant(lengths=[4], routers=routers), "router_uncertainty").title
    assert title == "37.5% of decisions are uncertain: from 0.0% in L5 to 75.0% in L2"


def test_margin_counts_near_ties_strictly_below_the_limit(plant: Plant, planted: ModuleType) -> None:
    router = _router(planted, 4, margin=np.array([0.0, 0.25, 0.5, 3.25]))
    frame = analyze(plant(lengths=[4], routers=[router]), "router_margin", tie=0.5).df().set_index("metric")
    assert frame.loc["margin", "value"] == pytest.approx(1.0)
    assert frame.loc["near-ties", "value"] == 0.5


@given(data=st.data())
def test_groups_equal_a_loop_over_tokens(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tokens = sum(lengths)
    labels = data.draw(st.lists(st.sampled_from(["a", "b", None]), min_size=len(lengths), max_size=len(lengths)))
    decode = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    classes = data.draw(st.lists(st.sampled_from(["word", "digit"]), min_size=tokens, max_size=tokens))
    maybe = st.one_of(st.floats(0, 2.0, width=16), st.just(float("nan")))
    entropy = data.draw(st.lists(maybe, min_size=tokens, max_size=tokens))
    margin = data.draw(st.lists(st.floats(0, 2, width=16), min_size=tokens, max_size=tokens))
    router = _router(planted, tokens, entropy=np.array(entropy), margin=np.array(margin))
    run = plant(lengths=lengths, labels=labels, decode=decode, classes=classes, routers=[router])
    by = data.draw(st.sampled_from(["label", "phase", "position", "class"]))
    if by == "label" and not any(labels):
        with pytest.raises(InputError, match="labelled"):
            analyze(run, "router_margin", by=by)
        return
    groups: defaultdict[str, list[int]] = defaultdict(list)
    where = [(label, p, length) for label, length in zip(labels, lengths, strict=True) for p in range(length)]
    for token, (label, position, length) in enumerate(where):
        half = "0–50 %" if position * 2 // length == 0 else "50–100 %"
        phase = "decode" if decode[token] else "prefill"
        place = {"label": label, "phase": phase, "position": half, "class": classes[token]}[by]
        if place is not None:
            groups[place].append(token)
    unsure = analyze(run, "router_uncertainty", by=by, bins=2, threshold=0.5, draws=20).df()
    close = analyze(run, "router_margin", by=by, bins=2, tie=1.0, draws=20).df()
    assert set(close[by]) == set(groups)
    for place, members in groups.items():
        margins = close[close[by] == place].set_index("metric")
        assert margins.loc["margin", "value"] == pytest.approx(sum(margin[t] for t in members) / len(members))
        assert margins.loc["near-ties", "value"] == pytest.approx(sum(margin[t] < 1 for t in members) / len(members))
        known = [entropy[t] for t in members if not math.isnan(entropy[t])]
        part = unsure[unsure[by] == place].set_index("metric")
        assert ("router entropy" in part.index) == bool(known)
        if known:
            assert part.loc["router entropy", "n"] == len(known)
            assert part.loc["router entropy", "value"] == pytest.approx(sum(known) / len(known), abs=1e-6)
            limit = 0.5 * math.log(8)
            assert part.loc["uncertain tokens", "value"] == pytest.approx(sum(e >= limit for e in known) / len(known))


def test_interval_holds_the_estimate_and_is_missing_where_one_document_has_the_group(
    plant: Plant, planted: ModuleType
) -> None:
    generator = np.random.default_rng(0)
    router = _router(planted, 60, margin=generator.exponential(size=60))
    run = plant(lengths=[10] * 6, labels=["many"] * 5 + ["once"], routers=[router])
    frame = analyze(run, "router_margin", by="label").df()
    many = frame[(frame["label"] == "many") & (frame["metric"] == "margin")].iloc[0]
    assert many["ci_low"] < many["value"] < many["ci_high"]
    assert frame[frame["label"] == "once"][["ci_low", "ci_high"]].isna().all(axis=None)


def test_layers_of_different_size_have_their_own_bounds(plant: Plant, planted: ModuleType) -> None:
    routers = [
        _router(planted, 2, entropy=np.zeros(2), n_experts=256, top_k=1),
        _router(planted, 2, entropy=np.zeros(2), n_experts=4, n_null=4, layer=3, top_k=3),
    ]
    frame = analyze(plant(lengths=[1, 1], routers=routers), "router_uncertainty").df()
    nulls = frame.set_index(["layer", "metric"])["null"]
    assert nulls[0, "router entropy"] == pytest.approx(math.log(256))
    assert nulls[0, "entropy of the chosen"] == 0
    assert nulls[3, "router entropy"] == pytest.approx(math.log(8))
    assert nulls[3, "entropy of the chosen"] == pytest.approx(math.log(3))


def test_a_margin_has_no_chance_level_and_is_not_ranked_by_its_bound(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(0)
    router = _router(planted, 60, margin=1 + generator.exponential(size=60))
    run = plant(lengths=[10] * 6, labels=["a", "b"] * 3, routers=[router])
    for by in ("layer", "label"):
        result = analyze(run, "router_margin", by=by)
        assert finding(result).verdict == "unjudged"
        assert "chance" not in str(result.figure().to_dict())


def test_missing_margins_are_refused_with_the_reason(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[3], routers=[_router(planted, 3)])
    run.store.connection.execute("UPDATE routing SET margin = NULL WHERE run_id = ?", [run.run_id])
    with pytest.raises(InputError, match="no margins"):
        analyze(run, "router_margin")
    run.store.connection.execute("UPDATE routing SET weights = NULL WHERE run_id = ?", [run.run_id])
    with pytest.raises(InputError, match="no entropy"):
        analyze(run, "router_uncertainty")


def test_threshold_beyond_the_maximum_is_refused(plant: Plant, planted: ModuleType) -> None:
    with pytest.raises(InputError, match="threshold"):
        analyze(plant(lengths=[1], routers=[_router(planted, 1)]), "router_uncertainty", threshold=1.6)
