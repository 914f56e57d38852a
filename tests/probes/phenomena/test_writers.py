"""Massive activations taken apart: against sums written out by hand, and in models whose writer was planted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.probes.batches import BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.phenomena.writers import Origin, Place, take_apart

CHANNEL = 7


def apart(module: Any, sequences: list[list[int]], places: list[Place]) -> Origin:
    model = ms.load(module)
    return take_apart(model, BatchPlan(Corpus.from_token_ids(sequences), None, 2, 64, 97), places)


def noted(given: dict[Any, torch.Tensor], key: Any, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    given[key] = inputs[0]


def parts_of(origin: Origin, kind: str, layer: int) -> dict[int, float]:
    return {p.number: p.value for p in origin.parts if p.kind == kind and p.layer == layer}


def test_parts_are_the_products_of_a_plain_model_and_sum_to_the_value(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    """A dense model by plain hooks: neurons times weights, heads times weights, embedding."""
    module, sequences = tiny_model("llama"), token_ids((6, 9, 5))
    at = [2, 8, 0]
    origin = apart(module, sequences, [Place(n, 1, p, CHANNEL) for n, p in enumerate(at)])
    neurons, heads, embedding, value = torch.zeros(2, 48), torch.zeros(2, 4), 0.0, 0.0
    for row, place in zip(sequences, at, strict=True):
        given: dict[Any, torch.Tensor] = {}
        handles = []
        for layer, block in enumerate(module.model.layers):
            for name, child in (("mlp", block.mlp.down_proj), ("attn", block.self_attn.o_proj)):
                key = (layer, name)
                note = partial(noted, given, key)
                handles.append(child.register_forward_pre_hook(note))
        with torch.no_grad():
            out = module.model(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False)
        for handle in handles:
            handle.remove()
        embedding += float(out.hidden_states[0][0, place, CHANNEL])
        # the last hidden state lies behind the norm: the sum of the parts is all there is to hold it against
        for layer, block in enumerate(module.model.layers):
            post, z = given[layer, "mlp"][0, place], given[layer, "attn"][0, place].reshape(4, -1)
            neurons[layer] += (post * block.mlp.down_proj.weight[CHANNEL]).detach()
            heads[layer] += (z * block.self_attn.o_proj.weight[CHANNEL].reshape(4, -1)).sum(-1).detach()
    value = (embedding + float(neurons.sum()) + float(heads.sum())) / 3
    assert origin.value == pytest.approx(value, rel=1e-4, abs=1e-5)
    assert abs(origin.rest * origin.value) < 1e-5
    for layer in (0, 1):
        assert parts_of(origin, "neuron", layer) == pytest.approx(
            {n: float(v) / 3 for n, v in enumerate(neurons[layer])}, abs=1e-5
        )
        assert parts_of(origin, "head", layer) == pytest.approx(
            {n: float(v) / 3 for n, v in enumerate(heads[layer])}, abs=1e-5
        )
    assert parts_of(origin, "embedding", -1)[-1] == pytest.approx(embedding / 3, abs=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt2", "olmoe"])
def test_parts_of_every_family_sum_to_the_value(
    family: str, tiny_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    more = {"n_inner": 48} if family == "gpt2" else {}
    module, sequences = tiny_model(family, **more), token_ids((6, 9))
    layers = ms.load(module).anatomy.n_layers
    origin = apart(module, sequences, [Place(0, layers - 1, 3, 5), Place(1, layers - 1, 0, 5)])
    total = sum(part.value for part in origin.parts)
    assert total == pytest.approx(origin.value, rel=1e-4, abs=1e-5)
    assert abs(origin.rest * origin.value) < 1e-4
    kinds = {part.kind for part in origin.parts}
    assert {"embedding", "head"} <= kinds
    assert ("expert" in kinds) == (family != "gpt2")
    assert ("neuron" in kinds) == (family in ("gpt2", "deepseek_v3"))
    if family in ("qwen2_moe", "deepseek_v3"):
        assert any(part.kind == "expert" and part.number == -1 for part in origin.parts), "the shared expert"
    assert ("bias" in kinds) == (family == "gpt2")


def test_a_planted_neuron_is_the_writer(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    module, sequences = tiny_model("llama", num_hidden_layers=3), token_ids((6, 9))
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight[CHANNEL, 11] *= 1e5
    model = ms.load(module)
    post: list[torch.Tensor] = []
    handle = module.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, i: post.append(i[0][0, 0, 11]))
    with torch.no_grad():
        for row in sequences:
            model.module(input_ids=torch.tensor([row]), use_cache=False)
    handle.remove()
    origin = apart(module, sequences, [Place(0, 2, 0, CHANNEL), Place(1, 2, 0, CHANNEL)])
    weight = float(module.model.layers[1].mlp.down_proj.weight[CHANNEL, 11])
    first = origin.parts[0]
    assert (first.kind, first.layer, first.block, first.number) == ("neuron", 1, "mlp", 11)
    assert first.value == pytest.approx(weight * float(sum(post)) / 2, rel=1e-4)
    if all(float(p) * weight * origin.value > 0 for p in post):
        assert [w.number for w in origin.writers()] == [11]


def test_a_planted_head_is_the_writer(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    module, sequences = tiny_model("llama"), token_ids((6,))
    with torch.no_grad():
        module.model.layers[0].self_attn.o_proj.weight[CHANNEL, 16:24] *= 1e4
    origin = apart(module, sequences, [Place(0, 1, 4, CHANNEL)])
    (writer,) = origin.writers()
    assert (writer.kind, writer.layer, writer.number) == ("head", 0, 2)
    assert writer.share == pytest.approx(1.0, abs=0.02)


def test_places_that_cannot_be_taken_apart_together_are_refused(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    module, sequences = tiny_model("llama"), token_ids((6, 9))
    with pytest.raises(InputError, match="after one block"):
        apart(module, sequences, [Place(0, 0, 0, 1), Place(1, 1, 0, 1)])
    with pytest.raises(InputError, match="after one block"):
        apart(module, sequences, [])
    with pytest.raises(InputError, match="none of the places"):
        apart(module, sequences, [Place(17, 0, 0, 1)])


@pytest.mark.parametrize("family", ["laguna", "nemotron_h"])
def test_experts_are_taken_apart_as_the_block_adds_them(family: str, token_ids: Callable[..., Any]) -> None:
    """A factor behind the sum over experts, and experts in a width of their own: the shared part is what its module puts out."""
    from moescope.core.sites import SHARED_OUT, Site
    from moescope.probes.families.tiny import build_tiny
    from moescope.probes.taps import tapped

    module = build_tiny(family)
    model = ms.load(module)
    moe = model.anatomy.moe[0]
    owner = module.get_submodule(moe.path)
    if family == "laguna":
        owner.routed_scaling_factor = 4.0
    site = Site(moe.layer, moe.block, SHARED_OUT)
    (row,) = token_ids((7,))
    seen: list[torch.Tensor] = []
    with torch.no_grad(), tapped(module, model.anatomy, [site], lambda _, tensors: seen.append(tensors["out"])):
        module(input_ids=torch.tensor([row]), use_cache=False)
    truth = float(seen[0].reshape(len(row), -1)[3, CHANNEL])
    origin = apart(module, [row], [Place(0, model.anatomy.n_layers - 1, 3, CHANNEL)])
    experts = parts_of(origin, "expert", moe.layer)
    assert experts[-1] == pytest.approx(truth, rel=1e-4, abs=1e-7)
