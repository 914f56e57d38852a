"""The tiny models: one of every family with experts, each truly of its family, drawn from a seed, fit to test with."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import moescope as ms
from moescope.probes.families import tiny
from moescope.probes.families.tiny import ENCODER_DECODER_TYPES, build_tiny, moe_model_types, tiny_config

# Written down, so that a family that is no longer found is noticed.
KNOWN = re.findall(
    r"\S+",
    """
    afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 doge
    dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint gemma4_text glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss
    granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2_text inkling_text jamba
    jetmoe kimi_linear kolibri1 laguna lfm2_moe llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2
    minimax_m3_vl_text mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp_text
    solar_open zaya
""",
)
ALL = (*moe_model_types(), *ENCODER_DECODER_TYPES)
# Families whose choice is not the top-k of the logits: a correction bias, groups, or both.
CORRECTED = re.findall(
    r"\S+",
    """
    afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note_text ernie4_5_moe exaone_moe glm4_moe
    glm4_moe_lite glm_moe_dsa hy_v3 hy_v4 inkling2_text inkling_text kimi_linear kolibri1 laguna lfm2_moe longcat_flash
    mimo_v2_flash minimax_m2 minimax_m3_vl_text nemotron_h solar_open
""",
)
# Families that have layers without experts beside those with.
MIXED = re.findall(
    r"\S+",
    """
    afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 dots3_note_text ernie4_5_moe
    exaone_moe flint glm4_moe glm4_moe_lite glm_moe_dsa hy_v3 hy_v4 inkling_text jamba kimi_linear laguna lfm2_moe
    llama4_text mellum mimo_v2_flash minimax_m3_vl_text nemotron_h qwen2_moe qwen3_moe qwen3_next
