"""Every site of every family that is no router or expert slot, against what the plain model does, and TransformerLens."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moescope.core.sites import (
    ATTN_OUT,
    DENSE_POST,
    EXPERT_OUT,
    HEAD_K,
    HEAD_Q,
    HEAD_V,
    HEAD_Z,
    MLP_IN,
    MLP_OUT,
    PATTERN,
    RESID_POST,
    RESID_PRE,
    SHARED_OUT,
    Site,
)
from moescope.probes.anatomy import Anatomy, find_anatomy
from moescope.probes.attention_taps import attention_sites, tap_attention
from moescope.probes.families.tiny import ENCODER_DECODER_TYPES, build_tiny, moe_model_types
from moescope.probes.shared_expert_taps import routed_scale
from moescope.probes.stream_taps import stream_sites, tap_stream
from moescope.probes.taps import tapped

LENGTH, PADDED = 19, 15  # of the second row only so many positions are real
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 48),
    "num_key_value_heads": 2,
}
_MAMBA = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 4}
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8}
_AS_THEY_ARE = (
    *("bloom", "cohere", "diffllama", "glm4", "gpt_neox_japanese", "granite"),
    *("hyperclovax", "llama", "mpt", "nemotron", "olmo2", "openai-gpt", "opt", "persimmon"),
    *("phi", "phi3", "qwen3", "stablelm", "starcoder2", "xglm", "biogpt", "modernbert-decoder"),
)
# name of a dense model → its type, and what it needs besides
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in _AS_THEY_ARE},
    "codegen": ("codegen", {"rotary_dim": 4}),
    "falcon": ("falcon", {}),
    "falcon by head": ("falcon", {"multi_query": False}),
    "falcon in groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon one after the other": ("falcon", {"parallel_attn": False, "alibi": True}),
    "falcon_h1": ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 4}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("gemma3_text", {"head_dim": 8, "sliding_window": 8}),
    "gemma3n_text": (
        "gemma3n_text",
        {
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "intermediate_size": [24, 24],
            "activation_sparsity_pattern": [0.0, 0.0],
            "laurel_rank": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "altup_num_inputs": 2,
            "head_dim": 8,
        },
    ),
    "gpt2": ("gpt2", {"num_key_value_heads": 4}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_bigcode by head": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "helium": ("helium", {"head_dim": 8}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"expand": 2, **_MAMBA}),
    "minicpm3": ("minicpm3", {**_LATENT, "qk_nope_head_dim": 8}),
}
MOE = (*moe_model_types(), *ENCODER_DECODER_TYPES)
FAMILIES = (*MOE, *DENSE)
# Blocks that do more to the stream than add to it; how they make it up is written out below.
OTHER_STREAMS = ("beam", "doge", "gemma4_text", "minimax", "openai-gpt", "zaya")
NO_STREAM = ("deepseek_v4", "gemma3n_text", "hy_v4", "inkling2_text", "qwen4_exp_text")
# A state-space mixer stands beside attention, and its output has no site.
TWO_MIXERS = ("falcon_h1",)


@dataclass
class Passed:
    """A model, one batch through it as it is, and one with every tap of streams and attention on."""

    model: Any
    anatomy: Anatomy
    inputs: dict[str, Any]
    plain: Any
    tapped: Any
    sites: list[Site]
    times: Counter[Site]
    tensors: dict[Site, Any]
    watched: dict[str, tuple[Any, Any]]

    def at(self, layer: int, tensor: str, block: str = "") -> Any:
        return self.tensors[Site(layer, block, tensor)]


def build(family: str, attention: str | None = None) -> Any:
    if family in MOE:
        # Embeddings for each layer add to the stream as well; they are no sublayer.
        return build_tiny(family, **({"hidden_size_per_layer_input": 0} if family == "gemma4_text" else {}))
    model_type, own = DENSE[family]
    config = CONFIG_MAPPING[model_type](**SMALL | own)
    module = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=random)
            norm = parameter.ndim == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight")
            parameter.copy_(1 + 0.1 * drawn if norm else 0.2 * drawn)
    return module


def batch(family: str) -> dict[str, Any]:
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, PADDED:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    return inputs | ({"decoder_input_ids": ids} if family in ENCODER_DECODER_TYPES else {})


@functools.cache
def passed(family: str) -> Passed:
    model, inputs = build(family), batch(family)
    anatomy = find_anatomy(model)
    watched: dict[str, tuple[Any, Any]] = {}
    paths = {*anatomy.block_paths, *(s.path for s in anatomy.sublayers), *(s.experts_path for s in anatomy.moe)} - {
        None
    }
    with torch.no_grad():
        for path in paths:
            watch(model.get_submodule(path), path, watched)
        plain = model(**inputs).logits
        for path in paths:
            del model.get_submodule(path).forward
        streams, attention = stream_sites(model, anatomy), attention_sites(model, anatomy)
        times: Counter[Site] = Counter()
        tensors: dict[Site, Any] = {}

        def receive(site: Site, given: dict[str, Any]) -> None:
            times[site] += 1
            ((_, tensor),) = given.items()
            tensors[site] = tensor.clone()

        with (
            tap_stream(model, anatomy, list(streams), receive),
            tap_attention(model, anatomy, list(attention), receive),
        ):
            logits = model(**inputs).logits
    return Passed(model, anatomy, inputs, plain, logits, [*streams, *attention], times, tensors, watched)


def watch(module: Any, path: str, into: dict[str, tuple[Any, Any]]) -> None:
    """Note what a module is given first, and what it gives, by a wrapper of its own `forward`."""
    forward = module.forward

    @functools.wraps(forward)
    def noting(*args: Any, **named: Any) -> Any:
        given = args[0] if args else next(iter(named.values()))
        given = given.clone() if isinstance(given, torch.Tensor) else None
        output = forward(*args, **named)
        first = output[0] if isinstance(output, (tuple, list)) else output
        into[path] = given, first.clone() if isinstance(first, torch.Tensor) else None
        return output

    module.forward = noting


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest value."""
    assert found.shape == expected.shape
    size = float(expected.abs().max().clamp(min=1.0))
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_passed_once_and_logits_stay_identical(family: str) -> None:
    run = passed(family)
    assert torch.equal(run.plain, run.tapped)
    assert len(run.sites) == len(set(run.sites))
    assert run.times == Counter(run.sites)
    left = [n for n, m in run.model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert left == []
    assert AttentionInterface.get_interface.__module__ == "transformers.modeling_utils"


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NO_STREAM])
def test_what_sublayers_add_makes_up_the_stream(family: str) -> None:
    run = passed(family)
    for layer, path in enumerate(run.anatomy.block_paths):
        given, made = run.watched[path]
        before, after = run.at(layer, RESID_PRE), run.at(layer, RESID_POST)
        assert torch.equal(after, made)
        assert given is None or torch.equal(before, given)
        added = {
            site: t for site, t in run.tensors.items() if site.layer == layer and site.tensor in (ATTN_OUT, MLP_OUT)
        }
        assert added
        if family in OTHER_STREAMS:
            block = run.model.get_submodule(path)
            attn, mlp = (added[Site(layer, "", name)] for name in (ATTN_OUT, MLP_OUT))
            with torch.no_grad():
                close(after, other_stream(family, block, before, attn, mlp))
        elif family not in TWO_MIXERS:
            close(after, before + sum(added.values()), 1e-6)


