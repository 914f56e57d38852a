"""What each expert adds to the stream, and that it adds up to the block's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.probes.batches import Batch, Sequence
from moescope.probes.corpus import Document
from moescope.probes.families.tiny import build_tiny
from moescope.sae.data.live import site_vectors
from moescope.sae.experts.stream_parts import Parts, StreamParts


def batch_of(rows: list[list[int]]) -> Batch:
    return Batch(0, tuple(Sequence(n, n, Document(""), 0, "", np.array(ids)) for n, ids in enumerate(rows)), 0)


def total(parts: Parts) -> torch.Tensor:
    found = parts.slots.sum(1)
    found = found if parts.shared is None else found + parts.shared
    return found if parts.bias is None else found + parts.bias


# Plain sums, shared experts gated and not, a factor behind the sum, a norm behind it, experts of a latent width.
@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3", "granitemoeshared", "flex_olmo", "afmoe", "laguna", "nemotron_h"]
)  # fmt: skip
def test_slots_and_shared_experts_add_up_to_what_the_block_adds_along_any_direction(
    family: str, token_ids: Callable[..., list[list[int]]]
) -> None:
    model = ms.load(build_tiny(family))
    reader = StreamParts(model, model.anatomy.moe_layers[0])
    found = reader.of(site_vectors(model, batch_of(token_ids([9, 6])), reader.sites, first=1))
    directions = torch.randn(5, model.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    along, whole = total(found) @ directions.T, found.added @ directions.T
    assert found.slots.shape[:2] == (13, model.anatomy.top_k)
    assert float((along - whole).abs().max()) <= 1e-5 * float(whole.abs().max())


def test_slot_is_weight_times_the_experts_own_output(
    tiny_model: Callable[..., Any], token_ids: Callable[..., list[list[int]]]
) -> None:
    module = tiny_model("mixtral")
    ids = token_ids([8])
    taken: list[tuple[torch.Tensor, ...]] = []
    experts = module.model.layers[1].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _module, given: taken.append(given))
    with torch.no_grad():
        module(torch.tensor(ids))
    handle.remove()
    hidden, chosen, weights = taken[0]
    model = ms.load(module)
    reader = StreamParts(model, 1)
    found = reader.of(site_vectors(model, batch_of(ids), reader.sites))
    for token in range(8):
        for slot in range(2):
            expert = int(found.experts[token, slot])
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            weight = weights[token][chosen[token] == expert][0]
            assert torch.allclose(found.slots[token, slot], weight * out, atol=1e-5)


def test_block_that_is_no_sum_of_experts_is_refused_with_the_reason(token_ids: Callable[..., list[list[int]]]) -> None:
    model = ms.load(build_tiny("gemma4_text"))
    reader = StreamParts(model, 0)
    with pytest.raises(InputError, match="not told apart by experts"):
        reader.of(site_vectors(model, batch_of(token_ids([5])), reader.sites))


def test_layer_without_router_is_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="layer 7 has no router"):
        StreamParts(ms.load(tiny_model("mixtral")), 7)
