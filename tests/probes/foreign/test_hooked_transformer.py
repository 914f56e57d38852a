"""A HookedTransformer as a live model: what is recorded is what TransformerLens' own hooks see, and what adds up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.core.sites import EXPERT_INDICES, EXPERT_OUT, ROUTER_LOGITS, Site
from moescope.probes.foreign.cache import run_with_cache
from moescope.probes.taps import sites_of, tapped

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed")

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"num_experts": 4, "experts_per_token": 2, "norm_topk_prob": True},
    "moe_unnormalised": {"num_experts": 5, "experts_per_token": 3, "norm_topk_prob": False},
    "gpt_oss": {"num_experts": 4, "experts_per_token": 2, "original_architecture": "GptOssForCausalLM"},
    "attention_only": {"attn_only": True},
    "parallel": {"parallel_attn_mlp": True},
    "gpt2": {"gated_mlp": False, "n_key_value_heads": None, "normalization_type": "LN", "act_fn": "gelu",
             "positional_embedding_type": "standard", "rotary_dim": None},
}  # fmt: skip
MOE = ("moe", "moe_unnormalised", "gpt_oss")


@pytest.mark.parametrize("kind", KINDS)
def test_sites_hold_what_its_own_cache_holds(kind: str, hooked: Callable[..., Any], ids: torch.Tensor) -> None:
    model = hooked(**KINDS[kind])
    with torch.no_grad():
        own_logits, own = model.run_with_cache(ids, attention_mask=torch.ones_like(ids))
        logits, cache = run_with_cache(ms.load(model), ids, names_filter=lambda _: True)
    assert torch.equal(logits, own_logits)
    shared = [name for name in cache if name in own and name.rpartition(".")[2] != "hook_expert_weights"]
    for name in shared:
        assert torch.equal(cache[name].flatten(), own[name].flatten()), name
    per_layer = {"dense": 10, "parallel": 10, "gpt2": 10, "attention_only": 8}.get(kind, 10)
    assert len(shared) == 2 * per_layer  # 4 of the stream but for attention only, 5 of heads, neurons or ids
    assert [s.kind for s in ms.load(model).anatomy.sublayers if s.layer == 1][1:] == (
        [] if kind == "attention_only" else ["moe" if kind in MOE else "dense"]
    )


@pytest.mark.parametrize("kind", MOE)
def test_slots_weighted_by_the_decision_are_the_output_of_the_layer(
    kind: str, hooked: Callable[..., Any], ids: torch.Tensor
) -> None:
    model = hooked(**KINDS[kind])
    given: list[torch.Tensor] = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0]))
    with torch.no_grad():
        own = model.run_with_cache(ids)[1]
        cache = run_with_cache(ms.load(model), ids)[1]
        for layer, block in enumerate(model.blocks):
            slots, weights = cache[f"blocks.{layer}.mlp.experts.hook_out"], cache["expert_weights", layer]
            output = own[f"blocks.{layer}.hook_mlp_out"]
            torch.testing.assert_close((slots * weights.unsqueeze(-1)).sum(2), output, rtol=0, atol=1e-6)
            # Each slot is that expert on that token, and its neurons are that expert's, whatever the order of computation.
            chosen = cache["expert_indices", layer]
            neurons = cache[f"blocks.{layer}.mlp.experts.hook_post"]
            for row, position, slot in ((0, 0, 0), (2, 8, 1), (1, 4, 0)):
                expert = block.mlp.experts[int(chosen[row, position, slot])]
                alone = expert(given[layer][row, position][None])[0]
                torch.testing.assert_close(slots[row, position, slot], alone, rtol=1e-5, atol=1e-6)
                through = expert.W_out(neurons[row, position, slot])
                torch.testing.assert_close(slots[row, position, slot], through, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MOE)
def test_the_decision_follows_from_the_router_logits(kind: str, hooked: Callable[..., Any], ids: torch.Tensor) -> None:
    model = hooked(**KINDS[kind])
    with torch.no_grad():
        cache = run_with_cache(ms.load(model), ids)[1]
    for layer in range(2):
        logits, k = cache["router_logits", layer], model.cfg.experts_per_token
        top = logits.topk(k, dim=-1)
        assert torch.equal(top.indices, cache["expert_indices", layer])
        weights = logits.softmax(-1).gather(-1, top.indices)
        weights = weights if kind == "moe_unnormalised" else weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(cache["expert_weights", layer], weights)


def test_an_edit_of_its_own_is_seen(hooked: Callable[..., Any], ids: torch.Tensor) -> None:
    model = hooked(**KINDS["moe"])
    live = ms.load(model)
    only_first = lambda scores, hook: torch.zeros_like(scores).index_fill(-1, torch.tensor([0]), 1.0)  # noqa: E731
    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.mlp.hook_expert_weights", only_first)]):
        cache = run_with_cache(live, ids)[1]
    assert bool((cache["expert_indices", 1][..., 0] == 0).all())
    assert bool((cache["expert_weights", 1][..., 0] == 1).all())
    assert not bool((cache["expert_indices", 0][..., 0] == 0).all())


@pytest.mark.parametrize("kind", MOE)
def test_weights_are_those_used_when_ids_are_edited(kind: str, hooked: Callable[..., Any], ids: torch.Tensor) -> None:
    """One class of layer takes an edited id's own weight, the other the weight of the id that stood there."""
    model = hooked(**KINDS[kind])
    other = lambda indices, hook: indices.roll(1, dims=0)  # noqa: E731
    name, output = "blocks.0.mlp.hook_expert_indices", "blocks.0.hook_mlp_out"
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, other)]):
        cache = run_with_cache(ms.load(model), ids)[1]
    slots, weights = cache["blocks.0.mlp.experts.hook_out"], cache["expert_weights", 0]
    torch.testing.assert_close((slots * weights.unsqueeze(-1)).sum(2), cache[output], rtol=0, atol=1e-6)


