"""Taps hand over what passes their sites, and leave nothing behind however their context ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moescope as ms
from moescope.core.sites import EXPERT_INDICES, EXPERT_OUT, RESID_POST, ROUTER_LOGITS, Site
from moescope.probes.taps import tapped

MOE_SITES = [
    Site(0, "", RESID_POST),
    Site(0, "mlp", ROUTER_LOGITS),
    Site(0, "mlp", EXPERT_INDICES),
    Site(1, "mlp", EXPERT_INDICES),
    Site(0, "mlp", EXPERT_OUT),
    Site(1, "mlp", EXPERT_OUT),
]


def traces(module: Any) -> dict[str, Any]:
    """Everything a tap could leave on a model: hooks, attributes, configuration, mode."""
    return {
        "hooks": {
            name: [len(hooks) for key, hooks in vars(m).items() if key.endswith("_hooks")]
            for name, m in module.named_modules()
        },
        "attributes": {name: sorted(vars(m)) for name, m in module.named_modules()},
        "config": copy.deepcopy(vars(module.config)),
        "experts": module.config._experts_implementation,
        "training": module.training,
    }


def no_hooks(module: Any) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.fixture
def qwen(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("qwen3_moe")


def run_once(module: Any, ids: list[list[int]]) -> Any:
    with torch.no_grad():
        return module(input_ids=torch.tensor(ids), use_cache=False).logits


def test_nothing_remains_after_the_context(qwen: Any, token_ids: Callable[..., Any]) -> None:
    before, seen = traces(qwen), []
    with tapped(qwen, ms.load(qwen).anatomy, MOE_SITES, lambda site, _: seen.append(site)):
        assert not no_hooks(qwen)
        assert traces(qwen) != before
        run_once(qwen, token_ids([4]))
    assert sorted(seen) == sorted(MOE_SITES)
    assert no_hooks(qwen)
    assert traces(qwen) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_remains_after_an_error_inside(
    qwen: Any, error: type[BaseException], token_ids: Callable[..., Any]
) -> None:
    before = traces(qwen)

    def failing(site: Site, _tensors: Any) -> None:
        if site.tensor == EXPERT_OUT:
            raise error("from within a forward pass")

    with pytest.raises(error), tapped(qwen, ms.load(qwen).anatomy, MOE_SITES, failing):
        run_once(qwen, token_ids([4]))
    assert no_hooks(qwen)
    assert traces(qwen) == before


@pytest.mark.parametrize("missing", [Site(9, "mlp", EXPERT_INDICES), Site(9, "", RESID_POST), Site(0, "mlp", "hook_x")])
def test_nothing_remains_after_a_site_that_is_not_there(qwen: Any, missing: Site) -> None:
    before = traces(qwen)
    anatomy = ms.load(qwen).anatomy
    with (
        pytest.raises(ms.InputError, match=str(missing).replace(".", r"\.")),
        tapped(qwen, anatomy, [*MOE_SITES, missing], lambda *_: None),
    ):
        pytest.fail("the context must not begin")
    assert traces(qwen) == before


def test_a_second_recording_within_a_first_is_refused_and_the_first_goes_on(
    qwen: Any, token_ids: Callable[..., Any]
) -> None:
    ids, seen = token_ids([6]), []
    plain, before, anatomy = run_once(qwen, ids), traces(qwen), ms.load(qwen).anatomy
    with tapped(qwen, anatomy, MOE_SITES, lambda site, _: seen.append(site)):
        within = traces(qwen)
        with (
            pytest.raises(ms.InputError, match="already being recorded"),
            tapped(qwen, anatomy, MOE_SITES, lambda *_: None),
        ):
            pytest.fail("the context must not begin")
        assert traces(qwen) == within
        assert torch.equal(run_once(qwen, ids), plain)
    assert sorted(seen) == sorted(MOE_SITES)
    assert traces(qwen) == before
    assert torch.equal(run_once(qwen, ids), plain)


def test_record_within_taps_is_refused_and_leaves_no_run(
    qwen: Any, store: Any, token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    before = traces(qwen)
    with (
        tapped(qwen, ms.load(qwen).anatomy, MOE_SITES, lambda *_: None),
        pytest.raises(ms.MoescopeError, match="already being recorded"),
    ):
        record_ids(qwen, token_ids([4]))
    assert traces(qwen) == before
    assert [run.status for run in store.runs()] in ([], ["failed"])


def test_nothing_remains_after_recording(
    qwen: Any, token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    before = traces(qwen)
    record_ids(qwen, token_ids([4, 9, 3]), batch_size=2)
    assert no_hooks(qwen)
    assert traces(qwen) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_remains_after_a_recording_that_broke(
    qwen: Any, error: type[BaseException], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    class Breaking(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 4:
                raise error("batch")
            return self.inner(*args, **kwargs)

    # The final norm, which holds no tap, breaks in the fourth pass.
    qwen.model.norm = Breaking(qwen.model.norm)
    before = traces(qwen)
    with pytest.raises((ms.RunError, KeyboardInterrupt)):
        record_ids(qwen, token_ids([4, 9, 3, 8, 5]), batch_size=1)
    after = traces(qwen)
    assert no_hooks(qwen)
    assert after == before


def test_a_dense_model_says_that_it_has_no_router_sites(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("llama")
    with (
        pytest.raises(ms.InputError, match="this model is dense"),
        tapped(module, ms.load(module).anatomy, [Site(0, "mlp", EXPERT_INDICES)], lambda *_: None),
    ):
        pytest.fail("the context must not begin")


class QuantisedExperts(nn.Module):
    """Experts of eight-bit weights, as a library for quantised inference puts them in place of the model's own."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = plain.num_experts, plain.act_fn
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(plain, name).detach()
            scale = weight.abs().amax() / 127
            setattr(self, f"{name}_scale", scale)
            setattr(self, name, nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False))

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        up, down = (getattr(self, n).float() * getattr(self, f"{n}_scale") for n in ("gate_up_proj", "down_proj"))
        out = torch.zeros_like(hidden_states)
        for slot in range(top_k_index.shape[1]):
            ids = top_k_index[:, slot]
            gate, rise = torch.einsum("th,teh->te", hidden_states, up[ids]).chunk(2, -1)
            mapped = torch.einsum("te,the->th", self.act_fn(gate) * rise, down[ids])
            out += mapped * top_k_weights[:, slot, None]
        return out


