"""First-order estimates against finite differences, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.probes.batches import BatchPlan
from moescope.probes.sweeps.screening import screen

FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")
LENGTHS = (9, 6, 1)
STEP = 3e-3  # norms compute in float32 also in a float64 model: a smaller step would measure their rounding


def _precise(module: Any) -> Any:
    """The same weights in float64, computed expert by expert."""
    module.set_experts_implementation("eager")
    return module.double()


def _loss(module: Any, row: list[int]) -> float:
    if len(row) < 2:
        return 0.0
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([row]), use_cache=False).logits[0].double()
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="sum"))


def _moved(module: Any, layer: int, row: list[int], change: Callable[[Any, Any], Any]) -> float:
    """Loss of one sequence with the weights given to the experts of a layer changed on their way."""
    experts = module.model.layers[layer].mlp.experts
    plain = experts.forward

    def forward(hidden: Any, ids: Any, weights: Any) -> Any:
        return plain(hidden, ids, change(ids, weights))

    experts.forward = forward
    try:
        return _loss(module, row)
    finally:
        del experts.forward


def _difference(module: Any, layer: int, row: list[int], change: Callable[[float], Callable[[Any, Any], Any]]) -> float:
    """Derivative at 0 of the loss by the size of a change, from both sides."""
    up, down = (_moved(module, layer, row, change(sign * STEP)) for sign in (1, -1))
    return (up - down) / (2 * STEP)


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_the_derivatives_that_finite_differences_give(
    family: str, swept_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    model, ids, module = ms.load(swept_model(family)), token_ids(LENGTHS, seed=2), _precise(swept_model(family))
    plan = BatchPlan(ms.Corpus.from_token_ids(ids), None, 2, 64, 97)
    found = screen(model, plan)
    for (layer, _), estimates in found.estimates.items():
        for expert in range(len(estimates)):
            for number, row in enumerate(ids):
                less = _difference(
                    module,
                    layer,
                    row,
                    lambda h, e=expert: lambda ids, weights: torch.where(ids == e, 1 - h, 1) * weights,
                )
                assert estimates[expert, number] == pytest.approx(less, rel=2e-2, abs=5e-3)
    assert (found.n == [8, 5, 0]).all()
    assert sum(np.abs(e).sum() for e in found.estimates.values()) > 1


def test_renormalise_is_screened_with_the_other_slots_growing(
    swept_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    module = _precise(swept_model("olmoe"))
    ids = token_ids((8, 5), seed=4)
    plan = BatchPlan(ms.Corpus.from_token_ids(ids), None, 2, 64, 97)
    found = screen(ms.load(swept_model("olmoe")), plan, how="renormalise", layers=[1])
    assert list(found.estimates) == [(1, "mlp")]

    def change(h: float, expert: int) -> Callable[[Any, Any], Any]:
        def smaller(ids: Any, weights: Any) -> Any:
            gone = torch.where(ids == expert, h * weights, 0)
            left = torch.where(ids == expert, 0, weights)
            hit = (ids == expert).any(-1, keepdim=True)
            return torch.where(
                hit, (weights - gone) + left * gone.sum(-1, keepdim=True) / left.sum(-1, keepdim=True), weights
            )

        return smaller

    for expert in range(8):
        for number, row in enumerate(ids):
            less = _difference(module, 1, row, lambda h, e=expert: change(h, e))
            assert found.estimates[1, "mlp"][expert, number] == pytest.approx(less, rel=2e-2, abs=5e-3)


def test_model_is_as_it_was_and_decisions_are_counted(
    swept_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    module = swept_model("qwen3_moe")
    ids = token_ids((7, 7))
    before = _loss(module, ids[0])
    found = screen(ms.load(module), BatchPlan(ms.Corpus.from_token_ids(ids), None, 2, 64, 97))
    assert _loss(module, ids[0]) == before
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert not any(m._forward_pre_hooks for m in module.modules())
    for chosen in found.chosen.values():
        assert chosen.sum(0).tolist() == [14, 14]  # two slots a token, padding left out


def test_experts_without_weights_of_their_tokens_are_refused(swept_model: Callable[..., Any]) -> None:
    model = ms.load(swept_model("qwen3_moe"))
    import dataclasses

    anatomy = dataclasses.replace(
        model.anatomy,
        sublayers=tuple(
            dataclasses.replace(s, reader="sorted_slots") if s.kind == "moe" else s for s in model.anatomy.sublayers
        ),
    )
    vars(model)["anatomy"] = anatomy
    with pytest.raises(InputError, match="cannot be screened"):
        screen(model, BatchPlan(ms.Corpus.from_token_ids([[1, 2]]), None, 1, 8, 97))
