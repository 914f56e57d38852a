"""What changes nothing changes no bit; and edits that can be made by hand on the weights give what the hand gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
import moescope.edits as e
from moescope.probes.edits.session import edited

FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v3")
EXPERTS = {"mixtral": 4, "qwen2_moe": 6}


def logits_of(module: Any, ids: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def some_ids(rows: int = 3, positions: int = 20) -> torch.Tensor:
    return torch.randint(1, 97, (rows, positions), generator=torch.Generator().manual_seed(5))


def nothing(family: str) -> dict[str, list[e.Edit]]:
    n = EXPERTS.get(family, 8)
    k = {"olmoe": 3, "deepseek_v3": 3}.get(family, 2)
    hows = ("zero", "route_around", "renormalise", "copy")
    return {
        "empty": [],
        **{f"ablate {how} at 0": [e.Ablate(experts=[0, 1], how=how, strength=0)] for how in hows},
        "force at 0": [e.Force(experts=0, strength=0)],
        "bias at 0": [e.Bias(experts=0, value=9.0, strength=0)],
        "bias of 0": [e.Bias(experts=0, value=0.0)],
        "scale 1": [e.Scale(experts=range(n), factor=1.0)],
        "keep all": [e.Keep(experts=range(n))],
        "top_k own": [e.TopK(k=k)],
        "top_k at 0": [e.TopK(k=1, strength=0)],
        "rank_routing at 0": [e.RankRouting(strength=0)],
        "top_p 1": [e.TopP(p=1.0)],
        "mix of share 0": [e.MixRouting(reference=[1 / n] * n, share=0.0)],
        "random at 0": [e.RandomRouting(strength=0)],
        "swap at 0": [e.SwapExperts(strength=0)],
        "swap with itself": [e.SwapExperts(first=1, second=1)],
        "all of these": [e.Keep(experts=range(n)), e.TopK(k=k), e.Scale(experts=0, factor=1), e.TopP(p=1.0)],
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_that_change_nothing_change_no_bit(tiny_model: Callable[..., Any], family: str, dtype: str) -> None:
    module = tiny_model(family, dtype=dtype)
    model, ids = ms.load(module), some_ids()
    plain = logits_of(module, ids)
    for name, edits_ in nothing(family).items():
        with edited(model, e.Intervention(edits_)):
            assert torch.equal(logits_of(module, ids), plain), name
    everything = [e.Intervention(edits_) for edits_ in nothing(family).values()]
    with edited(model, everything) as session:
        session.assign([3, 9, 15])
        assert torch.equal(logits_of(module, ids), plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablate_zero_is_a_zeroed_down_projection(
    tiny_model: Callable[..., Any], family: str, implementation: str, dtype: str
) -> None:
    module = tiny_model(family, dtype=dtype, experts=implementation)
    model, ids = ms.load(module), some_ids()
    with edited(model, e.Intervention([e.Ablate(experts=[0, 2])])):
        ours = logits_of(module, ids)
    plain = logits_of(module, ids)
    with torch.no_grad():
        for layer in model.anatomy.moe_layers:
            module.model.layers[layer].mlp.experts.down_proj[[0, 2]] = 0
    by_hand = logits_of(module, ids)
    assert torch.equal(ours, by_hand)
    assert not torch.equal(ours, plain)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "qwen2_moe"])
def test_route_around_is_a_router_row_that_never_wins(tiny_model: Callable[..., Any], family: str) -> None:
    """By hand: the router's row gives −10,000 for whatever comes in (a hook on its input's first channel would do as well)."""
    module = tiny_model(family)
    model, ids = ms.load(module), some_ids()
    with edited(model, e.Intervention([e.Ablate(experts=[1], how="route_around")])):
        ours = logits_of(module, ids)
    for layer in module.model.layers:
        _mask_row(layer.mlp.gate, 1)
    by_hand = logits_of(module, ids)
    torch.testing.assert_close(ours, by_hand, atol=1e-5, rtol=1e-5)


def _mask_row(gate: Any, expert: int) -> None:
    linear = torch.nn.functional.linear
    plain = gate.forward

    def forward(*args: Any) -> Any:
        def masked(x: Any, weight: Any, bias: Any = None) -> Any:
            out = linear(x, weight, bias)
            if weight is gate.weight:
                out[..., expert] = -1e4
            return out

        torch.nn.functional.linear = masked
        try:
            return plain(*args)
        finally:
            torch.nn.functional.linear = linear

    gate.forward = forward


@pytest.mark.parametrize(
    ("family", "key", "k"), [("qwen3_moe", "num_experts_per_tok", 4), ("olmoe", "num_experts_per_tok", 1)]
)
def test_top_k_is_the_configuration_s(tiny_model: Callable[..., Any], family: str, key: str, k: int) -> None:
    module, other = tiny_model(family), tiny_model(family, **{key: k})
    ids = some_ids()
    with edited(ms.load(module), e.Intervention([e.TopK(k=k)])):
        ours = logits_of(module, ids)
    torch.testing.assert_close(ours, logits_of(other, ids), atol=1e-5, rtol=1e-5)


def test_copy_and_mean_put_what_they_say_in_the_place_of_the_output(
    tiny_model: Callable[..., Any], plain_passes: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    module = tiny_model("qwen3_moe")
    model = ms.load(module)
    sequences = token_ids([11, 11])
    means = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    for how, strength in (("copy", 1.0), ("mean", 1.0), ("mean", 0.25), ("copy", 0.5)):
        given = means.tolist() if how == "mean" else None
        edit = e.Ablate(layer=0, experts=[3, 5], how=how, means=given, strength=strength)  # type: ignore[arg-type]  # one of two
        with edited(model, e.Intervention([edit])):
            (batch,) = plain_passes(module, sequences)
        (plain,) = plain_passes(module, sequences)
        hidden, ids, weights, whole = plain.experts[0]
        experts = module.model.layers[0].mlp.experts
        expected = whole.clone()
        for token in range(len(ids)):
            for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
                if expert in (3, 5):
                    one = torch.tensor([[expert]])
                    with torch.no_grad():
                        own = experts(hidden[token, None], one, torch.ones(1, 1))[0]
                    put = hidden[token] if how == "copy" else means[[3, 5].index(expert)]
                    expected[token] += strength * weight * (put - own)
        resid, before = batch.resid[0].flatten(0, 1), plain.resid[0].flatten(0, 1)
        torch.testing.assert_close(resid - before, expected - whole, atol=1e-5, rtol=1e-4)


def test_weights_are_bit_identical_and_no_hook_is_left(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("olmoe")
    model, ids = ms.load(module), some_ids()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    hooks = hooks_of(module)
    attributes = {name: set(vars(m)) for name, m in module.named_modules()}
    plain = logits_of(module, ids)
    edits_ = [e.Ablate(experts=0), e.Keep(experts=range(5)), e.FakeQuant(experts=[1], bits=2), e.MaskHead(heads=0)]

    def failing() -> None:
        with edited(model, e.Intervention([*edits_, e.Add(vector=[1.0] * 32)])):
            assert not torch.equal(logits_of(module, ids), plain)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(logits_of(module, ids), plain)
    assert hooks_of(module) == hooks
    assert {name: set(vars(m)) for name, m in module.named_modules()} == attributes


def hooks_of(module: Any) -> list[int]:
    return [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs) for m in module.modules()
    ]
