"""Models in the hands of other libraries: edits act where the model they hold still computes, and are refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
import moescope.edits as e
from moescope.core.errors import InputError
from moescope.probes.edits.session import edited
from moescope.probes.edits.support import edit_support


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


CUTS = [
    e.Ablate(experts=[1, 2]),
    e.Ablate(experts=[1], how="route_around"),
    e.TopK(k=1),
    e.Scale(experts=[0], factor=3.0),
]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.kind)
def test_a_bridge_is_edited_as_the_model_in_it(
    bridge: Callable[..., Any], tiny_model: Callable[..., Any], cut: e.Edit, ids: torch.Tensor
) -> None:
    plain, bridged = ms.load(tiny_model("mixtral")), ms.load(bridge("mixtral"))
    with edited(plain, e.Intervention([cut])):
        expected = logits_of(plain, ids)
    before = logits_of(bridged, ids)
    with edited(bridged, e.Intervention([cut])):
        ours = logits_of(bridged, ids)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert (ours - before).abs().max() > 1e-3
    assert torch.equal(logits_of(bridged, ids), before)
    assert edit_support(bridged)["ablate zero"].layers == (0, 1)


def test_a_wrapper_of_nnsight_is_edited_as_the_model_in_it(tiny_model: Callable[..., Any], ids: torch.Tensor) -> None:
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
    module = tiny_model("qwen3_moe")
    with edited(ms.load(module), e.Intervention(CUTS[:1])):
        expected = logits_of(ms.load(module), ids)
    wrapped = ms.load(nnsight.NNsight(module))
    with edited(wrapped, e.Intervention(CUTS[:1])):
        assert torch.equal(logits_of(wrapped, ids), expected)


def test_a_hooked_transformer_is_refused_with_the_reason(hooked: Callable[..., Any]) -> None:
    model = ms.load(hooked(num_experts=4, experts_per_token=2))
    with pytest.raises(InputError, match="another library computes by itself"), edited(model, e.Intervention(CUTS)):
        pass
    assert not any(support.works for support in edit_support(model).values())
