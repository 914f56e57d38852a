"""Whatever is wrong with decisions is named at its site, with what it means and what to do; what is right is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.probes.anatomy import Sublayer
from moescope.probes.decision_faults import faults_of_ids, faults_of_logits, rule_faults
from moescope.probes.recorders.routing import NEAR_TIE
from moescope.probes.routing_rule import RoutingRule

LENGTHS = (7, 1, 12, 4, 9, 70)
TOKENS = sum(LENGTHS)
LAYER = Sublayer(3, "mlp", "decoder", "moe", "layers.3.mlp", n_experts=8, top_k=2, n_null=2)
RULE = RoutingRule("softmax", renormalise=True, agreement=1.0, choice_agreement=1.0, weight_agreement=1.0, tokens=100)


def faults(ids: list[list[int]], weights: list[list[float]] | None = None) -> list[str]:
    given = np.full((len(ids), 2), 0.5, np.float32) if weights is None else np.array(weights, np.float32)
    return list(faults_of_ids(np.array(ids, np.int32), given, LAYER))


def ledger(run: Any) -> dict[str, dict[str, Any]]:
    return {row["site"]: row for row in run.coverage.table.to_pylist()}


@pytest.fixture
def qwen(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture
def recorded(record_ids: Callable[..., Any], token_ids: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, **options: record_ids(module, token_ids(LENGTHS), **{"batch_size": 2, **options})


def test_good_decisions_have_no_fault() -> None:
    assert faults([[0, 7], [3, 2]]) == []
    assert faults([[8, 9], [0, 9]]) == []  # null experts are in range
    assert faults([[4, 4]], [[0.7, 0.0]]) == []  # a slot without weight is none
    assert list(faults_of_ids(np.empty((0, 2), np.int32), np.empty((0, 2), np.float32), LAYER)) == []


@pytest.mark.parametrize(
    ("ids", "weights", "words"),
    [
        ([[0, 10]], None, ["from 0 to 10", "has 10 (0 to 9)", "moescope doctor"]),
        ([[0, 3], [-1, 2]], None, ["from -1 to 3", "moescope doctor"]),
        ([[0, 3]], [[np.nan, 0.5]], ["NaN or infinite", "another dtype"]),
        ([[0, 3]], [[-np.inf, 0.5]], ["NaN or infinite"]),
        ([[0, 3], [5, 5], [2, 2]], None, ["2 tokens", "same expert twice"]),
    ],
)
def test_each_fault_says_what_it_is_and_what_to_do(ids: Any, weights: Any, words: list[str]) -> None:
    (found,) = faults(ids, weights)
    assert all(word in found for word in words)


def test_the_sentinel_of_expert_parallelism_is_named() -> None:
    layer = Sublayer(0, "mlp", "decoder", "moe", "mlp", n_experts=8, top_k=2)
    (found,) = faults_of_ids(np.array([[0, 8]], np.int32), np.full((1, 2), 0.5, np.float32), layer)
    assert "another device computes" in found


def test_a_few_tokens_whose_logits_look_like_shares_are_no_fault_and_a_run_of_them_is() -> None:
    """A decode step has few rows, and by chance one sums to 1."""
    yes, no = np.ones(1, bool), np.zeros(1, bool)
    assert list(faults_of_logits(yes, yes)) == []
    assert len(list(faults_of_logits(np.ones(8, bool), np.ones(8, bool)))) == 1
    assert len(list(faults_of_logits(no, no))) == 1
    assert [tensor for tensor, _ in rule_faults(Counter(tokens=3, like_probabilities=3), None)] == [
        "hook_router_logits"
    ]
    assert list(rule_faults(Counter(tokens=3, like_probabilities=2), None)) == []


@pytest.mark.parametrize(
    ("same", "same_set", "verified", "found"),
    [
        (10_000, 10_000, True, []),
        (9_995, 9_995, True, []),
        (9_900, 10_000, True, ["99.00% of the run's 10,000 decisions"]),
        (0, 9_000, False, ["90.00% of the run's 10,000 choices of experts"]),
        (0, 10_000, False, []),  # whose weights never followed from it
    ],
)
def test_a_rule_is_held_against_the_whole_run(same: int, same_set: int, verified: bool, found: list[str]) -> None:
    rule = RULE if verified else RoutingRule("softmax", agreement=0.5, choice_agreement=1.0)
    told = [text for _, text in rule_faults(Counter(tokens=10_000, ruled=10_000, same=same, same_set=same_set), rule)]
    assert len(told) == len(found)
    assert all(words in text for words, text in zip(found, told, strict=True))


def test_a_good_run_tells_its_near_ties_and_that_its_rules_held(qwen: Any, recorded: Callable[..., Any]) -> None:
    run = recorded(qwen)
    assert run.status == "complete"
    summary = run.info["summary"]
    routers = {"blocks.0.mlp", "blocks.1.mlp"}
    assert summary["rule_agreement_by_router"] == dict.fromkeys(routers, 1.0)
    query = "SELECT layer, count(*) FILTER (margin < ?) FROM routing GROUP BY layer"
    counted = {f"blocks.{layer}.mlp": n for layer, n in run.store.fetch(query, [NEAR_TIE])}
    assert summary["near_ties_by_router"] == counted
    assert summary["near_ties"] == sum(counted.values())


def test_near_ties_are_counted_and_leave_the_run_complete(qwen: Any, recorded: Callable[..., Any]) -> None:
    """Two experts with one router row: whenever one is chosen last, the other loses by nothing."""
    with torch.no_grad():
        qwen.model.layers[1].mlp.gate.weight[5] = qwen.model.layers[1].mlp.gate.weight[2]
    run = recorded(qwen)
    assert run.status == "complete"
    by_router = run.info["summary"]["near_ties_by_router"]
    query = "SELECT count(*) FROM routing WHERE layer = 1 AND (list_contains(experts, 2) != list_contains(experts, 5))"
    ((torn,),) = run.store.fetch(query)
    assert by_router["blocks.1.mlp"] >= torn > 0
    assert by_router["blocks.0.mlp"] < torn


def test_a_rule_that_stops_to_hold_after_the_first_sequences_makes_the_run_invalid(
    qwen: Any, recorded: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    """From the fourth batch on another hand swaps an expert; the first sequences, on which rules are found, show none."""
    gate = qwen.model.layers[1].mlp.gate
    plain, calls = gate.forward, []

    def meddled(hidden: Any) -> Any:
        logits, weights, ids = plain(hidden)
        calls.append(1)
        if len(calls) > 4:
            others = (ids + 1 + (ids.flip(-1) == ids + 1).long()) % 8
            ids = torch.cat(
                [ids[:, :1], torch.where(others[:, 1:] == ids[:, :1], (others[:, 1:] + 1) % 8, others[:, 1:])], 1
            )
        return logits, weights, ids

    gate.forward = meddled
    run = recorded(qwen)
    assert run.status == "incomplete"
    row = ledger(run)["blocks.1.mlp.hook_expert_indices"]
    assert row["status"] == "invalid"
    assert "the rule that held on the first sequences" in row["detail"]
    assert ledger(run)["blocks.0.mlp.hook_expert_indices"]["status"] == "complete"
    assert run.info["summary"]["rule_agreement_by_router"]["blocks.1.mlp"] < 0.9


def test_weights_that_disagree_with_the_verified_rule_make_the_run_invalid(
    qwen: Any, recorded: Callable[..., Any]
) -> None:
    gate = qwen.model.layers[0].mlp.gate
    plain, calls = gate.forward, []

    def doubled(hidden: Any) -> Any:
        logits, weights, ids = plain(hidden)
        calls.append(1)
        return logits, weights * (1 + (len(calls) > 4)), ids

    gate.forward = doubled
    run = recorded(qwen)
    row = ledger(run)["blocks.0.mlp.hook_expert_indices"]
    assert (run.status, row["status"]) == ("incomplete", "invalid")
    # Rules on 1, taps tried on 2 and 3, then three batches, of which the first is as it was.
    doubled_tokens = sum(LENGTHS[2:])
    assert f"{1 - doubled_tokens / TOKENS:.2%} of the run's {TOKENS:,} decisions" in row["detail"]


def test_a_router_that_follows_no_rule_is_recorded_and_not_called_incomplete(
    qwen: Any, recorded: Callable[..., Any]
) -> None:
    gate = qwen.model.layers[1].mlp.gate
    plain = gate.forward

    def by_parity(hidden: Any) -> Any:
        logits, weights, ids = plain(hidden)
        return logits, weights * 0.3 + 0.2, (ids * 3 + 1) % 8

    gate.forward = by_parity
    run = recorded(qwen)
    assert run.status == "complete"
    assert list(run.info["summary"]["rule_agreement_by_router"]) == ["blocks.0.mlp"]
    ((margins,),) = run.store.fetch("SELECT count(margin) FROM routing WHERE layer = 1")
    assert margins == 0


def test_the_same_expert_twice_is_invalid(qwen: Any, recorded: Callable[..., Any]) -> None:
    gate = qwen.model.layers[1].mlp.gate
    plain = gate.forward

    def twice(hidden: Any) -> Any:
        logits, weights, ids = plain(hidden)
        return logits, weights, ids[:, :1].expand(-1, 2).contiguous()

    gate.forward = twice
    row = ledger(recorded(qwen))["blocks.1.mlp.hook_expert_indices"]
    assert row["status"] == "invalid"
    assert "same expert twice" in row["detail"]


def test_several_problems_of_a_site_are_all_told_each_once(qwen: Any, recorded: Callable[..., Any]) -> None:
    gate = qwen.model.layers[1].mlp.gate
    plain = gate.forward

    def twice_and_nan(hidden: Any) -> Any:
        logits, weights, ids = plain(hidden)
        return logits, weights * torch.nan, ids[:, :1].expand(-1, 2).contiguous()

    gate.forward = twice_and_nan
    detail = ledger(recorded(qwen))["blocks.1.mlp.hook_expert_indices"]["detail"]
    assert detail.count("same expert twice") == 1
    assert detail.count("NaN or infinite") == 1


def test_choices_that_leave_their_rule_are_told_also_where_weights_never_followed_one(
    qwen: Any, recorded: Callable[..., Any]
) -> None:
    gate = qwen.model.layers[1].mlp.gate
    plain, calls = gate.forward, []

    def own_weights(hidden: Any) -> Any:
        logits, weights, ids = plain(hidden)
        calls.append(1)
        return logits, weights * 0.3 + 0.2, ids if len(calls) <= 4 else (ids * 3 + 1) % 8

    gate.forward = own_weights
    row = ledger(recorded(qwen))["blocks.1.mlp.hook_expert_indices"]
    assert row["status"] == "invalid"
    assert "choices of experts" in row["detail"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_probabilities_are_noticed_in_any_float_type(
    dtype: str, tiny_model: Callable[..., Any], recorded: Callable[..., Any]
) -> None:
    module = tiny_model("qwen3_moe", dtype=dtype)
    gate = module.model.layers[1].mlp.gate
    plain = gate.forward

    def softmaxed(hidden: Any) -> Any:
        logits, weights, ids = plain(hidden)
        return logits.float().softmax(-1).to(logits.dtype), weights, ids

    gate.forward = softmaxed
    row = ledger(recorded(module))["blocks.1.mlp.hook_router_logits"]
    assert row["status"] == "invalid"
    assert "probabilities, not logits" in row["detail"]


def test_infinite_logits_are_told_even_where_their_entropy_is_a_number(qwen: Any, recorded: Callable[..., Any]) -> None:
    """Minus infinity leaves a softmax finite."""
    gate = qwen.model.layers[0].mlp.gate
    plain = gate.forward

    def masked(hidden: Any) -> Any:
        logits, weights, ids = plain(hidden)
        lowest = logits.argmin(-1, keepdim=True)
        return logits.scatter(-1, lowest, -torch.inf), weights, ids

    gate.forward = masked
    row = ledger(recorded(qwen))["blocks.0.mlp.hook_router_logits"]
    assert row["status"] == "invalid"
    assert "NaN or infinite" in row["detail"]


def test_taps_that_change_logits_are_refused_before_a_run(
    store: Any, qwen: Any, recorded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moescope.probes.recorders.residual import ResidualProbe

    plain = ResidualProbe.tap

    def meddling(self: Any, site: Any, tensors: Any) -> Any:
        kept = plain(self, site, tensors)
        tensors["resid"][0, 0, 0] += 1e-3
        return kept

    with monkeypatch.context() as patch:
        patch.setattr(ResidualProbe, "tap", meddling)
        with pytest.raises(ms.RunError, match="taps change this model's logits"):
            recorded(qwen)
    assert store.runs() == []
    assert recorded(qwen).info["settings"]["taps_checked"] is True


def test_a_model_that_gives_other_logits_each_time_is_told_from_taps_that_change_them(
    store: Any, qwen: Any, recorded: Callable[..., Any]
) -> None:
    plain = qwen.lm_head.forward
    qwen.lm_head.forward = lambda hidden: plain(hidden) + torch.randn(())
    with pytest.raises(ms.RunError, match="other logits each time"):
        recorded(qwen)
    assert store.runs() == []
