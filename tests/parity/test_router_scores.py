"""Recorded entropy and margin, and the routing rule that makes the margin sayable, against router scores by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

LENGTHS = (7, 1, 12, 4, 9)
Scores = dict[tuple[int, int], list[float]]


def logits_by_hand(module: Any, batches: list[Any]) -> Scores:
    """(layer, token) → the router's logits, multiplied out from what the router was given, in float64."""
    found = {}
    for batch in batches:
        for layer, given in batch.router_inputs.items():
            weight = module.model.layers[layer].mlp.gate.weight.double()
            with torch.no_grad():
                logits = (given.double() @ weight.T)[batch.mask.reshape(-1)].tolist()
            found |= {(layer, batch.first_token + n): row for n, row in enumerate(logits)}
    return found


def entropy_nats(shares: list[float]) -> float:
    return -sum(p * math.log(p) for p in shares)


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [p / sum(powers) for p in powers]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def margin(scores: list[float], k: int) -> float:
    ranked = sorted(scores, reverse=True)
    return ranked[k - 1] - ranked[k]


def stored(run: Any, column: str) -> dict[tuple[int, int], float | None]:
    rows = run.store.fetch(f"SELECT layer, token, {column} FROM routing WHERE run_id = ?", [run.run_id])
    return {(layer, token): value for layer, token, value in rows}


def rules(run: Any) -> list[dict[str, Any]]:
    query = "SELECT routing_rule FROM layers WHERE run_id = ? AND kind = 'moe' ORDER BY layer"
    return [json.loads(text) for (text,) in run.store.fetch(query, [run.run_id])]


