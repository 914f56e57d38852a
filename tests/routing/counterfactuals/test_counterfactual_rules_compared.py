"""All rules side by side: the same numbers as one by one, equal k, order of the rules."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
RULES = ("top_p", "ratio", "gap", "null", "expert_choice", "balanced", "grouped", "hash")


def _router(planted: ModuleType, logits: NDArray[Any], top_k: int, **fields: Any) -> Any:
    experts = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    return planted.Router(experts, logits.shape[1], logits=logits, **fields)


@pytest.fixture(scope="module")
def run(plant: Plant, planted: ModuleType) -> Run:
    generator = np.random.default_rng(0)
    logits = [generator.normal(size=(240, 8)).astype(np.float32) * (1 + layer) for layer in range(2)]
    routers = [_router(planted, each, 2, layer=layer) for layer, each in enumerate(logits)]
    return plant(lengths=[20] * 12, ids=generator.integers(1000, size=240).tolist(), routers=routers)


@pytest.mark.parametrize("rule", RULES)
def test_numbers_are_those_of_the_rule_by_itself(run: Run, rule: str) -> None:
    together = analyze(run, "counterfactual_rules", window=60).df().query("rule == @rule").set_index("metric")
    alone = analyze(run, "counterfactual_routing", rule=rule, window=60).df()
    for metric in ("experts per token", "agreement", "tokens without an expert", "largest load"):
        part = alone[alone["metric"] == metric]
        expected = float(np.average(part["value"], weights=part["n"]))
        assert together.loc[metric, "value"] == pytest.approx(expected, abs=1e-9)
    chance = alone[alone["metric"] == "agreement"]["null"].mean()
    assert together.loc["agreement", "null"] == pytest.approx(chance)


def test_every_rule_has_k_experts_a_token_on_the_windows(run: Run) -> None:
    frame = analyze(run, "counterfactual_rules", window=30, windows=3).df()
    size = frame[frame["metric"] == "experts per token"]
    assert size["rule"].tolist() == list(RULES)
    assert size["value"].tolist() == pytest.approx([2.0] * len(RULES), abs=0.03)
    assert (size["n"] == 180).all()


def test_title_names_the_closest_and_the_farthest_rule(run: Run) -> None:
    result = analyze(run, "counterfactual_rules", window=60)
    agreement = result.df().query("metric == 'agreement'").set_index("rule")["value"]
    named = {"top_p": "top-p", "null": "null experts", "expert_choice": "expert choice"}
    assert f"{named.get(agreement.idxmax(), agreement.idxmax())} would keep most" in result.title
    assert "hash fewest" in result.title
    assert result.figure().data


def test_intervals_need_documents(run: Run, plant: Plant, planted: ModuleType) -> None:
    frame = analyze(run, "counterfactual_rules").df().query("metric == 'agreement' and rule == 'top_p'").iloc[0]
    assert frame["ci_low"] < frame["value"] < frame["ci_high"]
    alone = plant(lengths=[9], routers=[_router(planted, np.random.default_rng(1).normal(size=(9, 8)), 2)])
    assert analyze(alone, "counterfactual_rules").df()[["ci_low", "ci_high"]].isna().all(axis=None)


def test_routers_may_differ_in_size(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(2)
    routers = [
        _router(planted, generator.normal(size=(30, size)), top_k, layer=layer)
        for layer, (size, top_k) in enumerate([(256, 8), (4, 1), (3, 3)])
    ]
    frame = analyze(plant(lengths=[1, 9, 20], routers=routers), "counterfactual_rules").df()
    assert (frame[frame["metric"] == "experts per token"]["recorded"] == 4).all()
    assert frame["value"].notna().all()


def test_run_without_token_ids_has_no_hash(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[9], routers=[_router(planted, np.random.default_rng(1).normal(size=(9, 8)), 2)])
    run.store.connection.execute("UPDATE tokens SET token_id = NULL WHERE run_id = ?", [run.run_id])
    result = analyze(run, "counterfactual_rules")
    assert "hash" not in set(result.df()["rule"])
    assert any("no id" in note for note in result.notes)
    with pytest.raises(InputError, match="no token ids"):
        analyze(run, "counterfactual_routing", rule="hash")


def test_run_without_logits_is_told_which_probe_to_add(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[3], routers=[planted.Router(np.zeros((3, 1), int), 4)])
    with pytest.raises(InputError, match="router_logits"):
        analyze(run, "counterfactual_rules")
