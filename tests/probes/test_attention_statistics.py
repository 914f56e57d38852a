"""Statistics of attention against plain loops over the attentions that transformers itself gives, family by family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moescope as ms
from moescope.core.sites import HEAD_V, HEAD_Z, Site
from moescope.probes import attention_slices
from moescope.probes.anatomy import find_anatomy
from moescope.probes.attention_reduced import attention_reduced
from moescope.probes.attention_slices import PatternSlices
from moescope.probes.attention_statistics import METRICS, POSITIONS, SINK_METRIC, AttentionSums, reduce_pattern
from moescope.probes.attention_taps import PATTERN_SLICES, reducible_sites, tap_attention
from moescope.probes.families.tiny import build_tiny

LOCAL = 3
WINDOW = 12
IDS = torch.tensor(np.random.default_rng(0).integers(3, 97, (2, 21)))
LENGTHS = (21, 14)
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97,
    "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip
# Class of the configuration and of the model, and what is special about each.
DENSE = {
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 5}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 4, "attn_logit_softcapping": 0.7}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 4}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"bos_token_id": 0, "eos_token_id": 1}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {"rotary_dim": 4}),
}
FAMILIES = (
    "llama",
    "gpt2",
    "mistral",
    "gemma2",
    "gemma3_text",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "mimo_v2_flash",
    "gptj",
)


@pytest.fixture(autouse=True)
def slices_of_a_few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_slices, "SLICE_BYTES_CPU", 4 * 2 * 4 * 21 * 4)


def build(family: str, implementation: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if family not in DENSE:
        model = build_tiny(family)
    else:
        config_class, model_class, own = DENSE[family]
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**_SIZES, **own)).eval()
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                parameter.normal_(std=0.3)
    model.set_attn_implementation(implementation)
    return model


def padded(side: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and which of them are real."""
    mask = torch.ones_like(IDS, dtype=torch.bool)
    if side == "right":
        mask[1, LENGTHS[1] :] = False
    elif side == "left":
        mask[1, : 21 - LENGTHS[1]] = False
    return IDS, mask


def inputs(side: str | None) -> dict[str, Any]:
    ids, mask = padded(side)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    return given if side is None else {**given, "attention_mask": mask.long()}


def by_loops(pattern: Any, codes: list[int], *, sinks: bool) -> dict[str, Any]:
    """Every statistic of one head of one sequence, as its definition says: pattern [query, key], codes of its tokens."""
    length = len(pattern)
    found: dict[str, Any] = {}
    for k in range(POSITIONS):
        for name, end in (("sink_alpha", min(WINDOW, length)), ("alpha", length)):
            seen = [pattern[i][k] for i in range(k, end)]
            found[f"{name}_{k}"] = sum(seen) / len(seen) if seen else math.nan
    masses = dict.fromkeys(("first", "special", "punctuation", "self", "local", "other", "sink_logit"), 0.0)
    previous = entropy = distance = 0.0
    for i in range(length):
        for k in range(length):
            a = float(pattern[i][k])
            if k == 0:
                name = "first"
            elif codes[k] == 1:
                name = "special"
            elif codes[k] == 2:
                name = "punctuation"
            elif k == i:
                name = "self"
            elif 0 < i - k <= LOCAL:
                name = "local"
            else:
                name = "other"
            masses[name] += a
            previous += a if k == i - 1 else 0.0
            distance += a * (i - k)
            entropy -= a * math.log(a) if a > 0 else 0.0
        rest = max(0.0, 1 - float(sum(pattern[i])))
        masses["sink_logit"] += rest
        entropy -= rest * math.log(rest) if sinks and rest > 0 else 0.0
    found |= {f"mass_{name}": mass / length for name, mass in masses.items()}
    return found | {"mass_previous": previous / length, "entropy": entropy / length, "distance": distance / length}