def other_stream(family: str, block: Any, before: Any, attn: Any, mlp: Any) -> Any:
    """What such a block hands on, from what it was given and what its two sublayers add."""
    if family == "beam":
        first, second = block.attn_residual_add_idx, block.mlp_residual_add_idx
        middle = before * math.sqrt((first - 1) / first) + attn
        return middle * math.sqrt((second - 1) / second) + mlp
    if family == "doge":
        return (before * block.input_residual + attn) * block.post_attention_residual + mlp
    if family == "gemma4_text":
        return (before + attn + mlp) * block.layer_scalar
    if family == "minimax":
        middle = block.input_layernorm(before) * block.attn_alpha_factor + attn
        return block.post_attention_layernorm(middle) * block.mlp_alpha_factor + mlp
    if family == "openai-gpt":
        return block.ln_2(block.ln_1(before + attn) + mlp)
    first, second = block.post_attention_residual_scale, block.post_mlp_residual_scale
    middle = (before + first.residual_bias) * first.residual_scale + attn
    return (middle + second.residual_bias) * second.residual_scale + mlp


@pytest.mark.parametrize("family", NO_STREAM)
def test_blocks_without_one_stream_have_no_site_of_it(family: str) -> None:
    run = passed(family)
    assert not {RESID_PRE, RESID_POST, ATTN_OUT, MLP_OUT} & {site.tensor for site in run.sites}
    block = run.anatomy.block_paths[1]
    given, _ = run.watched[block]
    several = given is None or given.shape != (2, LENGTH, 32)
    # Inkling 2 hands on one vector a token, beside the outputs of earlier blocks that it attends to.
    assert several or family == "inkling2_text"


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_neurons_are_activated_gate_times_up(family: str) -> None:
    run = passed(family)
    checked = 0
    for s in run.anatomy.sublayers:
        mlp, site = run.model.get_submodule(s.path), Site(s.layer, s.block, DENSE_POST)
        plain_gate = s.kind == "dense" and all(hasattr(mlp, n) for n in ("gate_proj", "up_proj", "act_fn", "down_proj"))
        if plain_gate and family not in ("falcon_h1", "gemma3n_text") and isinstance(mlp.gate_proj, torch.nn.Linear):
            given, _ = run.watched[s.path]
            with torch.no_grad():
                close(run.tensors[site], mlp.act_fn(mlp.gate_proj(given)) * mlp.up_proj(given))
            checked += 1
        elif s.kind == "dense" and site in run.tensors:
            assert run.tensors[site].shape[:2] == (2, LENGTH)
            checked += 1
    dense = [s for s in run.anatomy.sublayers if s.kind == "dense"]
    assert checked == len(dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_mlps_are_what_their_modules_and_routers_are_given(family: str) -> None:
    run = passed(family)
    inputs = {site: tensor for site, tensor in run.tensors.items() if site.tensor == MLP_IN}
    mlps = [s for s in run.anatomy.sublayers if s.block.startswith("mlp") and s.kind in ("moe", "dense")]
    whole = {s.path: s for s in reversed(mlps)}  # of two routers of one module the first stands for it
    blocks = [s for s in whole.values() if s.path in run.anatomy.block_paths]
    assert len(inputs) == len(whole) - len(blocks)
    assert bool(blocks) == (family == "gemma4_text")
    for s in whole.values():
        if s in blocks:
            continue
        found, (given, _) = inputs[Site(s.layer, s.block, MLP_IN)], run.watched[s.path]
        assert found.shape == (2, LENGTH, run.anatomy.d_model)
        if family == "switch_transformers" and s.kind == "dense":  # its module norms the stream itself
            with torch.no_grad():
                given = run.model.get_submodule(s.path).layer_norm(given)
        assert torch.equal(found.reshape(given.shape), given)
        if s.router_path is not None:
            assert torch.equal(router_input(run, s.router_path), found.reshape(-1, run.anatomy.d_model))


def router_input(run: Passed, path: str) -> Any:
    """The first thing of d_model a token that a router is given."""
    seen: list[Any] = []

    def look(_module: Any, inputs: Any, named: Any) -> None:
        seen.extend(x.clone() for x in (*inputs, *named.values()) if isinstance(x, torch.Tensor))

    hook = run.model.get_submodule(path).register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        run.model(**run.inputs)
    hook.remove()
    return next(x for x in seen if x.shape[-1] == run.anatomy.d_model).reshape(-1, run.anatomy.d_model)


@pytest.mark.parametrize("family", [f for f in MOE if f not in ENCODER_DECODER_TYPES])
def test_slots_and_shared_experts_make_up_the_moe_output(family: str) -> None:
    """In float32: routed_scale · Σ weight · slot + shared = what the module with the experts gives."""
    run = passed(family)
    reachable = [s for s in run.anatomy.moe if s.unreachable is None and s.experts_path is not None]
    if not reachable:
        pytest.skip(f"no slots: {run.anatomy.moe[0].unreachable}")
    slots: dict[int, Any] = {}
    with torch.no_grad():
        sites = [Site(s.layer, s.block, EXPERT_OUT) for s in reachable]
        with tapped(run.model, run.anatomy, sites, lambda site, tensors: slots.update({site.layer: tensors})):
            run.model(**run.inputs)
    for s in reachable:
        weights, out = slots[s.layer]["weights"].double(), slots[s.layer]["out"].double()
        owner = run.model.get_submodule(s.path)
        total = (weights[..., None] * out).sum(1)
        with torch.no_grad():
            if hasattr(owner, "fc2_latent_proj"):
                total = owner.fc2_latent_proj(total.float()).double()
            total = routed_scale(owner) * total
            beside = not any(name.startswith("shared") for name, _ in owner.named_children())
            shared = run.tensors.get(Site(s.layer, s.block, SHARED_OUT))
            if shared is not None and not beside:
                total = total + shared.reshape(-1, shared.shape[-1])
            if family == "axk1":
                total = owner.post_mlp_layernorm(total.float())
        # Gemma 4 has no module around its experts but the block itself.
        _, made = run.watched[str(s.experts_path) if s.path in run.anatomy.block_paths else s.path]
        close(total, made.reshape(-1, made.shape[-1]))
        if shared is not None and beside:  # the Granite family sums in the block, and multiplies the sum
            block = run.model.get_submodule(run.anatomy.block_paths[s.layer])
            summed = (total.float() + shared.reshape(-1, 32)) * block.residual_multiplier
            close(run.at(s.layer, MLP_OUT).reshape(-1, 32), summed)


def test_families_with_shared_experts_all_have_their_site() -> None:
    with_site = {f for f in MOE if any(site.tensor == SHARED_OUT for site in passed(f).sites)}
    with_modules = {
        f
        for f in MOE
        if any(
            "shared" in name and "gate" not in name for name, _ in passed(f).model.named_modules() if "layers" in name
        )
    }
    assert with_site == with_modules
    assert len(with_site) >= 30


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("mamba", "mamba2")])
def test_patterns_are_the_attentions_of_the_eager_model(family: str) -> None:
    run = passed(family)
    places = [s for s in run.anatomy.sublayers if Site(s.layer, s.block, PATTERN) in run.tensors]
    model = build(family, "eager")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**run.inputs, output_attentions=True)
    if family in ENCODER_DECODER_TYPES:
        attentions = [*output.encoder_attentions, *output.decoder_attentions]
    else:
        attentions = [a for a in output.attentions or () if a is not None]
    if len(attentions) == run.anatomy.n_layers:
        attentions = [attentions[s.layer] for s in places]
    shown = not (family.startswith("falcon") and family != "falcon_h1") and family not in ("diffllama", "openai-gpt")
    assert len(places) == (len(attentions) if shown else 0)
    for s, expected in zip(places, attentions, strict=False):
        found = run.at(s.layer, PATTERN, s.block)
        close(found[0], expected[0])
        close(found[1, :, :PADDED], expected[1, :, :PADDED])  # rows of padding may hold anything


