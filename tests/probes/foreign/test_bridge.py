"""A TransformerBridge as a live model: what is recorded is what runs inside the bridge, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.core.site_names import spellings
from moescope.core.sites import (
    DENSE_POST,
    EXPERT_INDICES,
    EXPERT_OUT,
    EXPERT_POST,
    EXPERT_WEIGHTS,
    HEAD_Q,
    HEAD_V,
    HEAD_Z,
    RESID_POST,
    ROUTER_LOGITS,
    SHARED_OUT,
    Site,
)
from moescope.probes.anatomy import find_anatomy
from moescope.probes.foreign.cache import run_with_cache
from moescope.probes.foreign.taps import ForeignTaps
from moescope.probes.taps import sites_of

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed")

# TransformerLens 3.9 shows none of these; in qwen2_moe it shows other tensors under two of the names (below).
OURS_ALONE = {EXPERT_INDICES, EXPERT_WEIGHTS, EXPERT_OUT, EXPERT_POST, SHARED_OUT}
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "deepseek_v3", "llama", "gpt2")
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"num_key_value_heads": 4},  # grouped heads, which GPT-2 does not have, the bridge would believe
    # Around a model with sdpa, TransformerLens 3.9's latent attention is given no mask and looks ahead.
    "deepseek_v3": {"attn_implementation": "eager"},
}
# Norms after sublayers, factors on them, other ways to positions, sinks, a state-space mixer.
OTHERS = ("gemma2", "granite", "bloom", "gpt_neox", "gpt_oss", "jamba")
MODES = (None, "unprocessed", "processed")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sites_hold_what_its_own_cache_holds(
    family: str, mode: str | None, bridge: Callable[..., Any], ids: torch.Tensor
) -> None:
    bridged = bridge(family, mode, **SETTINGS.get(family, {}))
    live = ms.load(bridged)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        # A key-value cache changes the layout of keys in memory, and with it the last bits.
        own_logits, own = bridged.run_with_cache(ids, attention_mask=mask, use_cache=False)
        logits, cache = run_with_cache(live, ids, names_filter=lambda _: True)
        plain = bridged(ids, attention_mask=mask, use_cache=False)
    assert torch.equal(logits, own_logits)
    assert torch.equal(plain, own_logits)  # and nothing is left behind
    compared = 0
    for site in cache.sites:
        if site.tensor in OURS_ALONE:
            continue
        named = [name for name in spellings(site) if name in own]
        assert named, f"{site} is in no cache of TransformerLens"
        for name in named:
            compared += 1
            shown = own[name]
            if family == "deepseek_v3" and site.tensor == HEAD_V:
                shown = shown.transpose(1, 2)  # heads before positions
            assert torch.equal(cache[site].flatten(), shown.flatten()), name
            if not (family == "deepseek_v3" and site.tensor == HEAD_Z):  # split into heads of another width
                assert cache[site].shape in (shown.shape, (*ids.shape, shown.shape[-1])), name
    # 4 sites of the stream and 5 of heads a layer (3 in latent attention), the input of the MLP, router logits or neurons; most
    # by several names
    per_layer = 9 if family == "deepseek_v3" else 11
    assert len(cache) - sum(s.tensor in OURS_ALONE for s in cache.sites) == per_layer * live.anatomy.n_layers
    assert compared >= 13 * live.anatomy.n_layers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_slots_and_shared_experts_add_up_to_the_output(
    family: str, mode: str | None, bridge: Callable[..., Any], ids: torch.Tensor
) -> None:
    bridged = bridge(family, mode)
    live = ms.load(bridged)
    with torch.no_grad():
        cache = run_with_cache(live, ids)[1]
        own = bridged.run_with_cache(ids, attention_mask=torch.ones_like(ids))[1]
    assert live.anatomy.moe_layers
    for layer in live.anatomy.moe_layers:
        routed = cache[f"blocks.{layer}.mlp.experts.hook_out"] * cache["expert_weights", layer].unsqueeze(-1)
        total = routed.sum(2)
        if family in ("qwen2_moe", "deepseek_v3"):
            total = total + cache[f"blocks.{layer}.mlp.shared_expert.hook_out"]
        expected = own[f"blocks.{layer}.mlp.hook_out"]
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_decisions_are_those_that_the_router_gave(bridge: Callable[..., Any], ids: torch.Tensor) -> None:
    bridged = bridge("qwen3_moe")
    seen: list[Any] = []
    gate = bridged.original_model.model.layers[1].mlp.gate
    handle = gate.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        cache = run_with_cache(ms.load(bridged), ids)[1]
    handle.remove()
    ((_, weights, indices),) = seen
    assert torch.equal(cache["expert_indices", 1].flatten(0, 1), indices)
    assert torch.equal(cache["expert_weights", 1].flatten(0, 1), weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_anatomy_is_that_of_the_model_before_it_was_wrapped(
    family: str, bridge: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    plain, live = find_anatomy(tiny_model(family)), ms.load(bridge(family))
    bridged = live.anatomy
    assert (bridged.d_model, bridged.n_layers, bridged.context) == (plain.d_model, plain.n_layers, plain.context)
    assert bridged.parameters - plain.parameters == plain.vocabulary  # the bridge gives the unembedding a bias
    assert len(bridged.sublayers) == len(plain.sublayers)
    for found, expected in zip(bridged.sublayers, plain.sublayers, strict=True):
        for name in ("layer", "block", "kind", "n_experts", "top_k", "n_shared", "d_expert", "reader", "unreachable"):
            assert getattr(found, name) == getattr(expected, name), name
        for name in ("path", "router_path", "experts_path", "logits_path"):
            place, before = getattr(found, name), getattr(expected, name)
            assert (place and place.replace("._original_component", "")) == before
            assert place is None or live.module.get_submodule(place) is not None
        if found.kind == "attention":  # computed by the wrapper, not by what it wraps
            assert type(live.module.get_submodule(found.path)).__module__.startswith("transformer_lens.")
        if found.kind == "moe":
            experts = live.module.get_submodule(found.experts_path or "")
            assert type(experts).__module__.startswith("transformers.")


def test_an_edit_of_its_own_is_seen(bridge: Callable[..., Any], ids: torch.Tensor) -> None:
    bridged = bridge("qwen3_moe")
    live = ms.load(bridged)
    zero = lambda tensor, hook: torch.zeros_like(tensor)  # noqa: E731
    with torch.no_grad(), bridged.hooks(fwd_hooks=[("blocks.0.hook_out", zero), ("blocks.1.attn.q.hook_out", zero)]):
        cache = run_with_cache(live, ids)[1]
    for name in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_q"):
        assert not bool(cache[name].any()), name
    assert bool(cache["blocks.0.attn.hook_q"].any())


def test_the_module_a_bridge_was_made_of_is_known_as_bridged(bridge: Callable[..., Any], ids: torch.Tensor) -> None:
    bridged = bridge("olmoe")
    from_bridge, from_module = ms.load(bridged), ms.load(bridged.original_model)
    assert from_module.anatomy == from_bridge.anatomy
    assert from_module.settings()["library"] == "transformer_lens.TransformerBridge"
    assert run_with_cache(from_module, ids)[1].sites == run_with_cache(from_bridge, ids)[1].sites
    assert (from_bridge.tokenizer, from_module.tokenizer) == (bridged.tokenizer, None)


@pytest.mark.parametrize(("mode", "processed"), [(None, False), ("unprocessed", False), ("processed", True)])
def test_settings_say_whether_weights_were_processed(
    mode: str | None, processed: bool, bridge: Callable[..., Any]
) -> None:
    settings = ms.load(bridge("llama", mode)).settings()
    assert (settings["weights_processed"], settings["attention"]) == (processed, "transformer_lens")


def test_a_recorded_run_equals_that_of_the_plain_model(
    bridge: Callable[..., Any], tiny_model: Callable[..., Any], store: ms.Store
) -> None:
    corpus = ms.Corpus.from_token_ids([[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]])
    rows = {}
    for name, model in (("plain", tiny_model("qwen3_moe")), ("bridge", bridge("qwen3_moe"))):
        run = ms.record(ms.load(model), corpus, store, name=name, batch_size=2)
        assert run.status == "complete", name
        rows[name] = run.table("routing").df()
    for name in ("token", "layer", "experts"):
        assert rows["plain"][name].map(str).equals(rows["bridge"][name].map(str)), name


def test_neurons_of_dense_layers_are_no_site_where_the_name_means_the_output(
    bridge: Callable[..., Any], ids: torch.Tensor
) -> None:
    live = ms.load(bridge("deepseek_v3"))
    cache = run_with_cache(live, ids)[1]
    assert [s.layer for s in cache.sites if s.tensor == DENSE_POST] == [0]
    assert cache["post", 0].shape == (*ids.shape, 48)
    # On MoE layers, and on dense ones that an adapter does not know as such, the bridge's hook_post is its hook_out.
    mlp = live.module.get_submodule("model.layers.0").mlp
    object.__setattr__(mlp, "hook_post", mlp.hook_out)
    assert not [s for s in sites_of(live.module, live.anatomy) if s.tensor == DENSE_POST]


def test_only_the_inside_of_routed_layers_is_left_to_other_taps() -> None:
    taps = ForeignTaps({}, whole=False)
    left = [Site(0, "mlp", ROUTER_LOGITS), Site(1, "mlp", EXPERT_OUT)]
    with taps.tap(left, lambda _site, _tensors: None) as given:
        assert given == left
    for site in (Site(0, "attn", HEAD_Q), Site(0, "", RESID_POST)):
        with pytest.raises(InputError, match="no site"), taps.tap([site], lambda _site, _tensors: None):
            pass
        assert site not in taps.sites(own=[site])
    assert taps.sites(own=left) == left


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_site_means_the_same_in_the_plain_model(
    family: str, bridge: Callable[..., Any], any_model: Callable[..., Any], ids: torch.Tensor
) -> None:
    """The bridge computes attention its own way, so values agree to rounding only."""
    settings = SETTINGS.get(family, {})
    plain, bridged = ms.load(any_model(family, **settings)), ms.load(bridge(family, **settings))
    with torch.no_grad():
        ours = run_with_cache(plain, ids, names_filter=lambda _: True)[1]
        theirs = run_with_cache(bridged, ids, names_filter=lambda _: True)[1]
    assert theirs.sites == sites_of(bridged.module, bridged.anatomy)  # each has fired
    assert ours.sites == theirs.sites
    for site in ours.sites:
        torch.testing.assert_close(ours[site], theirs[site], rtol=1e-3, atol=1e-4, msg=lambda m, s=site: f"{s}: {m}")