def tapped(model: Any, given: dict[str, Any], mask: torch.Tensor, codes: torch.Tensor) -> dict[int, AttentionSums]:
    anatomy = find_anatomy(model)
    found: dict[int, AttentionSums] = {}

    def receive(site: Site, tensors: dict[str, Any]) -> None:
        found[site.layer] = reduce_pattern(tensors["slices"], mask, codes, window=WINDOW, local=LOCAL)

    sites = [site for site in reducible_sites(model, anatomy) if site.tensor == PATTERN_SLICES]
    with torch.no_grad(), tap_attention(model, anatomy, sites, receive):
        model(**given)
    return found


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_eager_attention(family: str, side: str | None) -> None:
    eager = build(family, "eager")
    with torch.no_grad():
        expected = eager(**inputs(side), output_attentions=True).attentions
    kernels = ("eager",) if family in ("gpt_oss", "mimo_v2_flash", "gptj", "gemma2") else ("sdpa", "eager")
    _, mask = padded(side)
    codes = torch.tensor(np.random.default_rng(1).integers(0, 3, IDS.shape))
    for kernel in kernels:
        found = tapped(build(family, kernel), inputs(side), mask, codes)
        assert list(found) == list(range(len(expected)))
        for layer, whole in enumerate(expected):
            sums = found[layer]
            sinks = SINK_METRIC in sums.names
            assert sinks == (family == "gpt_oss" or (family == "mimo_v2_flash" and layer > 0))
            for row in range(2):
                places = mask[row].nonzero()[:, 0]
                real = whole[row][:, places][:, :, places].double().numpy()
                for head in range(whole.shape[1]):
                    loops = by_loops(real[head], codes[row, places].tolist(), sinks=sinks)
                    for number, metric in enumerate(sums.names):
                        n = int(sums.n[row, number])
                        value = float(sums.sums[row, number, head]) / n if n else math.nan
                        tolerance = 1e-5 * (len(places) if metric == "distance" else 1)
                        assert value == pytest.approx(loops[metric], abs=tolerance, nan_ok=True), (
                            layer,
                            metric,
                            kernel,
                        )


def test_counts_behind_the_sums_are_the_queries_that_see_a_position() -> None:
    model = build("llama", "sdpa")
    _, mask = padded("right")
    sums = tapped(model, inputs("right"), mask, torch.zeros_like(IDS))[0]
    counted = dict(zip(sums.names, sums.n.T.tolist(), strict=True))
    assert counted["sink_alpha_0"] == [12, 12]
    assert counted["sink_alpha_9"] == [3, 3]
    assert counted["alpha_3"] == [18, 11]
    assert counted["entropy"] == [21, 14]
    assert set(sums.names) == set(METRICS)


@pytest.mark.parametrize("family", ["granitemoe_swa", "gpt_oss", "qwen3_moe"])
def test_slices_times_values_are_what_the_heads_put_out(family: str) -> None:
    """Granite's sinks scale the output of a head; its own pattern does not show them, the slices do."""
    model = build_tiny(family)
    anatomy = find_anatomy(model)
    found: dict[Site, Any] = {}

    def receive(site: Site, tensors: dict[str, Any]) -> None:
        if site.tensor == PATTERN_SLICES:
            slices = tensors["slices"]
            whole = torch.zeros(slices.rows, slices.heads, slices.queries, slices.keys)
            for pattern, first in slices:
                whole[:, :, first : first + pattern.shape[2], : pattern.shape[3]] = pattern
            found[site] = whole
        else:
            ((_, found[site]),) = tensors.items()

    tensors = (PATTERN_SLICES, HEAD_V, HEAD_Z)
    sites = [site for site in reducible_sites(model, anatomy) if site.tensor in tensors and site.layer == 0]
    with torch.no_grad(), tap_attention(model, anatomy, sites, receive):
        model(input_ids=IDS, use_cache=False)
    pattern, v, z = (found[Site(0, "attn", tensor)] for tensor in tensors)
    values = v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)
    torch.testing.assert_close(torch.einsum("rhqk,rkhd->rqhd", pattern, values), z, atol=1e-5, rtol=1e-4)
    assert (float(pattern.sum(-1).min()) < 0.999) == (family != "qwen3_moe")


@pytest.mark.parametrize("edits_outside", [True, False])
def test_statistics_are_those_of_the_edited_model(edits_outside: bool, demo_model: Any) -> None:
    """A head whose query is 0 attends to all it sees alike, and its neighbours as before."""
    edits = ms.Intervention([ms.edits.MaskHead(layer=1, heads=[2], how="uniform")])
    found: list[AttentionSums] = []

    def receive(_: Site, slices: PatternSlices) -> None:
        found.append(reduce_pattern(slices, torch.ones(2, 21, dtype=torch.bool)))

    def read() -> Any:
        return attention_reduced(demo_model, [1], receive)

    orders = (demo_model.edited(edits), read()) if edits_outside else (read(), demo_model.edited(edits))
    with torch.no_grad():
        with read():
            demo_model.module(input_ids=IDS, use_cache=False)
        with orders[0], orders[1]:
            demo_model.module(input_ids=IDS, use_cache=False)
    plain, edited = (sums.mean("alpha_0") for sums in found)
    harmonic = sum(1 / i for i in range(1, 22)) / 21
    assert edited[:, 2].tolist() == pytest.approx([harmonic] * 2, abs=1e-6)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(edited[:, others], plain[:, others])


