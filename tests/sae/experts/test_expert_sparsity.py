"""Experts by how few neurons a token turns on: the formula, the counts, and what a swapped router costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm, spearmanr

import moescope as ms
from moescope.core.errors import InputError
from moescope.sae.experts.expert_matrices import ExpertMatrices, expert_matrices
from moescope.sae.experts.sparsity import counted_l0, expected_l0, expert_sparsity, rank_correlation

LENGTHS = [20, 16, 18, 22, 15, 19]


def test_expected_count_is_the_normal_share_of_neurons() -> None:
    random = torch.Generator().manual_seed(0)
    gate = torch.randn(3, 40, 6, generator=random) + 0.3 * torch.randn(3, 1, 6, generator=random)
    bias = torch.randn(3, 40, generator=random)
    x = torch.randn(5, 6, generator=random)
    found = expected_l0(x, ExpertMatrices(gate, bias, gate, True))
    for token in range(5):
        for expert in range(3):
            mean = sum(float(x[token, i]) * float(gate[expert, :, i].mean()) for i in range(6)) + float(
                bias[expert].mean()
            )
            spread = sum(float(x[token, i]) ** 2 * float(gate[expert, :, i].var(unbiased=False)) for i in range(6))
            spread += float(bias[expert].var(unbiased=False))
            assert float(found[token, expert]) == pytest.approx(40 * norm.cdf(mean / math.sqrt(spread)), rel=1e-4)


def test_counts_are_near_what_normal_weights_lead_one_to_expect() -> None:
    random = torch.Generator().manual_seed(1)
    gate = torch.randn(4, 4000, 16, generator=random) + torch.randn(4, 1, 16, generator=random)
    x = torch.randn(6, 16, generator=random)
    matrices = ExpertMatrices(gate, None, gate, True)
    expected, counted = expected_l0(x, matrices), counted_l0(x, matrices)
    assert float((expected - counted).abs().max()) < 4 * math.sqrt(4000) / 2
    assert float(counted.std()) > 300  # the test could not fail on experts that are all alike


def test_rank_correlation_is_scipys() -> None:
    random = np.random.default_rng(0)
    one, other = random.integers(0, 5, (30, 8)).astype(float), random.normal(size=(30, 8))
    found = rank_correlation(torch.tensor(one), torch.tensor(other))
    expected = [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    assert np.allclose(found, expected, atol=1e-6)


def test_matrices_are_those_that_the_experts_multiply_by(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("qwen3_moe")
    found = expert_matrices(ms.load(module), 1)
    experts, x = module.model.layers[1].mlp.experts, torch.randn(32)
    gate, _ = (experts.gate_up_proj[3] @ x).chunk(2)
    assert torch.allclose(found.gate[3] @ x, gate)
    assert torch.allclose(found.down[3].T @ torch.ones(16), experts.down_proj[3] @ torch.ones(16))


def planted(tiny_model: Callable[..., Any]) -> Any:
    """A Mixtral whose router, in layer 0, sends tokens where the mean of the gate's rows points away from them."""
    module = tiny_model("mixtral", num_local_experts=8)
    with torch.no_grad():
        mlp = module.model.layers[0].mlp
        gate = mlp.experts.gate_up_proj[:, :24]
        gate += 0.3 * torch.randn(8, 1, 32, generator=torch.Generator().manual_seed(5))
        mlp.gate.weight.copy_(-20 * gate.mean(1))
    return module


def rows_of(store: Any, layer: int) -> Any:
    query = """
        SELECT m.metric, m.condition, m.group_kind, m.group_value, m.value, m.ci_low, m.ci_high, m.n
        FROM sae_measures m JOIN saes s ON s.sae_id = m.sae_id
        WHERE s.name = ?
    """
    frame = store.connection.execute(query, [f"neurons of layer {layer}"]).df()
    return frame.set_index(["metric", "condition", "group_value"]).sort_index()