def test_hooks_are_gone_afterwards(hooked: Callable[..., Any], ids: torch.Tensor) -> None:
    model = hooked(**KINDS["moe"])
    live = ms.load(model)
    taps = tapped(live.module, live.anatomy, sites_of(live.module, live.anatomy), _fail)
    with pytest.raises(RuntimeError, match="on the way"), torch.no_grad(), taps:
        live.module(ids)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in live.module.modules())


def test_slots_alone_can_be_tapped_and_one_layer_alone(hooked: Callable[..., Any], ids: torch.Tensor) -> None:
    live = ms.load(hooked(**KINDS["moe"]))
    whole = run_with_cache(live, ids)[1]
    alone = run_with_cache(live, ids, names_filter="blocks.1.mlp.experts.hook_out")[1]
    assert list(alone) == ["blocks.1.mlp.experts.hook_out"]
    assert torch.equal(alone["expert_output", 1], whole["expert_output", 1])
    names = [ROUTER_LOGITS, EXPERT_INDICES, EXPERT_OUT]
    assert run_with_cache(live, ids, [str(Site(0, "mlp", name)) for name in names])[1].sites == sorted(
        Site(0, "mlp", name) for name in names
    )


def test_a_site_it_does_not_have_is_refused(hooked: Callable[..., Any], ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"no site blocks\.0\.mlp\.hook_router_logits"):
        run_with_cache(ms.load(hooked()), ids, "router_logits.0")


def test_a_recorded_run_holds_the_decisions_of_real_tokens_only(hooked: Callable[..., Any], store: ms.Store) -> None:
    model = hooked(**KINDS["moe"])
    sequences = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
    run = ms.record(ms.load(model), ms.Corpus.from_token_ids(sequences), store, name="hooked", batch_size=3)
    assert run.status == "complete"
    rows = run.table("routing").df().sort_values(["layer", "token"])
    assert len(rows) == 2 * sum(map(len, sequences))
    for layer in range(2):
        expected = []
        for sequence in sequences:  # alone and without padding
            indices = model.run_with_cache(torch.tensor([sequence]))[1][f"blocks.{layer}.mlp.hook_expert_indices"]
            expected += [set(row.tolist()) for row in indices]
        assert [set(e) for e in rows[rows.layer == layer].experts] == expected


def test_it_is_not_moved_nor_made_to_generate(hooked: Callable[..., Any], store: ms.Store) -> None:
    model = hooked()
    with pytest.raises(InputError, match=r"recorded where it is.*its own \.to\(\)"):
        ms.load(model, dtype="bfloat16")
    with pytest.raises(InputError, match="cannot continue texts"):
        ms.record(ms.load(model), ms.Corpus.from_token_ids([[3, 4]]), store, name="run", generate=2)


def test_its_settings_say_whose_model_it_is(hooked: Callable[..., Any]) -> None:
    live = ms.load(hooked())
    assert (live.name, live.anatomy.architecture, live.anatomy.context) == ("hooked", "HookedTransformer", 32)
    assert live.settings()["library"] == "transformer_lens.HookedTransformer"


def _fail(_site: Site, _tensors: dict[str, torch.Tensor]) -> None:
    raise RuntimeError("on the way")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "attention_only"])
def test_inputs_of_mlps_are_what_their_modules_are_given(
    kind: str, hooked: Callable[..., Any], ids: torch.Tensor
) -> None:
    model = hooked(**KINDS[kind])
    given: list[torch.Tensor] = []
    hooks = [b.mlp.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0])) for b in model.blocks]
    with torch.no_grad():
        cache = run_with_cache(ms.load(model), ids, names_filter=lambda _: True)[1]
    for hook in hooks:
        hook.remove()
    for layer in range(2):
        assert torch.equal(cache[f"blocks.{layer}.mlp.hook_in"].flatten(), given[layer].flatten())


def test_a_pass_stops_after_a_block(hooked: Callable[..., Any], ids: torch.Tensor) -> None:
    from moescope.probes.forward import DeviceBatch
    from moescope.probes.stopping import check_same, run_until

    live = ms.load(hooked(**KINDS["dense"]))
    batch = DeviceBatch(ids, torch.ones_like(ids, dtype=torch.bool))
    sites = [Site(0, "", "hook_resid_post"), Site(0, "mlp", "hook_in"), Site(0, "attn", "hook_z")]
    check_same(live, batch, sites, 0)
    seen: list[Site] = []
    with torch.no_grad(), tapped(live.module, live.anatomy, live.sites, lambda site, _: seen.append(site)):
        run_until(live, batch, 0)
    assert {site.layer for site in seen} == {0}