def test_patterns_were_compared_beside_a_kernel_that_does_not_show_them() -> None:
    implementations = Counter(passed(f).model.config._attn_implementation for f in FAMILIES)
    assert implementations["sdpa"] > 50
    assert implementations["eager"] > 10


# How scores are scaled: by one over the root of the head's width, but for these.
_SCALES: dict[str, Callable[[Any], float]] = {
    "gpt_neo": lambda config: 1.0,
    "granite": lambda config: config.attention_multiplier,
    "granitemoe": lambda config: config.attention_multiplier,
}
PLAIN_HEADS = (
    *("codegen", "cohere", "dbrx", "falcon", "falcon by head", "falcon in groups", "gpt2", "gpt_bigcode"),
    *("gpt_bigcode by head", "gpt_neo", "gpt_neox", "gptj", "granite", "granitemoe", "llama", "mixtral", "opt", "phi"),
    *("phi3", "phimoe", "qwen2_moe", "solar_open", "starcoder2", "stablelm"),
)


@pytest.mark.parametrize("family", PLAIN_HEADS)
def test_queries_keys_values_give_the_pattern_and_the_output_by_hand(family: str) -> None:
    """With every position 0 nothing is rotated, so that the projections' outputs are what attention works on."""
    model = build(family, "eager" if family.startswith("falcon") else None)
    anatomy = find_anatomy(model)
    ids = batch(family)["input_ids"]
    found: dict[Site, Any] = {}
    sites = attention_sites(model, anatomy)
    with (
        torch.no_grad(),
        tap_attention(model, anatomy, list(sites), lambda s, t: found.update({s: next(iter(t.values()))})),
    ):
        positions = {} if family == "opt" else {"position_ids": torch.zeros_like(ids)}
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **positions)
    assert {site.tensor for site in found} == {PATTERN, HEAD_Q, HEAD_K, HEAD_V, HEAD_Z}
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    for layer in range(anatomy.n_layers):
        q, k, v, z = (found[Site(layer, "attn", name)] for name in (HEAD_Q, HEAD_K, HEAD_V, HEAD_Z))
        pattern = found[Site(layer, "attn", PATTERN)]
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        scale = _SCALES.get(family, lambda config: q.shape[-1] ** -0.5)(model.config)  # noqa: B023
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        mask = causal & ~causal.tril(-4) if family == "gpt_neo" and layer == 1 else causal
        mask = causal & ~causal.tril(-8) if getattr(model.config, "sliding_window", None) == 8 else mask
        close(pattern, scores.masked_fill(~mask, -torch.inf).softmax(-1))
        close(z, torch.einsum("bhqk,bkhd->bqhd", pattern, v))