def test_router_that_follows_sparsity_agrees_with_the_score_and_another_does_not(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = planted(tiny_model)
    run = record_ids(module, token_ids(LENGTHS))
    found = expert_sparsity(ms.load(module), run, store, swap_tokens=0, draws=100, progress=False)
    assert found.layers == ((0, "mlp"), (1, "mlp"))
    first, second = rows_of(store, 0), rows_of(store, 1)
    assert first.loc[("routing_spearman", "expected_l0", "0"), "value"] > 0.7
    assert first.loc[("routing_recall", "expected_l0", "0"), "value"] > 0.7
    assert first.loc[("routing_recall", "random", "0"), "value"] == 2 / 8
    assert abs(second.loc[("routing_spearman", "expected_l0", "1"), "value"]) < 0.4
    assert (
        first.loc[("l0_chosen", "counted_l0", "0"), "value"] < first.loc[("l0_not_chosen", "counted_l0", "0"), "value"]
    )
    bounds = first.loc[("routing_spearman", "expected_l0", "0")]
    assert bounds["ci_low"] <= bounds["value"] <= bounds["ci_high"]


def test_numbers_by_expert_are_those_of_plain_loops(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any], store: Any,
    plain_passes: Callable[..., Any],
) -> None:  # fmt: skip
    module = tiny_model("mixtral")
    sequences = token_ids(LENGTHS)
    run = record_ids(module, sequences)
    expert_sparsity(ms.load(module), run, store, layers=[1], swap_tokens=0, draws=50, progress=False)
    table = rows_of(store, 1)
    counts: dict[int, list[int]] = {}
    recalls = []
    experts = module.model.layers[1].mlp.experts
    matrices = expert_matrices(ms.load(module), 1)
    for batch in plain_passes(module, sequences):
        hidden, ids, _, _ = batch.experts[1]
        width = batch.ids.shape[1]
        for row in range(len(batch.ids)):
            for position in range(1, int(batch.mask[row].sum())):
                token = row * width + position
                chosen = ids[token].tolist()
                for expert in chosen:
                    gate, _ = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                    counts.setdefault(expert, []).append(int((gate > 0).sum()))
                lowest = expected_l0(hidden[token][None], matrices)[0].argsort()[:2].tolist()
                recalls.append(len(set(lowest) & set(chosen)) / 2)
    for expert, values in counts.items():
        row = table.loc[("l0", "counted_l0", str(expert))]
        assert row["value"] == pytest.approx(np.mean(values))
        assert row["n"] == len(values)
    assert table.loc[("routing_recall", "expected_l0", "1"), "value"] == pytest.approx(np.mean(recalls))


def test_swapped_router_costs_what_a_model_routed_by_hand_loses(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("mixtral")
    sequences = token_ids(LENGTHS)
    run = record_ids(module, sequences)
    model = ms.load(module)
    expert_sparsity(model, run, store, layers=[0], swap_tokens=10_000, draws=50, progress=False)
    found = rows_of(store, 0)
    matrices = expert_matrices(model, 0)
    mlp = module.model.layers[0].mlp

    def nll(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = module(torch.tensor([ids])).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")

    def by_score(_module: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, _, _ = given
        ids = expected_l0(hidden, matrices).argsort(1)[:, :2]
        chances = (hidden @ mlp.gate.weight.T).softmax(-1).gather(1, ids)
        return hidden, ids, chances / chances.sum(-1, keepdim=True)

    plain = torch.cat([nll(ids) for ids in sequences])
    handle = mlp.experts.register_forward_pre_hook(by_score)
    swapped = torch.cat([nll(ids) for ids in sequences])
    handle.remove()
    row = found.loc[("swap_delta_nll", "expected_l0", "0")]
    assert row["value"] == pytest.approx(float((swapped - plain).mean()), rel=1e-3, abs=1e-5)
    assert row["n"] == len(plain)
    assert ("swap_delta_nll", "random", "0") in found.index


def test_dense_model_has_no_routers_to_compare(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("llama")
    run = record_ids(module, token_ids([8]))
    with pytest.raises(InputError, match="has no router"):
        expert_sparsity(ms.load(module), run, store, progress=False)
