"""Passes that begin at a block: the model's own logits, nothing left behind, and a refusal where they would differ."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moescope as ms
from moescope.probes.forward import DeviceBatch, logits_of
from moescope.probes.sweeps.prefix import Prefix, rows_of

FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama", "gpt2")


def _batch(lengths: tuple[int, ...] = (12, 9, 12)) -> DeviceBatch:
    ids = torch.randint(1, 97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return DeviceBatch(torch.where(mask, ids, 0), mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_pass_from_any_block_gives_the_plain_logits(family: str, swept_model: Callable[..., Any]) -> None:
    model = ms.load(swept_model(family))
    prefix, batch = Prefix(model), _batch()
    layers = range(model.anatomy.n_layers)
    kept = prefix.plain(batch, layers=layers)
    with torch.no_grad():
        plain = model.module(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
    assert torch.equal(kept.logits, plain)
    rows = torch.tensor([2, 0, 0, 1, 2])
    for layer in layers:
        assert prefix.why_not(layer, batch) is None
        for attention in (False, True):
            with torch.no_grad(), prefix.resumed(layer, kept, attention=attention):
                assert torch.equal(logits_of(model, batch), plain)
            with torch.no_grad(), prefix.resumed(layer, kept, rows, attention=attention):
                found = logits_of(model, rows_of(batch, rows))
            assert (found - plain[rows]).abs().max() < 1e-4


def test_blocks_before_do_not_run_and_the_stream_is_the_kept_one(swept_model: Callable[..., Any]) -> None:
    model = ms.load(swept_model("qwen3_moe", num_hidden_layers=4))
    prefix, batch = Prefix(model), _batch()
    kept = prefix.plain(batch, layers=[2])
    ran: list[int] = []
    for number, block in enumerate(model.module.model.layers):
        block.self_attn.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad(), prefix.resumed(2, kept):
        same = logits_of(model, batch)
    assert ran == [2, 3]  # the attention of block 2 hands on what it gave before, its hooks still run
    kept.given[2] = kept.given[2] + 1
    with torch.no_grad(), prefix.resumed(2, kept):
        assert not torch.allclose(logits_of(model, batch), same)


def test_modules_are_as_before_after_an_exception(swept_model: Callable[..., Any]) -> None:
    model = ms.load(swept_model("olmoe"))
    prefix, batch = Prefix(model), _batch()
    kept = prefix.plain(batch, layers=[1])
    with pytest.raises(ZeroDivisionError), prefix.resumed(1, kept):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.module.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.module.modules())
    with torch.no_grad():
        assert torch.equal(logits_of(model, batch), kept.logits)


def test_another_thread_gets_whole_passes(swept_model: Callable[..., Any]) -> None:
    model = ms.load(swept_model("mixtral"))
    prefix, batch, other = Prefix(model), _batch(), _batch((7,))
    kept = prefix.plain(batch, layers=[1])
    with torch.no_grad():
        wanted = logits_of(model, other)
    found: list[torch.Tensor] = []

    def elsewhere() -> None:
        with torch.no_grad():
            found.append(logits_of(model, other))

    with prefix.resumed(1, kept):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert torch.equal(found[0], wanted)


def test_block_that_reads_more_than_the_stream_is_told(swept_model: Callable[..., Any]) -> None:
    module = swept_model("qwen3_moe", num_hidden_layers=3)
    first, last = module.model.layers[0], module.model.layers[2]
    seen: list[torch.Tensor] = []
    first.mlp.register_forward_hook(lambda _m, _i, out: seen.__setitem__(slice(None), [out]))

    def beside(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + seen[0] if seen and seen[0].shape == output.shape else output

    last.register_forward_hook(beside)
    model = ms.load(module)
    prefix = Prefix(model)
    assert prefix.why_not(0, _batch()) is None
    # A skipped block 0 leaves in `seen` what it last gave, for rows in their first order.
    assert "rows in another order" in str(prefix.why_not(2, _batch()))


def test_decisions_are_kept_as_the_experts_were_given_them(
    swept_model: Callable[..., Any], plain_passes: Callable[..., Any], token_ids: Callable[..., list[list[int]]]
) -> None:
    module = swept_model("qwen3_moe")
    ids = token_ids([8, 8])
    batch = DeviceBatch(torch.tensor(ids), torch.ones(2, 8).bool())
    kept = Prefix(ms.load(module)).plain(batch, layers=(), routers=[(1, "mlp")])
    (watched,) = plain_passes(module, ids)
    assert torch.equal(kept.routed[1, "mlp"].reshape(16, 2), watched.experts[1][1])