def test_of_quantised_experts_the_routing_is_recorded_and_the_inside_refused_with_the_reason(
    qwen: Any, token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    for layer in qwen.model.layers:
        layer.mlp.experts = QuantisedExperts(layer.mlp.experts)
    run = record_ids(qwen, token_ids((5, 9)))
    assert run.status == "complete"
    assert run.rows("routing") == 14 * 2
    assert "quantised (int8)" in run.info["summary"]["left_out"]["experts"]
    with (
        pytest.raises(ms.InputError, match=r"cannot be read: its weights are quantised.*without the probe"),
        tapped(qwen, ms.load(qwen).anatomy, [Site(0, "mlp", EXPERT_OUT)], lambda *_: None),
    ):
        pytest.fail("the context must not begin")


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_slot_outputs_are_each_experts_own_output_and_sum_to_the_routed_output(
    family: str,
    experts: str,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    """Against plain products of the experts' weight slices in float64, and against what the module gave untapped."""
    module, sequences = tiny_model(family, experts=experts), token_ids([9])
    (plain,) = plain_passes(tiny_model(family, experts=experts), sequences)
    layers, seen = sorted(plain.experts), {}
    sites = [Site(layer, "mlp", EXPERT_OUT) for layer in layers]
    with tapped(module, ms.load(module).anatomy, sites, lambda site, tensors: seen.update({site.layer: tensors})):
        run_once(module, sequences)
    assert sorted(seen) == layers
    for layer in layers:
        hidden, ids, weights, routed = (x.double() if x.is_floating_point() else x for x in plain.experts[layer])
        held = module.model.layers[layer].mlp.experts
        assert torch.equal(seen[layer]["indices"], ids)
        slots = seen[layer]["out"].double()
        total = torch.zeros_like(routed)
        for token in range(len(ids)):
            for slot, expert in enumerate(ids[token].tolist()):
                gate, up = (held.gate_up_proj[expert].double() @ hidden[token]).chunk(2)
                own = held.down_proj[expert].double() @ (torch.nn.functional.silu(gate) * up)
                torch.testing.assert_close(slots[token, slot], own, rtol=1e-5, atol=1e-5)
                total[token] += weights[token, slot] * own
        torch.testing.assert_close(total, routed, rtol=1e-5, atol=1e-5)