""",
)
# Families that mix attention with another kind of layer, and what the other kind is called.
OTHER_LAYERS = {
    "bailing_hybrid": "DeltaAttention",
    "granitemoehybrid": "MambaLayer",
    "jamba": "MambaMixer",
    "kimi_linear": "DeltaAttention",
    "lfm2_moe": "ShortConv",
    "minimax": "LightningAttention",
    "nemotron_h": "Mamba2Mixer",
    "qwen3_5_moe_text": "GatedDeltaNet",
    "qwen3_next": "GatedDeltaNet",
    "qwen4_exp_text": "GatedDeltaNet",
}
LENGTHS = (40, 29, 18)


@functools.cache
def model_of(model_type: str) -> Any:
    return build_tiny(model_type)


def batch(model: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Three sequences of unequal length, padded on the right, and where they are real."""
    random = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 97, (3, max(LENGTHS)), generator=random)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    inputs = {"input_ids": ids * mask, "attention_mask": mask.long(), "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs, mask


def watch(model: Any, wanted: Callable[[str, Any], bool]) -> list[tuple[list[Any], Any]]:
    """What each wanted module of a forward pass was given, and what it gave, in the order of their calls."""
    calls: list[tuple[list[Any], Any]] = []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(([*args, *kwargs.values()], output))

    hooks = [m.register_forward_hook(note, with_kwargs=True) for n, m in model.named_modules() if wanted(n, m)]
    inputs, _ = batch(model)
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return calls


def is_experts(name: str, module: Any) -> bool:
    return name.endswith(".experts") and type(module).__name__.endswith("Experts")


def test_every_family_of_the_installed_transformers_is_found() -> None:
    assert len(KNOWN) >= 55
    assert set(KNOWN) <= set(moe_model_types())
    assert list(moe_model_types()) == sorted(set(moe_model_types()))


def test_dense_models_and_models_of_several_modalities_are_not_counted() -> None:
    several = {"gemma4", "llama4", "qwen3_5_moe", "qwen4_exp", "dots3_note"}
    assert not set(moe_model_types()) & (several | {"llama", "gpt2", "qwen3_5_text", "bamba", "mamba2"})


@pytest.mark.parametrize("model_type", ALL)
def test_it_is_the_model_that_transformers_builds_for_its_type(model_type: str) -> None:
    model = model_of(model_type)
    assert model.config.model_type == model_type
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 120_000
    assert model.config.vocab_size == 97
    assert model.config.hidden_size == 32


@pytest.mark.parametrize("model_type", ALL)
def test_its_logits_are_finite_in_every_row_and_see_the_tokens(model_type: str) -> None:
    model = model_of(model_type)
    inputs, mask = batch(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (*mask.shape, 97)
    assert torch.isfinite(logits).all()
    assert logits[mask].std(0).median() > 0.05
    assert 0.1 < logits.std() < 10


@pytest.mark.parametrize("model_type", ALL)
def test_a_seed_gives_one_model_and_leaves_torch_alone(model_type: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = build_tiny(model_type)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = model_of(model_type).state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("model_type", ALL)
def test_another_seed_draws_every_weight_and_correction_anew(model_type: str) -> None:
    first, second = model_of(model_type), build_tiny(model_type, seed=1)
    others = dict(second.named_parameters()) | dict(second.named_buffers())
    for name, tensor in (*first.named_parameters(), *first.named_buffers()):
        drawn = isinstance(tensor, torch.nn.Parameter) or "bias" in name or "tid2eid" in name
        assert torch.equal(tensor, others[name]) != drawn, name
        assert not drawn or tensor.numel() == 1 or tensor.float().std() > 0, name


@pytest.mark.parametrize("model_type", ALL)
def test_it_generates(model_type: str) -> None:
    model = model_of(model_type)
    prompt = torch.tensor([[5, 6, 7, 8]])
    made = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    assert made.shape == (1, 4 if model.config.is_encoder_decoder else 7)


@pytest.mark.parametrize(
    "model_type", [t for t in ALL if t not in (*ENCODER_DECODER_TYPES, "doge", "jetmoe", "llama4_text")]
)
def test_every_expert_is_used_and_two_are_taken(model_type: str) -> None:
    model = model_of(model_type)
    calls = watch(model, is_experts)
    _, mask = batch(model)
    used = []
    for (_, ids, weights, *_), _ in calls:
        assert ids.shape == weights.shape == (mask.numel(), 1 if model_type == "zaya" else 2)
        assert torch.isfinite(weights).all()
        used.append(set(ids[mask.flatten()].flatten().tolist()))
    experts = set(range(10 if model_type == "longcat_flash" else 8))
    if model_type == "zaya":  # one expert a token, and a class more that is none: two may be left out of a layer
        assert set.union(*used) == experts
        assert min(map(len, used)) >= 6
    else:
        assert used
        assert all(ids == experts for ids in used)


@pytest.mark.parametrize("model_type", CORRECTED)
def test_the_choice_is_not_the_top_of_the_logits_where_a_family_corrects_it(model_type: str) -> None:
    model = model_of(model_type)
    routers = watch(model, lambda name, _: name.rpartition(".")[2] in ("gate", "router"))
    experts = watch(model, is_experts)
    routers = [call for call in routers if isinstance(call[1], tuple)]
    assert len(routers) == len(experts) > 0
    for (_, (logits, *_)), ((_, ids, *_), _) in zip(routers, experts, strict=True):
        top = logits.topk(ids.shape[-1]).indices.sort(-1).values
        changed = (top != ids.sort(-1).values).any(-1).float().mean()
        assert 0.05 < changed < 0.9
        assert 1 < logits.std(-1).mean() < 3.2


@pytest.mark.parametrize("model_type", MIXED)
def test_layers_with_and_without_experts_stand_side_by_side(model_type: str) -> None:
    sparse = [any(is_experts(n, m) for n, m in layer.named_modules()) for layer in model_of(model_type).model.layers]
    assert set(sparse) == {True, False}
    assert 3 <= len(sparse) <= 4


@pytest.mark.parametrize("model_type", OTHER_LAYERS)
def test_other_layers_stand_beside_attention(model_type: str) -> None:
    other = OTHER_LAYERS[model_type]
    mixers = []
    for layer in model_of(model_type).model.layers:
        names = [type(m).__name__ for m in layer.modules()]
        mixers.append(
            ["other" if n.endswith(other) else "attention" for n in names if n.endswith((other, "Attention"))]
        )
    assert {tuple(found) for found in mixers} >= {("other",), ("attention",)}
    assert max(map(len, mixers)) == 1


def test_both_stacks_of_an_encoder_decoder_have_dense_and_sparse_layers() -> None:
    nllb, switch = map(model_of, ENCODER_DECODER_TYPES)
    for stack in (nllb.model.encoder.layers, nllb.model.decoder.layers, switch.encoder.block, switch.decoder.block):
        assert {any(n.endswith("experts") for n, _ in layer.named_modules()) for layer in stack} == {True, False}


def test_groups_have_two_experts_and_some_are_left_out() -> None:
    for model_type in ("axk1", "beam", "deepseek_v2", "deepseek_v3", "glm4_moe", "kimi_linear", "nemotron_h"):
        config = tiny_config(model_type)
        assert config.n_group == 4
        assert config.topk_group == 2


def test_hash_tables_hold_two_experts_for_every_token() -> None:
    table = model_of("deepseek_v4").model.layers[0].mlp.gate.tid2eid
    assert table.shape == (97, 2)
    assert set(table.flatten().tolist()) == set(range(8))
    assert (table[:, 0] != table[:, 1]).all()


def test_rotary_frequencies_are_left_as_they_are() -> None:
    model = model_of("olmoe")
    plain = transformers.AutoModelForCausalLM.from_config(model.config)
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("model_type", ["olmoe", "inkling2_text", "nllb-moe", "deepseek_v4", "ernie4_5_moe"])
def test_bfloat16_keeps_what_the_family_keeps_in_float32(model_type: str) -> None:
    model: Any = build_tiny(model_type, dtype=torch.bfloat16)
    exact = model_of(model_type).state_dict()
    kept = {name.rpartition(".")[2] for name, t in model.state_dict().items() if t.dtype == torch.float32}
    assert ("e_score_correction_bias" in kept) == (model_type in ("inkling2_text", "deepseek_v4", "ernie4_5_moe"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
    inputs, _ = batch(model)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("mixtral", "num_local_experts"),
        ("mixtral", "num_experts"),
        ("bailing_hybrid", "num_experts"),
        ("olmoe", "num_experts"),
    ],
)
def test_settings_may_be_changed_by_any_of_their_names(model_type: str, name: str) -> None:
    model: Any = build_tiny(model_type, **{name: 16})
    assert model.model.layers[1].mlp.experts.down_proj.shape[0] == 16


def test_settings_that_a_family_does_not_know_are_not_left_on_its_configuration() -> None:
    config = tiny_config("mixtral")
    left = [name for name in ("n_group", "moe_k", "n_shared_experts", "kv_lora_rank") if hasattr(config, name)]
    assert not left


def test_a_setting_the_configuration_does_not_have_is_refused() -> None:
    with pytest.raises(ms.InputError, match=r"MixtralConfig has no setting 'num_local_expert'.*num_local_experts"):
        build_tiny("mixtral", num_local_expert=4)


@pytest.mark.parametrize(
    ("asked", "nearest"), [("mixtrall", "mixtral"), ("gemma4", "gemma4_text"), ("nllb_moe", "nllb-moe")]
)
def test_an_unknown_model_type_is_refused_with_the_nearest(asked: str, nearest: str) -> None:
    with pytest.raises(ms.InputError, match=rf"'{asked}' is not a model type with experts.*\b{nearest}\b"):
        build_tiny(asked)


def test_a_model_type_without_any_likeness_is_refused_too() -> None:
    with pytest.raises(ms.InputError, match="What to do"):
        tiny.build_tiny("xyzzy")
