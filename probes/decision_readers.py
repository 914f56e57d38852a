"""How a router's decision is read: nearly always what the experts are given, and a few families otherwise.

A reader hooks modules and hands on (ids, weights), both [row · position, k]. A slot that went to no expert has an id of a
null expert: n_experts or above.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn
from torch.utils.hooks import RemovableHandle

from moescope.probes.anatomy import Sublayer

Give = Callable[[Int[torch.Tensor, "token k"], Float[torch.Tensor, "token k"]], None]
Reader = Callable[[nn.Module, Sublayer, Give], list[RemovableHandle]]


def given_to(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
    """The arguments of a module's call in the order of its signature: families differ in names, never in order."""
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, inputs, strict=False)) | named
    return [given[name] for name in names if name in given]


def _experts_given(model: nn.Module, s: Sublayer, read: Callable[[Any, Any], None]) -> list[RemovableHandle]:
    """Call `read(second, third)` with what the experts are called with after the hidden states."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        _, second, third, *_ = given_to(module, inputs, named)
        read(second, third)

    return [_module(model, s.experts_path).register_forward_pre_hook(hook, with_kwargs=True)]


def experts(model: nn.Module, s: Sublayer, give: Give) -> list[RemovableHandle]:
    """Ids and weights as the experts are given them."""
    return _experts_given(model, s, give)


def skipping(model: nn.Module, s: Sublayer, give: Give) -> list[RemovableHandle]:
    """A router with a class for no expert, which reaches the experts as expert 0 with weight 0 (zaya)."""

    def read(ids: torch.Tensor, weights: torch.Tensor) -> None:
        give(torch.where(weights == 0, s.n_experts or 0, ids), weights)

    return _experts_given(model, s, read)


def one_hot(model: nn.Module, s: Sublayer, give: Give) -> list[RemovableHandle]:
    """Experts that are given [token, 1, expert] ones; a token over an expert's capacity has none (switch_transformers)."""

    def read(chosen: torch.Tensor, weights: torch.Tensor) -> None:
        kept = chosen.sum(-1) > 0
        give(torch.where(kept, chosen.argmax(-1), s.n_experts or 0), torch.where(kept, weights, 0))

    return _experts_given(model, s, read)


def mask_as_ids(model: nn.Module, s: Sublayer, give: Give) -> list[RemovableHandle]:
    """What NLLB-MoE's experts do with the 0/1 mask they are given as ids: expert 1 where it is 1, expert 0 elsewhere."""

    def read(mask: torch.Tensor, shares: torch.Tensor) -> None:
        first, kept = (shares * mask).sum(-1), mask.sum(-1) > 0
        ids = torch.stack([torch.where(kept, 1, s.n_experts or 0), torch.zeros_like(mask[:, 0])], -1)
        give(ids, torch.stack([first, (shares * (1 - mask)).sum(-1)], -1))

    return _experts_given(model, s, read)


def shares_of_two(model: nn.Module, s: Sublayer, give: Give) -> list[RemovableHandle]:
    """The two experts with a share in a router's output (top_1_mask, shares, logits): NLLB-MoE's choice."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        weights, ids = output[1].topk(2, dim=-1)
        give(torch.where(weights > 0, ids, s.n_experts or 0), weights)

    return [_module(model, s.router_path).register_forward_hook(hook)]


def dense_scores(model: nn.Module, s: Sublayer, give: Give) -> list[RemovableHandle]:
    """A router that gives a score for every expert, 0 for those not chosen (llama4)."""
    k = s.top_k or 1

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        weights, ids = output[0].topk(k, dim=-1)
        give(ids, weights)

    return [_module(model, s.router_path).register_forward_hook(hook)]


def sorted_slots(model: nn.Module, s: Sublayer, give: Give) -> list[RemovableHandle]:
    """A gating that gives slots sorted by expert, and how many each expert has (jetmoe)."""
    k = s.top_k or 1

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        order, _, weights, sizes, _ = output
        each = torch.tensor(sizes, device=order.device)
        expert = torch.repeat_interleave(torch.arange(len(sizes), device=order.device), each, output_size=len(order))
        ids = torch.empty_like(order).scatter_(0, order, expert)
        give(ids.view(-1, k), torch.empty_like(weights).scatter_(0, order, weights).view(-1, k))

    return [_module(model, s.router_path).register_forward_hook(hook)]


def product_keys(model: nn.Module, s: Sublayer, give: Give) -> list[RemovableHandle]:
    """Experts looked up in embeddings by id (doge). The weights pass through no module: they follow from the logits."""
    owner = _module(model, s.path)
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        seen[:] = [output]

    def read(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        (ids,), keys = inputs, int(owner.num_keys)  # type: ignore[arg-type]  # modules type any attribute as tensor
        first, second = seen.pop().view(2, len(ids), -1)
        weights = (first.gather(-1, ids // keys) + second.gather(-1, ids % keys)).softmax(-1)
        give(ids, weights / weights.sum(-1, keepdim=True) if owner.norm_topk_prob else weights)

    gate, embedding = owner.get_submodule("router_gate"), owner.get_submodule("down_embed")
    return [gate.register_forward_hook(keep), embedding.register_forward_pre_hook(read)]


def registered(model: nn.Module, s: Sublayer, give: Give) -> list[RemovableHandle]:
    """A layer of the user's own, announced with `register_moe`."""
    from moescope.probes.custom_layers import custom_layer

    owner = _module(model, s.path)
    layer = custom_layer(owner)
    assert layer is not None

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        ids, weights = layer.decision(module, inputs, output)
        give(ids.reshape(-1, s.top_k or 1), weights.reshape(-1, s.top_k or 1))

    return [owner.register_forward_hook(hook)]


READERS: dict[str, Reader] = {
    f.__name__: f
    for f in (
        experts,
        skipping,
        one_hot,
        mask_as_ids,
        shares_of_two,
        dense_scores,
        sorted_slots,
        product_keys,
        registered,
    )
}


def _module(model: nn.Module, path: str | None) -> nn.Module:
    assert path is not None
    return model.get_submodule(path)
