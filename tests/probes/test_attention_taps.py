"""Taps on attention: patterns beside the model's own kernel, per-head vectors, caches, and that nothing stays behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import StaticCache
from transformers.modeling_utils import AttentionInterface

import moescope as ms
from moescope.core.sites import HEAD_K, HEAD_Q, HEAD_V, HEAD_Z, PATTERN, Site
from moescope.probes.anatomy import find_anatomy
from moescope.probes.attention_pattern import patterns_tapped
from moescope.probes.attention_taps import attention_refusals, attention_sites, tap_attention
from moescope.probes.families.tiny import build_tiny

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [15, 16, 17, 0, 0, 0]])
MASK = (IDS != 0).long()
PLAIN_INTERFACE = AttentionInterface.get_interface


@pytest.fixture(autouse=True)
def transformers_is_left_as_it_was() -> Any:
    yield
    assert AttentionInterface.get_interface is PLAIN_INTERFACE


def collect(model: Any, **inputs: Any) -> dict[Site, Any]:
    """One batch through a model with taps on: site → its one tensor."""
    anatomy = find_anatomy(model)
    found: dict[Site, Any] = {}

    def receive(site: Site, tensors: dict[str, Any]) -> None:
        ((_, found[site]),) = tensors.items()

    given = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False} | inputs
    with torch.no_grad(), tap_attention(model, anatomy, list(attention_sites(model, anatomy)), receive):
        model(**given)
    return found


def traces(model: nn.Module) -> list[str]:
    """Modules with hooks, or with anything of ours."""
    return [
        name
        for name, m in model.named_modules()
        if m._forward_hooks or m._forward_pre_hooks or any("moescope" in key for key in vars(m))
    ]


def test_names_of_tensors_are_those_of_the_contract(tiny_model: Callable[..., Any]) -> None:
    model, names = tiny_model("llama"), {}
    anatomy = find_anatomy(model)
    sites = list(attention_sites(model, anatomy))
    with torch.no_grad(), tap_attention(model, anatomy, sites, lambda s, t: names.update({s.tensor: list(t)})):
        model(input_ids=IDS)
    assert names == {PATTERN: ["pattern"], HEAD_Q: ["q"], HEAD_K: ["k"], HEAD_V: ["v"], HEAD_Z: ["z"]}


def test_keys_and_values_have_their_own_number_of_heads(tiny_model: Callable[..., Any]) -> None:
    shapes = {site.tensor: tuple(t.shape) for site, t in collect(tiny_model("llama")).items()}
    assert shapes == {
        PATTERN: (2, 4, 6, 6),
        HEAD_Q: (2, 6, 4, 8),
        HEAD_K: (2, 6, 2, 8),
        HEAD_V: (2, 6, 2, 8),
        HEAD_Z: (2, 6, 4, 8),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "padding"])
def test_patterns_are_causal_probabilities(mask: Any, dtype: str, tiny_model: Callable[..., Any]) -> None:
    """Without padding sdpa is given no mask at all, and is causal by itself."""
    model = tiny_model("llama", dtype=dtype)
    assert model.config._attn_implementation == "sdpa"
    pattern = collect(model, attention_mask=mask)[Site(1, "attn", PATTERN)]
    assert pattern.dtype == torch.float32
    real = pattern[0]
    assert torch.equal(real, real.tril())
    torch.testing.assert_close(real.sum(-1), torch.ones(4, 6))
    assert (real[:, -1] > 0).all()
    if mask is not None:
        assert (pattern[1, :, :3, 3:] == 0).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_pattern_in_bfloat16_is_that_of_the_kernels_queries_and_keys_in_float32(
    family: str, tiny_model: Callable[..., Any]
) -> None:
    model, given = tiny_model(family, dtype="bfloat16"), {}

    def spying(module: Any, query: Any, key: Any, *args: Any, **named: Any) -> Any:
        given[module.layer_idx] = query, key
        return plain(module, query, key, *args, **named)

    plain = AttentionInterface._global_mapping["sdpa"]
    AttentionInterface.register("sdpa", spying)
    try:
        found = collect(model, attention_mask=None)
    finally:
        AttentionInterface.register("sdpa", plain)
    for layer, (query, key) in given.items():
        scores = query.float() @ key.repeat_interleave(2, dim=1).float().mT * query.shape[-1] ** -0.5
        masked = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
        torch.testing.assert_close(found[Site(layer, "attn", PATTERN)], masked.softmax(-1))


def test_a_sliding_window_shows_in_the_pattern(tiny_model: Callable[..., Any]) -> None:
    pattern = collect(tiny_model("mixtral", sliding_window=3))[Site(0, "attn", PATTERN)][0]
    assert (pattern.triu(-2).tril() == pattern).all()
    assert (pattern[:, 5, 3:] > 0).all()


@pytest.mark.parametrize(("sink", "least", "most"), [(-1e4, 0.9999, 1.0001), (50.0, 0.0, 1e-6)])
def test_sinks_take_their_share_of_every_row(sink: float, least: float, most: float) -> None:
    model = build_tiny("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks.fill_(sink)
    rows = collect(model)[Site(0, "attn", PATTERN)][0].sum(-1)
    assert least <= float(rows.min())
    assert float(rows.max()) <= most


def test_a_soft_cap_is_part_of_the_pattern() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97}
    config = Gemma2Config(
        **sizes, num_hidden_layers=1, intermediate_size=24, query_pre_attn_scalar=8, sliding_window=64
    )
    patterns = []
    for cap in (0.05, None):
        config.attn_logit_softcapping = cap
        model = Gemma2ForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in sorted(model.named_parameters()):
                parameter[1].copy_(torch.randn(parameter[1].shape, generator=torch.Generator().manual_seed(3)))
        patterns.append(collect(model)[Site(0, "attn", PATTERN)][0])
    even = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(patterns[0], even.expand(4, 6, 6), atol=0.05, rtol=0)
    assert (patterns[1] - even).abs().max() > 0.2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2", "deepseek_v3", "mixtral"])
def test_decoding_with_a_cache_gives_the_rows_of_one_long_pass(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    whole = collect(model, input_ids=IDS[:1], attention_mask=None)
    anatomy = find_anatomy(model)
    sites = list(attention_sites(model, anatomy))
    assert {HEAD_V, HEAD_Z, PATTERN} <= {site.tensor for site in sites}
    steps: list[dict[Site, Any]] = []
    with torch.no_grad():
        cache = None
        for start, end in ((0, 4), (4, 5), (5, 6)):
            found: dict[Site, Any] = {}
            with tap_attention(model, anatomy, sites, lambda s, t, f=found: f.update({s: next(iter(t.values()))})):
                cache = model(input_ids=IDS[:1, start:end], past_key_values=cache, use_cache=True).past_key_values
            steps.append(found)
            assert set(found) == set(sites)
    for site in sites:
        parts = [step[site] for step in steps]
        if site.tensor == PATTERN:
            assert [tuple(part.shape[2:]) for part in parts] == [(4, 4), (1, 5), (1, 6)]
            for part, (start, end) in zip(parts, ((0, 4), (4, 5), (5, 6)), strict=True):
                torch.testing.assert_close(part, whole[site][:, :, start:end, :end], atol=1e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(torch.cat(parts, dim=1), whole[site], atol=1e-5, rtol=1e-4)


def test_a_static_cache_shows_no_keys_beyond_the_positions_so_far(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    expected = collect(model, input_ids=IDS[:1], attention_mask=None)
    cache = StaticCache(config=model.config, max_cache_len=9)
    found = collect(model, input_ids=IDS[:1], attention_mask=None, past_key_values=cache, use_cache=True)
    pattern, plain = (f[Site(1, "attn", PATTERN)] for f in (found, expected))
    torch.testing.assert_close(pattern[..., :6], plain)
    assert (pattern[..., 6:] == 0).all()


def test_latent_values_with_a_static_cache_are_refused(tiny_model: Callable[..., Any]) -> None:
    """They are computed from the whole cache, empty places and all."""
    model = tiny_model("deepseek_v3")
    cache = StaticCache(config=model.config, max_cache_len=9)
    with pytest.raises(ms.RunError, match="static KV cache"):
        collect(model, past_key_values=cache, use_cache=True)
    assert traces(model) == []


def test_latent_attention_offers_values_and_outputs_only(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("deepseek_v3")
    offered = {site.tensor for site in attention_sites(model, find_anatomy(model))}
    assert offered == {PATTERN, HEAD_V, HEAD_Z}


def test_linear_attention_has_no_site_of_attention() -> None:
    model = build_tiny("qwen3_next")
    anatomy = find_anatomy(model)
    assert {site.layer for site in attention_sites(model, anatomy)} == {1}
    assert [s.kind for s in anatomy.sublayers if s.block == "attn"] == ["ssm", "attention", "ssm"]
    refused = attention_refusals(model, anatomy)
    assert {site.layer for site in refused} == {0, 2}
    assert "GatedDeltaNet is no attention over keys" in refused[Site(0, "attn", PATTERN)]


def test_compressed_keys_are_refused_and_plain_ones_offered() -> None:
    model = build_tiny("deepseek_v4")
    anatomy = find_anatomy(model)
    assert [site for site in attention_sites(model, anatomy) if site.tensor == PATTERN] == [Site(0, "attn", PATTERN)]
    assert "compressed" in attention_refusals(model, anatomy)[Site(1, "attn", PATTERN)]


def test_cross_attention_offers_queries_and_outputs_only() -> None:
    model = build_tiny("nllb-moe")
    anatomy = find_anatomy(model)
    crossing = {site.tensor for site in attention_sites(model, anatomy) if site.block == "attn.1"}
    assert crossing == {HEAD_Q, HEAD_Z}
    assert "encoder's" in attention_refusals(model, anatomy)[Site(3, "attn.1", PATTERN)]


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_other_kernels_are_refused_before_the_model_runs(implementation: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    anatomy = find_anatomy(model)
    model.config._attn_implementation = implementation
    with (
        pytest.raises(ms.InputError, match=rf"{implementation}.*set_attn_implementation"),
        tap_attention(model, anatomy, [Site(0, "attn", PATTERN)], lambda *_: None),
    ):
        pytest.fail("the context must not begin")
    assert traces(model) == []


def test_a_kernel_changed_while_taps_are_on_is_noticed(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    anatomy = find_anatomy(model)
    AttentionInterface.register("other", AttentionInterface._global_mapping["sdpa"])
    try:
        with tap_attention(model, anatomy, [Site(0, "attn", PATTERN)], lambda *_: None):
            model.config._attn_implementation = "other"
            with pytest.raises(ms.RunError, match="other"):
                model(input_ids=IDS)
    finally:
        del AttentionInterface._global_mapping["other"]


def test_the_models_own_kernel_runs_with_its_own_inputs(tiny_model: Callable[..., Any]) -> None:
    model, runs = tiny_model("llama"), []
    plain = AttentionInterface._global_mapping["sdpa"]

    def counting(module: Any, *args: Any, **named: Any) -> Any:
        runs.append((module.layer_idx, named.get("is_causal"), args[3] is None))
        return plain(module, *args, **named)

    AttentionInterface.register("sdpa", counting)
    try:
        collect(model, attention_mask=None)
        tapped = list(runs)
        runs.clear()
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
    finally:
        AttentionInterface.register("sdpa", plain)
    assert tapped == runs
    assert [layer for layer, _, _ in runs] == [0, 1]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_everything_is_put_back_after_an_exception(error: BaseException, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    anatomy = find_anatomy(model)

    def fail(site: Site, _tensors: dict[str, Any]) -> None:
        if site == Site(1, "attn", PATTERN):
            raise error

    with pytest.raises(type(error)), tap_attention(model, anatomy, list(attention_sites(model, anatomy)), fail):
        model(input_ids=IDS)
    assert traces(model) == []
    assert AttentionInterface.get_interface is PLAIN_INTERFACE


def test_nested_taps_each_receive_and_the_outer_lives_on(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    attention, counts = model.model.layers[0].self_attn, {"outer": 0, "inner": 0}

    def count(name: str) -> Callable[[Any], None]:
        return lambda _: counts.update({name: counts[name] + 1})

    with torch.no_grad(), patterns_tapped([(attention, count("outer"))]):
        with patterns_tapped([(attention, count("inner"))]):
            model(input_ids=IDS)
        model(input_ids=IDS)
    assert counts == {"outer": 2, "inner": 1}
    assert traces(model) == []


def test_a_model_that_is_not_tapped_is_passed_by(tiny_model: Callable[..., Any]) -> None:
    """While another thread reads one model, the kernels of others are asked for as ever."""
    tapped, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with torch.no_grad():
        expected = other(input_ids=IDS).logits
    received: list[int] = []
    begun, done = threading.Event(), threading.Event()

    def read() -> None:
        taps = [(layer.self_attn, lambda _: received.append(1)) for layer in tapped.model.layers]
        with torch.no_grad(), patterns_tapped(taps):
            begun.set()
            done.wait(30)
            tapped(input_ids=IDS)

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(30)
    with torch.no_grad():
        assert torch.equal(other(input_ids=IDS).logits, expected)
    assert received == []
    done.set()
    thread.join()
    assert len(received) == 2


def test_no_gradient_flows_into_a_pattern_beside_the_kernel(tiny_model: Callable[..., Any]) -> None:
    model, patterns = tiny_model("llama"), []
    plain = model(input_ids=IDS).logits
    with patterns_tapped([(model.model.layers[0].self_attn, patterns.append)]):
        logits = model(input_ids=IDS).logits
    assert logits.requires_grad
    assert torch.equal(logits, plain)
    assert not patterns[0].requires_grad


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "cohere2_moe", "qwen3_next"])
def test_taps_run_without_values_in_bfloat16(family: str) -> None:
    """Under FakeTensorMode a read back to the host has nothing to give, and fails."""
    model = build_tiny(family, dtype=torch.bfloat16)
    anatomy, found = find_anatomy(model), {}
    sites = list(attention_sites(model, anatomy))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.ones(2, 6, dtype=torch.int64)
        with tap_attention(model, anatomy, sites, lambda s, t: found.update({s: t})):
            model(input_ids=ids, attention_mask=ids, use_cache=False)
    assert set(found) == set(sites)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_compiled_model_is_tapped_in_one_graph_and_keeps_its_logits(family: str) -> None:
    model = build_tiny(family)
    anatomy, expected = find_anatomy(model), collect(model)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    found: dict[Site, Any] = {}

    def receive(site: Site, tensors: dict[str, Any]) -> None:
        ((_, found[site]),) = tensors.items()

    torch._dynamo.reset()
    with torch.no_grad():
        plain = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
        torch._dynamo.reset()
        with tap_attention(model, anatomy, list(expected), receive):
            tapped = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    torch._dynamo.reset()
    assert torch.equal(plain, tapped)
    assert set(found) == set(expected)
    for site, tensor in expected.items():
        torch.testing.assert_close(found[site], tensor)