@pytest.mark.parametrize(
    ("family", "k", "renormalise"),
    [("qwen3_moe", 2, True), ("olmoe", 3, False), ("mixtral", 2, True), ("qwen2_moe", 2, False)],
)
def test_softmax_routers_are_verified_with_entropy_and_margin_of_their_logits(
    family: str,
    k: int,
    renormalise: bool,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    module, sequences = tiny_model(family), token_ids(LENGTHS)
    run = record_ids(module, sequences, batch_size=2)
    logits = logits_by_hand(module, plain_passes(module, sequences, 2))
    for rule in rules(run):
        assert rule["verified"] is True
        assert (rule["score"], rule["renormalise"], rule["scale"]) == ("softmax", renormalise, 1.0)
        assert rule["agreement"] == 1.0
    entropies, margins = stored(run, "entropy"), stored(run, "margin")
    assert entropies.keys() == margins.keys() == logits.keys()
    for key, row in logits.items():
        assert entropies[key] == pytest.approx(entropy_nats(softmax(row)), abs=1e-5)
        assert margins[key] == pytest.approx(margin(row, k), abs=1e-5)


def test_an_unbiased_sigmoid_router_is_verified_with_margin_among_its_scores(
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    module, sequences = tiny_model("deepseek_v3", n_group=1, topk_group=1), token_ids(LENGTHS)
    run = record_ids(module, sequences, batch_size=2)
    for rule in rules(run):
        assert rule["verified"] is True
        assert (rule["score"], rule["renormalise"], rule["scale"]) == ("sigmoid", True, 2.5)
    logits = logits_by_hand(module, plain_passes(module, sequences, 2))
    entropies, margins = stored(run, "entropy"), stored(run, "margin")
    assert entropies.keys() == margins.keys() == logits.keys()
    for key, row in logits.items():
        scores = [sigmoid(x) for x in row]
        assert entropies[key] == pytest.approx(entropy_nats([s / sum(scores) for s in scores]), abs=1e-5)
        assert margins[key] == pytest.approx(margin(scores, 3), abs=1e-5)


def biased_model(tiny_model: Callable[..., Any], **config: Any) -> Any:
    """DeepSeek-V3 whose choice of experts is biased, so that scores alone do not give the decision."""
    module = tiny_model("deepseek_v3", **config)
    random = torch.Generator().manual_seed(3)
    for layer in module.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(8, generator=random))
    return module


@pytest.fixture
def biased(tiny_model: Callable[..., Any]) -> Any:
    return biased_model(tiny_model, n_group=1, topk_group=1)


def eligible(scores: list[float], groups: int, kept: int) -> list[float]:
    """Biased scores of the experts in the `kept` groups whose two best scores sum highest; minus infinity elsewhere."""
    size = len(scores) // groups
    worth = [sum(sorted(scores[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: -worth[g])[:kept]
    return [score if n // size in best else -math.inf for n, score in enumerate(scores)]


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (2, 1), (4, 3)])
def test_the_rule_of_a_biased_router_is_found_and_its_margin_is_of_the_biased_scores(
    groups: int,
    kept: int,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    module, sequences = biased_model(tiny_model, n_group=groups, topk_group=kept), token_ids(LENGTHS)
    run = record_ids(module, sequences, batch_size=2)
    assert run.status == "complete"
    found = rules(run)
    assert [(r["verified"], r["score"], r["scale"], r["renormalise"]) for r in found] == [
        (True, "sigmoid", 2.5, True)
    ] * 2
    assert [r["bias"] for r in found] == [f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2)]
    assert [r["groups"] and (r["groups"]["number"], r["groups"]["kept"]) for r in found] == (
        [None, None] if groups == 1 else [(groups, kept)] * 2
    )
    margins = stored(run, "margin")
    for (layer, token), logits in logits_by_hand(module, plain_passes(module, sequences, 2)).items():
        bias = module.model.layers[layer].mlp.gate.e_score_correction_bias.tolist()
        scores = eligible([sigmoid(x) + b for x, b in zip(logits, bias, strict=True)], groups, kept)
        assert margins[layer, token] == pytest.approx(margin(scores, 3), abs=1e-5)


def test_a_router_that_no_rule_reproduces_is_recorded_exactly_flagged_and_without_margins(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module, sequences = tiny_model("qwen3_moe"), token_ids(LENGTHS)
    given: list[list[list[int]]] = []
    for layer in module.model.layers:
        plain = layer.mlp.gate.forward

        def odd(hidden: Any, plain: Any = plain) -> Any:
            """Neighbours of the best experts instead of the best."""
            logits, weights, ids = plain(hidden)
            moved = (ids + 1) % 8
            given.append(moved.tolist())
            return logits, weights, moved

        layer.mlp.gate.forward = odd
    run = record_ids(module, sequences, batch_size=8)
    assert run.status == "complete"
    assert [rule["verified"] for rule in rules(run)] == [False, False]
    assert set(stored(run, "margin").values()) == {None}
    width = max(LENGTHS)
    real = [row * width + n for row, length in enumerate(LENGTHS) for n in range(length)]
    for layer, rows in enumerate(given[-2:]):
        found = {token: sorted(ids) for (at, token), ids in stored(run, "experts").items() if at == layer}
        assert found == {token: sorted(rows[place]) for token, place in enumerate(real)}


def test_entropy_of_a_biased_sigmoid_router_is_of_its_scores_over_their_sum(
    biased: Any, token_ids: Callable[..., Any], record_ids: Callable[..., Any], plain_passes: Callable[..., Any]
) -> None:
    """The bias hides which experts are taken, not what the scores are: the weights still are sigmoids."""
    sequences = token_ids(LENGTHS)
    entropies = stored(record_ids(biased, sequences, batch_size=2), "entropy")
    for key, row in logits_by_hand(biased, plain_passes(biased, sequences, 2)).items():
        scores = [sigmoid(x) for x in row]
        assert entropies[key] == pytest.approx(entropy_nats([s / sum(scores) for s in scores]), abs=1e-5)


def test_a_router_that_takes_every_expert_has_no_margin(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    run = record_ids(tiny_model("mixtral", num_experts_per_tok=4), token_ids(LENGTHS))
    assert run.status == "complete"
    assert set(stored(run, "margin").values()) == {None}, "there is no (k+1)-th score"


def test_an_undecided_router_has_the_entropy_of_a_fair_die_and_no_margin_to_speak_of(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module = tiny_model("qwen3_moe")
    with torch.no_grad():
        for layer in module.model.layers:
            layer.mlp.gate.weight.zero_()
    run = record_ids(module, token_ids(LENGTHS))
    entropies = list(stored(run, "entropy").values())
    assert entropies == pytest.approx([math.log(8)] * len(entropies), abs=1e-6)
    assert set(stored(run, "margin").values()) <= {0.0, None}


def test_the_margin_is_negative_where_the_decision_passed_over_a_better_expert(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    """Margins are of the decision taken: the rule holds on the first sequences, then the router turns around."""
    module = tiny_model("qwen3_moe")
    plain, calls = module.model.layers[1].mlp.gate.forward, []

    def turning(hidden: Any) -> Any:
        logits, weights, ids = plain(hidden)
        calls.append(None)
        return logits, weights, logits.topk(2, dim=-1, largest=False).indices if len(calls) > 1 else ids

    module.model.layers[1].mlp.gate.forward = turning
    run = record_ids(module, token_ids(LENGTHS), batch_size=8)
    values = stored(run, "margin")
    assert all(value > 0 for (layer, _), value in values.items() if layer == 0)
    assert all(value < 0 for (layer, _), value in values.items() if layer == 1)