# Queries and keys are normed or shared among heads, but values and outputs are plain.
@pytest.mark.parametrize(
    "family",
    [
        *("bloom", "mpt", "persimmon", "gpt_neox_japanese", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm_moe_dsa"),
        *(
            "gpt_oss",
            "hy_v4",
            "jamba",
            "kimi_linear",
            "llama4_text",
            "longcat_flash",
            "minicpm3",
            "nemotron_h",
            "olmoe",
        ),
        *("xglm", "gemma2", "minimax", "minimax_m3_vl_text", "doge", "lfm2_moe", "biogpt", "switch_transformers"),
    ],
)
def test_outputs_of_heads_are_values_weighted_by_the_pattern(family: str) -> None:
    run = passed(family)
    gated = {"hy_v4"}
    places = [s for s in run.anatomy.sublayers if Site(s.layer, s.block, HEAD_V) in run.tensors]
    assert places
    for s in places:
        pattern, v, z = (run.at(s.layer, name, s.block) for name in (PATTERN, HEAD_V, HEAD_Z))
        v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
        expected = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        assert z.shape == expected.shape
        if family not in gated:
            close(z[0], expected[0])
            close(z[1, :PADDED], expected[1, :PADDED])


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text"])
def test_gated_attention_has_queries_without_gate_and_outputs_with_it(family: str) -> None:
    run = passed(family)
    s = next(s for s in run.anatomy.sublayers if s.kind == "attention")
    attention = run.model.get_submodule(s.path)
    given, _ = run.watched[s.path]
    if given is None:
        pytest.fail("the attention module was given no tensor")
    with torch.no_grad():
        both = attention.q_proj(given).view(2, LENGTH, 4, 2, 8)
    q, v, z, pattern = (run.at(s.layer, name, s.block) for name in (HEAD_Q, HEAD_V, HEAD_Z, PATTERN))
    assert torch.equal(q, both[..., 0, :])
    summed = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(2, dim=2))
    expected = summed * torch.sigmoid(both[..., 1, :])
    close(z[0], expected[0])


