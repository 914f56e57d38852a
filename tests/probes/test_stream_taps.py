"""Taps on streams, sublayers' outputs, dense neurons and shared experts: what they hold, and that they leave nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import moescope as ms
from moescope.core.sites import ATTN_OUT, DENSE_POST, MLP_IN, MLP_OUT, RESID_POST, RESID_PRE, SHARED_OUT, Site
from moescope.probes.anatomy import find_anatomy
from moescope.probes.families.tiny import build_tiny
from moescope.probes.projections import down_projection, output_projection, widths
from moescope.probes.shared_expert_taps import routed_scale
from moescope.probes.stream_taps import stream_refusals, stream_sites, tap_stream

IDS = torch.tensor([[5, 6, 7, 8, 9], [15, 16, 17, 0, 0]])
MASK = (IDS != 0).long()


def collect(model: Any, sites: list[Site] | None = None) -> dict[Site, Any]:
    """One batch through a model with taps on: site → its one tensor."""
    anatomy = find_anatomy(model)
    found: dict[Site, Any] = {}

    def receive(site: Site, tensors: dict[str, Any]) -> None:
        ((_, found[site]),) = tensors.items()

    with torch.no_grad(), tap_stream(model, anatomy, list(sites or stream_sites(model, anatomy)), receive):
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    return found


def hooks_of(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


def test_names_of_tensors_are_those_of_the_contract(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("deepseek_v3")
    anatomy, names = find_anatomy(model), {}
    sites = list(stream_sites(model, anatomy))
    with torch.no_grad(), tap_stream(model, anatomy, sites, lambda s, t: names.update({s.tensor: list(t)})):
        model(input_ids=IDS, attention_mask=MASK)
    assert names == {
        RESID_PRE: ["resid"],
        RESID_POST: ["resid"],
        ATTN_OUT: ["out"],
        MLP_OUT: ["out"],
        MLP_IN: ["given"],
        DENSE_POST: ["post"],
        SHARED_OUT: ["out"],
    }


def test_only_the_sites_asked_for_are_received(tiny_model: Callable[..., Any]) -> None:
    asked = [Site(1, "", MLP_OUT), Site(0, "", RESID_PRE), Site(0, "mlp", DENSE_POST)]
    assert set(collect(tiny_model("llama"), asked)) == set(asked)


def test_neurons_of_a_dense_mlp_are_its_activations_by_hand(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    found = collect(model)
    for layer, block in enumerate(model.model.layers):
        with torch.no_grad():
            hidden = block.post_attention_layernorm(
                found[Site(layer, "", RESID_PRE)] + found[Site(layer, "", ATTN_OUT)]
            )
            gate, up = hidden @ block.mlp.gate_proj.weight.T, hidden @ block.mlp.up_proj.weight.T
            neurons = torch.nn.functional.silu(gate) * up
            torch.testing.assert_close(found[Site(layer, "mlp", DENSE_POST)], neurons)
            torch.testing.assert_close(found[Site(layer, "", MLP_OUT)], neurons @ block.mlp.down_proj.weight.T)


def test_inputs_of_mlps_are_the_normed_stream_by_hand(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("deepseek_v3")
    found = collect(model)
    for layer, block in enumerate(model.model.layers):
        stream = found[Site(layer, "", RESID_PRE)] + found[Site(layer, "", ATTN_OUT)]
        with torch.no_grad():
            torch.testing.assert_close(
                found[Site(layer, "mlp", MLP_IN)], block.post_attention_layernorm(stream), rtol=0, atol=0
            )


def test_experts_without_a_block_of_their_own_have_no_input_and_it_says_why() -> None:
    model = build_tiny("gemma4_text")
    live = ms.load(model)
    assert Site(0, "mlp.1", MLP_IN) in live.sites
    assert Site(0, "mlp", MLP_IN) not in live.sites
    assert "lie right in the block" in stream_refusals(model, live.anatomy)[Site(0, "mlp", MLP_IN)]


def test_neurons_before_gpt2s_transposed_projection_are_found(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt2")
    found = collect(model)
    mlp = model.transformer.h[0].mlp
    with torch.no_grad():
        expected = found[Site(0, "mlp", DENSE_POST)] @ mlp.c_proj.weight + mlp.c_proj.bias
    torch.testing.assert_close(found[Site(0, "", MLP_OUT)], expected)
    assert found[Site(0, "mlp", DENSE_POST)].shape == (2, 5, 128)


def test_a_norm_after_the_sublayer_is_part_of_what_it_adds() -> None:
    model = build_tiny("flex_olmo")
    block, noted = model.model.layers[1], {}
    for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
        getattr(block, name).register_forward_hook(lambda _m, _i, out, name=name: noted.update({name: out}))
    found = collect(model)
    assert torch.equal(found[Site(1, "", ATTN_OUT)], noted["post_attention_layernorm"])
    assert torch.equal(found[Site(1, "", MLP_OUT)], noted["post_feedforward_layernorm"])


def test_the_norm_before_the_mlp_is_not_taken_for_one_after_attention(tiny_model: Callable[..., Any]) -> None:
    model, noted = tiny_model("llama"), []
    model.model.layers[0].self_attn.register_forward_hook(lambda _m, _i, out: noted.append(out[0]))
    assert torch.equal(collect(model)[Site(0, "", ATTN_OUT)], noted[0])


def test_a_residual_multiplier_is_part_of_what_a_sublayer_adds() -> None:
    model = build_tiny("granitemoeshared", residual_multiplier=0.25)
    noted = {}
    block = model.model.layers[1]
    for name in ("block_sparse_moe", "shared_mlp"):
        getattr(block, name).register_forward_hook(lambda _m, _i, out, name=name: noted.update({name: out}))
    found = collect(model)
    assert torch.equal(found[Site(1, "", MLP_OUT)], (noted["block_sparse_moe"] + noted["shared_mlp"]) * 0.25)
    assert torch.equal(found[Site(1, "mlp", SHARED_OUT)], noted["shared_mlp"])


def test_a_gated_shared_expert_is_recorded_with_its_gate(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen2_moe")
    mlp, noted = model.model.layers[0].mlp, {}
    mlp.register_forward_hook(lambda _m, given, out: noted.update({"given": given[0], "out": out}))
    mlp.experts.register_forward_hook(lambda _m, _i, out: noted.update({"routed": out}))
    shared = collect(model)[Site(0, "mlp", SHARED_OUT)]
    hidden = noted["given"].reshape(-1, 32)
    with torch.no_grad():
        gate = torch.sigmoid(hidden @ mlp.shared_expert_gate.weight.T)
        assert torch.equal(shared, gate * mlp.shared_expert(hidden))
    assert torch.equal((noted["routed"] + shared).view_as(noted["out"]), noted["out"])
    assert not torch.allclose(gate, torch.ones_like(gate), atol=0.05)


def test_a_sum_made_in_place_in_the_shared_experts_output_does_not_reach_what_was_received() -> None:
    """Llama 4 adds its routed experts into the tensor that its shared expert has given."""
    model = build_tiny("llama4_text")
    shared_expert, noted = model.model.layers[1].feed_forward.shared_expert, []
    shared_expert.register_forward_hook(lambda _m, _i, out: noted.append(out.clone()))
    assert torch.equal(collect(model)[Site(1, "mlp", SHARED_OUT)], noted[0])


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("cohere2_moe", {"shared_expert_combination_strategy": "average"}, 0.5),
        ("cohere2_moe", {"shared_expert_combination_strategy": "sum"}, 1.0),
        ("laguna", {"moe_routed_scaling_factor": 1.75}, 1.75),
        ("beam", {"routed_scaling_factor": 3.0}, 3.0),
        ("deepseek_v3", {"routed_scaling_factor": 2.5}, 1.0),  # there it is in the weights
    ],
)
def test_routed_scale_and_shared_make_the_sum(family: str, settings: dict[str, Any], expected: float) -> None:
    model = build_tiny(family, **settings)
    mlp, noted = model.model.layers[1].mlp, {}
    mlp.register_forward_hook(lambda _m, _i, out: noted.update({"out": out}))
    mlp.experts.register_forward_hook(lambda _m, _i, out: noted.update({"routed": out}))
    assert routed_scale(mlp) == expected
    shared = collect(model).get(Site(1, "mlp", SHARED_OUT), torch.zeros(()))
    total = expected * noted["routed"].reshape(-1, 32) + shared.reshape(-1, 32 if shared.ndim else 1)
    torch.testing.assert_close(total, noted["out"].reshape(-1, 32))


def test_second_sublayers_have_numbered_sites() -> None:
    found = collect(build_tiny("longcat_flash"))
    places = {(site.block, site.tensor) for site in found if site.layer == 1}
    assert {("", ATTN_OUT), ("attn.1", ATTN_OUT), ("", MLP_OUT), ("mlp.1", MLP_OUT), ("mlp.2", MLP_OUT)} <= places
    assert not torch.equal(found[Site(1, "", ATTN_OUT)], found[Site(1, "attn.1", ATTN_OUT)])


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4", "inkling2_text", "qwen4_exp_text"])
def test_a_family_without_one_stream_says_why(family: str) -> None:
    model = build_tiny(family)
    anatomy = find_anatomy(model)
    refused = stream_refusals(model, anatomy)
    assert set(refused) == {Site(n, "", t) for n in range(3) for t in (RESID_PRE, RESID_POST, ATTN_OUT, MLP_OUT)}
    assert not set(refused) & set(stream_sites(model, anatomy))
    assert all("its blocks" in reason for reason in refused.values())


def test_a_family_with_a_stream_refuses_nothing(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmoe")
    assert stream_refusals(model, find_anatomy(model)) == {}


def test_a_stream_of_another_shape_is_an_error_not_a_record(tiny_model: Callable[..., Any]) -> None:
    """A family that no table knows, whose blocks hand on two streams."""
    model = tiny_model("llama")
    anatomy = find_anatomy(model)
    for block in model.model.layers:
        block.forward = lambda hidden, **_: hidden.unsqueeze(2).expand(-1, -1, 2, -1)
    taps = tap_stream(model, anatomy, [Site(0, "", RESID_POST)], lambda *_: None)
    with pytest.raises(ms.RunError, match=r"no residual stream.*\[2, 5, 2, 32\]"), taps:
        model(input_ids=IDS, attention_mask=MASK)
    assert hooks_of(model) == []


def test_blocks_that_give_a_tuple_and_take_the_stream_by_name_are_read(tiny_model: Callable[..., Any]) -> None:
    """As blocks of older versions do."""
    model = tiny_model("llama")
    anatomy, block, sites = (
        find_anatomy(model),
        model.model.layers[0],
        [Site(0, "", n) for n in (RESID_PRE, RESID_POST)],
    )
    expected, plain = collect(model), block.forward
    block.forward = lambda **named: (plain(**named), None)
    found: dict[Site, Any] = {}
    rotary = model.model.rotary_emb(expected[sites[0]], torch.arange(5)[None])
    with torch.no_grad(), tap_stream(model, anatomy, sites, lambda s, t: found.update({s: t["resid"]})):
        out, _ = block(hidden_states=expected[sites[0]], position_embeddings=rotary)
    assert torch.equal(found[sites[0]], expected[sites[0]])
    assert torch.equal(found[sites[1]], out)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_hooks_are_gone_after_an_exception(error: BaseException, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("qwen2_moe")
    anatomy = find_anatomy(model)

    def fail(site: Site, _tensors: dict[str, Any]) -> None:
        if site == Site(1, "", MLP_OUT):
            raise error

    taps = tap_stream(model, anatomy, list(stream_sites(model, anatomy)), fail)
    with pytest.raises(type(error)), taps:
        model(input_ids=IDS, attention_mask=MASK)
    assert hooks_of(model) == []


def test_a_pass_that_broke_off_leaves_nothing_for_the_next(tiny_model: Callable[..., Any]) -> None:
    """The second pass skips the sublayer: what it added in the first must not be handed out again."""
    model = tiny_model("llama")
    anatomy, block, site = find_anatomy(model), model.model.layers[0], Site(0, "", ATTN_OUT)
    plain, found = block.mlp.forward, {}

    def break_off(_hidden: Any) -> Any:
        raise RuntimeError("out of memory")

    block.mlp.forward = break_off
    with torch.no_grad(), tap_stream(model, anatomy, [site], lambda s, t: found.update({s: t["out"]})):
        with pytest.raises(RuntimeError, match="out of memory"):
            model(input_ids=IDS, attention_mask=MASK)
        whole, block.forward = block.forward, lambda hidden, **_: hidden
        model(input_ids=IDS, attention_mask=MASK)
        assert found == {}
        block.forward, block.mlp.forward = whole, plain
        model(input_ids=IDS, attention_mask=MASK)
    assert set(found) == {site}


def test_nested_taps_each_receive_and_the_outer_lives_on(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    anatomy, site = find_anatomy(model), Site(0, "", MLP_OUT)
    counts = {"outer": 0, "inner": 0}

    def count(name: str) -> Callable[..., None]:
        return lambda *_: counts.update({name: counts[name] + 1})

    with torch.no_grad(), tap_stream(model, anatomy, [site], count("outer")):
        with tap_stream(model, anatomy, [site], count("inner")):
            model(input_ids=IDS)
        model(input_ids=IDS)
    assert counts == {"outer": 2, "inner": 1}
    assert hooks_of(model) == []


def test_two_models_are_read_in_two_threads(tiny_model: Callable[..., Any]) -> None:
    models = [tiny_model("llama", seed=seed) for seed in (0, 1)]
    expected, found = [collect(model) for model in models], [{}, {}]
    threads = [threading.Thread(target=lambda n=n: found[n].update(collect(models[n]))) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(found, expected, strict=True):
        assert set(mine) == set(theirs)
        assert all(torch.equal(mine[site], theirs[site]) for site in mine)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "granitemoeshared", "gpt_oss"])
def test_taps_run_without_values_in_bfloat16(family: str) -> None:
    """Under FakeTensorMode a read back to the host has nothing to give, and fails."""
    model = build_tiny(family, dtype=torch.bfloat16)
    anatomy, found = find_anatomy(model), {}
    sites = list(stream_sites(model, anatomy))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.ones(2, 6, dtype=torch.int64)
        with tap_stream(model, anatomy, sites, lambda s, t: found.update({s: t})):
            model(input_ids=ids, attention_mask=ids, use_cache=False)
    assert set(found) == set(sites)


@pytest.mark.parametrize("family", ["qwen2_moe", "flex_olmo"])
def test_a_compiled_model_is_tapped_in_one_graph_and_keeps_its_logits(family: str) -> None:
    model = build_tiny(family)
    anatomy, expected = find_anatomy(model), collect(model)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    torch._dynamo.reset()
    found: dict[Site, Any] = {}

    def receive(site: Site, tensors: dict[str, Any]) -> None:
        ((_, found[site]),) = tensors.items()

    with torch.no_grad():
        plain = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
        torch._dynamo.reset()
        with tap_stream(model, anatomy, list(expected), receive):
            tapped = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    torch._dynamo.reset()
    assert torch.equal(plain, tapped)
    assert set(found) == set(expected)
    assert all(torch.equal(found[site], expected[site]) for site in expected)


def test_projections_are_found_by_name_and_width() -> None:
    mlp = nn.Module()
    mlp.w1, mlp.w2, mlp.w3 = nn.Linear(8, 20), nn.Linear(20, 8), nn.Linear(8, 20)
    block = nn.Module()
    block.mlp = mlp
    assert widths(mlp.w2) == (20, 8)
    assert widths(nn.LayerNorm(8)) is None
    assert down_projection(block, "mlp", 8) is mlp.w2
    assert down_projection(block, "mlp", 9) is None
    # Without a name that is known, the last map from another width back to the stream's.
    other = nn.Module()
    other.enter, other.leave, other.square = nn.Linear(8, 20), nn.Linear(20, 8), nn.Linear(8, 8)
    block.mlp = other
    assert down_projection(block, "mlp", 8) is other.leave
    assert output_projection(other, 8) is None
