"""Taps: hooks that hand tensors at sites to a receiver, and are gone when their context ends."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from moescope.core.errors import InputError
from moescope.core.sites import EXPERT_INDICES, EXPERT_OUT, RESID_POST, ROUTER_LOGITS, Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.expert_slots import slots_tapped

Receive = Callable[[Site, dict[str, torch.Tensor]], None]


@contextmanager
def tapped(model: nn.Module, anatomy: Anatomy, sites: Collection[Site], receive: Receive) -> Iterator[None]:
    """Call `receive(site, tensors)` whenever the model passes one of `sites`.

    Tensors at each site, as the model really used them:
        `blocks.{L}.hook_resid_pre`, `…hook_resid_post`: resid [row, position, d_model]
        `blocks.{L}.hook_attn_out`, `…hook_mlp_out`: out [row, position, d_model]
        `….hook_router_logits`: logits [row · position, n_experts]
        `….hook_expert_indices`, `….hook_expert_weights`: indices, weights [row · position, k], as given to the experts
        `….experts.hook_out`: out [row · position, k, d_model], indices, weights
        `….experts.hook_post`: post [row · position · k, d_expert] in the order in which the kernel computes, slot (which
            row · position · k place each of them is), indices, weights
        `….shared_expert.hook_out`: out [row · position or row, position, d_model]
        `blocks.{L}.mlp.hook_post`: post [row, position, d_mlp]
        `….hook_pattern`: pattern [row, head, query, key]
        `….hook_q`, `hook_k`, `hook_v`, `hook_z`: q, k, v, z [row, position, head, d_head]

    Raises:
        InputError: a site this model does not have.
    """
    modules = dict(model.named_modules())
    by_place = {(s.layer, s.block): s for s in anatomy.sublayers}
    wanted: defaultdict[str, list[Site]] = defaultdict(list)
    for site in sites:
        wanted[site.tensor].append(site)
    with ExitStack() as stack:
        slots = []
        for tensor, places in wanted.items():
            for site in places:
                if tensor == RESID_POST:
                    block = modules[_at(anatomy.block_paths, site)]
                    stack.enter_context(_hook(block.register_forward_hook(_output_hook(site, "resid", 0, receive))))
                    continue
                sublayer = by_place.get((site.layer, site.block))
                experts, router = _modules(sublayer, modules)
                if tensor == ROUTER_LOGITS and router is not None and sublayer is not None:
                    hook = _output_hook(site, "logits", sublayer.router_logits_index, receive)
                    stack.enter_context(_hook(router.register_forward_hook(hook)))
                elif tensor == EXPERT_INDICES and experts is not None:
                    stack.enter_context(
                        _hook(
                            experts.register_forward_pre_hook(_decision_hook(site, experts, receive), with_kwargs=True)
                        )
                    )
                elif tensor == EXPERT_OUT and experts is not None:
                    slots.append((experts, _slot_receiver(site, receive)))
                else:
                    raise InputError(f"this model has no site {site}", expected=_known(anatomy))
        if slots:
            stack.enter_context(slots_tapped(slots))
        yield


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _output_hook(site: Site, name: str, index: int, receive: Receive) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        receive(site, {name: output[index] if isinstance(output, (tuple, list)) else output})

    return hook


def _decision_hook(site: Site, experts: nn.Module, receive: Receive) -> Callable[[nn.Module, Any, Any], None]:
    # Families differ in names, never in order: hidden states, expert ids, weights.
    names = list(inspect.signature(experts.forward).parameters)

    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = dict(zip(names, inputs, strict=False)) | named
        receive(site, {"indices": given[names[1]], "weights": given[names[2]]})

    return hook


def _slot_receiver(site: Site, receive: Receive) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    def hand_over(out: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> None:
        receive(site, {"out": out, "indices": indices, "weights": weights})

    return hand_over


def _modules(sublayer: Sublayer | None, modules: dict[str, nn.Module]) -> tuple[nn.Module | None, nn.Module | None]:
    if sublayer is None:
        return None, None
    return modules.get(sublayer.experts_path or "-"), modules.get(sublayer.router_path or "-")


def _at(paths: tuple[str, ...], site: Site) -> str:
    if site.layer >= len(paths):
        raise InputError(f"this model has no site {site}", expected=f"layers 0 to {len(paths) - 1}")
    return paths[site.layer]


def _known(anatomy: Anatomy) -> str:
    if not anatomy.moe:
        return "blocks.{L}.hook_resid_post (this model is dense: it has no routers or experts)"
    return f"blocks.{{L}}.hook_resid_post, or router and expert sites of layers {anatomy.moe_layers}"
