"""Vectors of one pass: those of plain modules, in the right rows, with the right texts and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.probes.batches import Batch, BatchPlan
from moescope.sae.data.live import site_vectors
from moescope.sae.data.run_batches import run_batches
from moescope.sae.data.split import held_out

LENGTHS = (9, 4, 1, 12)


def batch_of(model: Any, ids: list[list[int]]) -> Batch:
    return next(iter(BatchPlan(ms.Corpus.from_token_ids(ids), None, len(ids), 64)))


def plain_output(module: Any, ids: list[int], path: str) -> Any:
    """What a module gives for one text alone."""
    seen: list[Any] = []
    hook = module.get_submodule(path).register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        module(torch.tensor([ids]), use_cache=False)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_stream_vectors_are_the_blocks_outputs(
    side: Any, tiny_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    module, ids = tiny_model("llama"), token_ids(LENGTHS)
    found = site_vectors(ms.load(module), batch_of(module, ids), ["blocks.0.hook_resid_post"], side=side)
    expected = torch.cat([plain_output(module, text, "model.layers.0")[0] for text in ids])
    torch.testing.assert_close(found["blocks.0.hook_resid_post"].vectors, expected, rtol=1e-4, atol=1e-4)
    assert found.sequence.tolist() == [n for n, length in enumerate(LENGTHS) for _ in range(length)]
    assert found.position.tolist() == [p for length in LENGTHS for p in range(length)]
    assert found.token_id.tolist() == [token for text in ids for token in text]
    assert found.logits is None


def test_first_positions_are_left_out(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    model, ids = ms.load(tiny_model("llama")), token_ids(LENGTHS)
    whole, later = (
        site_vectors(model, batch_of(model, ids), ["blocks.1.hook_mlp_out"], first=first) for first in (0, 3)
    )
    kept = np.flatnonzero(whole.position >= 3)
    assert later.position.min() == 3
    assert torch.equal(later["blocks.1.hook_mlp_out"].vectors, whole["blocks.1.hook_mlp_out"].vectors[kept])


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_slots_are_their_experts_outputs_by_hand(
    family: str, tiny_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    module, ids = tiny_model(family, experts="eager"), token_ids((6, 3))
    model, layer = ms.load(module), "blocks.1.mlp"
    found = site_vectors(
        model, batch_of(model, ids), [f"{layer}.experts.hook_out", f"{layer}.experts.hook_post"], first=1
    )
    out, post = found[f"{layer}.experts.hook_out"], found[f"{layer}.experts.hook_post"]
    experts = module.get_submodule(model.anatomy.moe[1].experts_path)
    k = model.anatomy.top_k
    assert len(out.vectors) == len(post.vectors) == k * len(found) == k * 7
    given: list[Any] = []
    hook = experts.register_forward_pre_hook(lambda _m, inputs: given.append([t.clone() for t in inputs]))
    with torch.no_grad():
        for text in ids:
            module(torch.tensor([text]), use_cache=False)
    hook.remove()
    hidden, chosen, weights = (torch.cat([call[n][1:] for call in given]) for n in range(3))
    for row in range(len(out.vectors)):
        token, slot = int(out.token[row]), int(out.slot[row])  # type: ignore[index]  # slot sites have both
        expert = int(chosen[token, slot])
        assert int(out.expert[row]) == int(post.expert[row]) == expert  # type: ignore[index]  # as above
        assert float(out.weight[row]) == pytest.approx(float(weights[token, slot]), abs=1e-5)  # type: ignore[index]  # as above
        gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
        neurons = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(post.vectors[row], neurons, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(out.vectors[row], experts.down_proj[expert] @ neurons, rtol=1e-3, atol=1e-4)
    one = out.of_expert(int(out.expert[0]))  # type: ignore[index]  # as above
    assert set(one.expert.tolist()) == {int(out.expert[0])}  # type: ignore[union-attr,index]  # as above
    assert len(one.vectors) == int((chosen == int(out.expert[0])).sum())  # type: ignore[index]  # as above


def test_heads_lie_side_by_side(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    module, ids = tiny_model("llama"), token_ids((6, 3))
    found = site_vectors(ms.load(module), batch_of(module, ids), ["blocks.0.attn.hook_q"])["blocks.0.attn.hook_q"]
    expected = torch.cat([plain_output(module, text, "model.layers.0.self_attn.q_proj")[0] for text in ids])
    assert found.heads == 4
    torch.testing.assert_close(found.vectors, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.of_head(2).vectors, expected[:, 16:24], rtol=1e-4, atol=1e-5)


def test_logits_are_the_models(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    module, ids = tiny_model("gpt2"), token_ids((5, 5))
    found = site_vectors(ms.load(module), batch_of(module, ids), ["blocks.0.hook_resid_pre"], logits=True)
    with torch.no_grad():
        assert torch.equal(found.logits, module(torch.tensor(ids), attention_mask=torch.ones(2, 5)).logits)


def test_a_site_of_another_model_is_refused(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("llama"))
    with pytest.raises(InputError, match="no site"):
        site_vectors(model, batch_of(model, token_ids((5,))), ["blocks.0.mlp.experts.hook_out"])


def test_a_run_gives_its_batches_again(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    ids = token_ids((9, 4, 1, 12, 7, 3))
    run = record_ids(tiny_model("llama"), ids, labels=list("ababab"), batch_size=4, probes=[], max_length=8)
    batches = list(run_batches(run))
    sequences = [s for batch in batches for s in batch.sequences]
    assert [len(batch.sequences) for batch in batches] == [4, 4]
    assert [s.token_ids.tolist() for s in sequences] == [part for text in ids for part in (text[:8], text[8:]) if part]
    assert [(s.document_id, s.part, s.document.label) for s in sequences][:3] == [(0, 0, "a"), (0, 1, "a"), (1, 0, "b")]
    assert [s.sequence_id for s in sequences] == list(range(8))


def test_held_out_and_trained_documents_make_up_the_run(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    run = record_ids(tiny_model("llama"), token_ids((3,) * 40), probes=[])
    out, kept = (
        [s.document_id for b in run_batches(run, documents=side, share=0.3, seed=5) for s in b.sequences]
        for side in ("held_out", "trained")
    )
    assert out == np.flatnonzero(held_out(np.arange(40), 0.3, 5)).tolist()
    assert sorted(out + kept) == list(range(40))
    few = [s.document_id for b in run_batches(run, only=np.array([7, 2])) for s in b.sequences]
    assert few == [2, 7]
    with pytest.raises(InputError, match="no held-out documents"):
        run_batches(run, documents="held_out", share=0.0)
