"""Neurons, rotated neurons and an autoencoder on the same tokens at equal L0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.sae.experts.compare_neurons import compare_neurons
from moescope.sae.experts.neurons import neurons_as_features


def test_rotated_neurons_write_the_same_sum_along_other_axes(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("mixtral"))
    plain, turned = (neurons_as_features(model, 1, rotation=seed) for seed in (None, 3))
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    whole = plain.decode(plain.encode(x))
    found = turned.encode(x)
    assert torch.allclose(turned.decode(found), whole, atol=1e-5 * float(whole.abs().max()))
    assert not torch.allclose(found, plain.encode(x), atol=1e-2)
    assert float(found.square().sum()) == pytest.approx(float(plain.encode(x).square().sum()), rel=1e-4)


def test_all_three_are_read_on_the_same_tokens_at_equal_l0(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("mixtral")
    run = record_ids(module, token_ids([30] * 12), labels=["a", "b"] * 6)
    directions = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=1, keepdim=True)
    autoencoder = planted_autoencoder("blocks.1.hook_mlp_out", directions, threshold=0.8)
    found = compare_neurons(autoencoder, ms.load(module), run, store, progress=False)
    query = "SELECT s.architecture, sum(f.active), any_value(f.tokens) FROM features f JOIN saes s USING (sae_id) GROUP BY ALL"
    active = {kind: (int(total), int(tokens)) for kind, total, tokens in store.fetch(query)}
    assert {tokens for _, tokens in active.values()} == {12 * 29}
    own = active[None][0]
    assert own / (12 * 29) == pytest.approx(found.l0)
    for kind in ("expert_neurons", "rotated_expert_neurons"):
        assert active[kind][0] == pytest.approx(own, rel=0.02)


@pytest.mark.parametrize("site", ["blocks.0.hook_attn_out", "blocks.0.mlp.experts.hook_out"])
def test_autoencoder_of_another_place_is_refused(
    site: str, tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module = tiny_model("mixtral")
    run = record_ids(module, token_ids([8]))
    autoencoder = planted_autoencoder(site, torch.eye(32))
    with pytest.raises(InputError, match="take another one"):
        compare_neurons(autoencoder, ms.load(module), run, store, progress=False)
