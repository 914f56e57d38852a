"""A MoE layer's neurons as latents: exact, in order, and the same as by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.probes.families.tiny import build_tiny
from moescope.sae.experts.neurons import neurons_as_features, register_neurons


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_neurons_decode_to_what_the_routed_experts_write(
    family: str, implementation: str, tiny_model: Callable[..., Any]
) -> None:
    module = tiny_model(family, experts=implementation)
    neurons = neurons_as_features(ms.load(module), 1)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    moe = module.model.layers[1].mlp
    with torch.no_grad():
        whole = moe(x[None])[0]
        whole = whole - moe.shared_experts(x) if family == "deepseek_v3" else whole
        found = neurons.encode(x)
    assert found.shape == (7, neurons.d_sae)
    assert float(found.min()) >= 0
    assert torch.allclose(neurons.decode(found), whole, atol=1e-5 * float(whole.abs().max()))


def test_each_latent_is_weight_times_one_neuron_of_one_expert(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("mixtral")
    neurons = neurons_as_features(ms.load(module), 0)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    moe = module.model.layers[0].mlp
    with torch.no_grad():
        _, weights, ids = moe.gate(x)
        found = neurons.encode(x)
        for token in range(5):
            expected = torch.zeros(neurons.d_sae)
            for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
                gate, up = (moe.experts.gate_up_proj[expert] @ x[token]).chunk(2)
                for neuron, value in enumerate(weight * torch.nn.functional.silu(gate) * up):
                    latent = expert * 24 + neuron + (0 if value > 0 else 4 * 24)
                    expected[latent] = value.abs()
                    assert neurons.expert_of(latent) == (expert, neuron, 1 if value > 0 else -1)
            assert torch.allclose(found[token], expected, atol=1e-6)


def test_experts_without_negative_neurons_have_one_latent_each() -> None:
    neurons = neurons_as_features(ms.load(build_tiny("nemotron_h", moe_latent_size=None)), 1)
    assert not neurons.matrices.signed
    assert neurons.d_sae == neurons.matrices.n_experts * neurons.matrices.d_expert


def test_least_leaves_the_neurons_that_write_much(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("mixtral"))
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    every, some = neurons_as_features(model, 0), neurons_as_features(model, 0, least=0.2)
    whole, kept = every.encode(x), some.encode(x)
    length = (whole @ every.decoder).norm(dim=-1, keepdim=True)
    large = whole * every.decoder.norm(dim=-1) >= 0.2 * length
    assert 0 < int(large.sum()) < int((whole > 0).sum())
    assert torch.equal(kept, torch.where(large, whole, 0.0))
    assert every.sae_id != some.sae_id


def test_row_of_neurons_is_found_by_name_and_written_once(tiny_model: Callable[..., Any], store: Any) -> None:
    model = ms.load(tiny_model("mixtral"))
    for _ in range(2):
        register_neurons(store, neurons_as_features(model, 1))
    rows = store.fetch("SELECT name, architecture, d_sae, path, created_at FROM saes")
    assert rows == [("neurons of layer 1", "expert_neurons", 4 * 24 * 2, None, None)]


@pytest.mark.parametrize(
    ("family", "layer", "message"),
    [("mixtral", 9, "layer 9 has no router"), ("gpt_oss", 0, "are no latents"), ("dbrx", 0, "not told apart neuron by neuron")],
)  # fmt: skip
def test_neurons_that_are_no_latents_are_refused(family: str, layer: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        neurons_as_features(ms.load(build_tiny(family)), layer)