def of_pattern(pattern: Any, **options: Any) -> AttentionSums:
    """The reduction of a pattern [query, key] that is written down."""
    whole = torch.as_tensor(pattern, dtype=torch.float32)[None, None]
    mask = torch.ones(1, whole.shape[-1], dtype=torch.bool)
    return reduce_pattern(PatternSlices.of_whole(whole), mask, **options)


def value(sums: AttentionSums, metric: str) -> float:
    return float(sums.mean(metric)[0, 0])


def test_uniform_attention_has_the_harmonic_sink() -> None:
    uniform = np.tril(np.ones((64, 64))) / np.arange(1, 65)[:, None]
    sums = of_pattern(uniform)
    harmonic = sum(1 / i for i in range(1, 65))
    assert value(sums, "sink_alpha_0") == pytest.approx(harmonic / 64, abs=1e-6)
    assert value(sums, "sink_alpha_0") == pytest.approx(0.07412, abs=5e-6)
    assert value(sums, "sink_alpha_1") == pytest.approx(0.05943, abs=5e-6)
    assert value(sums, "entropy") == pytest.approx(sum(math.log(i) for i in range(1, 65)) / 64, abs=1e-5)
    assert value(sums, "distance") == pytest.approx(sum(i / 2 for i in range(64)) / 64, abs=1e-4)


def test_all_on_the_first_key_is_a_sink_of_everything() -> None:
    pattern = np.zeros((64, 64))
    pattern[:, 0] = 1
    sums = of_pattern(pattern)
    assert [value(sums, f"sink_alpha_{k}") for k in range(3)] == [1.0, 0.0, 0.0]
    assert value(sums, "mass_first") == 1.0
    assert value(sums, "entropy") == 0.0


def test_attention_to_oneself_makes_no_sink_among_the_first_ten() -> None:
    """Its short columns at the end would: 1/2 and 1 at positions 62 and 63."""
    sums = of_pattern(np.eye(64))
    assert [value(sums, f"sink_alpha_{k}") for k in range(10)] == pytest.approx([1 / (64 - k) for k in range(10)])
    assert value(sums, "mass_self") == pytest.approx(63 / 64)
    assert value(sums, "mass_first") == pytest.approx(1 / 64)


def test_beyond_the_window_only_the_whole_column_counts() -> None:
    pattern = np.eye(100)
    pattern[64:, :] = 0
    pattern[64:, 0] = 1  # a sink that only later queries have
    sums = of_pattern(pattern)
    assert value(sums, "sink_alpha_0") == pytest.approx(1 / 64)
    assert value(sums, "alpha_0") == pytest.approx(37 / 100)


def test_padding_rows_may_hold_anything() -> None:
    pattern = torch.eye(6)[None, None].repeat(2, 1, 1, 1)
    pattern[1, :, 4:] = torch.nan
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    sums = reduce_pattern(PatternSlices.of_whole(pattern), mask)
    assert sums.sums.isfinite().all()
    assert float(sums.mean("mass_self")[1, 0]) == pytest.approx(3 / 4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_nothing_is_read_back_in_a_pass(family: str) -> None:
    """Under FakeTensorMode a read back to the host has nothing to give, and fails."""
    model = build_tiny(family, dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.ones(2, 6, dtype=torch.int64)
        given = {"input_ids": ids, "attention_mask": ids, "use_cache": False}
        found = tapped(model, given, ids.bool(), torch.zeros_like(ids))
    assert len(found) == 3


def test_logits_are_bit_identical_while_slices_are_reduced(tiny_model: Callable[..., Any]) -> None:
    for family in ("llama", "qwen3_moe"):
        model = tiny_model(family)
        with torch.no_grad():
            plain = model(**inputs("left")).logits
        given: list[Any] = []
        model.register_forward_hook(lambda _m, _i, out, given=given: given.append(out.logits))
        tapped(model, inputs("left"), padded("left")[1], torch.zeros_like(IDS))
        assert torch.equal(plain, given[0])


def test_a_decode_step_has_its_own_keys_last(demo_model: Any) -> None:
    """Slices of a step with a cache: one query, as many keys as there are positions."""
    shapes: list[tuple[int, ...]] = []

    def receive(_: Site, slices: PatternSlices) -> None:
        shapes.extend((slices.queries, slices.keys, *piece.pattern.shape[2:]) for piece in slices)

    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        cache = demo_model.module(input_ids=ids, use_cache=True).past_key_values
        with attention_reduced(demo_model, [1], receive):
            demo_model.module(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert shapes == [(1, 5, 1, 5)]


def test_a_layer_that_is_not_there_is_refused(demo_model: Any) -> None:
    with (
        pytest.raises(ms.InputError, match=r"no layer 9.*layers 0 to 5"),
        attention_reduced(demo_model, [9], lambda _, slices: None),
    ):
        pytest.fail("it was taken")