LENS_FAMILIES = (
    *("bloom", "codegen", "falcon", "gemma2", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite", "llama", "mpt"),
    *("olmo2", "opt", "phi", "phi3", "afmoe", "gpt_oss", "granitemoe", "mixtral", "olmoe", "qwen3_moe"),
)


@pytest.mark.parametrize("family", LENS_FAMILIES)
def test_sites_hold_what_transformerlens_holds(family: str) -> None:
    """TransformerLens's own bridge of the same model: every site that it has under the same name."""
    pytest.importorskip("transformer_lens")
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(n): n for n in range(97)}, unk_token="0"))
    # With a name and a beginning token set, the tokenizer is not looked for on a hub.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="1", eos_token="2", pad_token="0", name_or_path="", add_bos_token=True
    )
    theirs, ours = (build(family, "eager" if family in DENSE else None) for _ in range(2))
    theirs.config.architectures = [type(theirs).__name__]
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=theirs, tokenizer=tokenizer, device="cpu")
    ids = batch(family)["input_ids"]
    anatomy = find_anatomy(ours)
    found: dict[Site, Any] = {}
    streams, attention = stream_sites(ours, anatomy), attention_sites(ours, anatomy)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)

        def receive(site: Site, tensors: dict[str, Any]) -> None:
            ((_, found[site]),) = tensors.items()

        with tap_stream(ours, anatomy, list(streams), receive), tap_attention(ours, anatomy, list(attention), receive):
            ours(input_ids=ids)
    compared = Counter(site.tensor for site in found if str(site) in cache)
    everywhere = {RESID_PRE, RESID_POST, ATTN_OUT, MLP_OUT, HEAD_Q, HEAD_K, HEAD_V, HEAD_Z}
    assert {name for name, n in compared.items() if n == anatomy.n_layers} >= everywhere
    assert family == "opt" or compared[PATTERN] == anatomy.n_layers
    for site, tensor in found.items():
        if str(site) in cache and site.tensor != SHARED_OUT:
            close(tensor, cache[str(site)])
