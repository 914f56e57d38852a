"""Taps: hooks that hand tensors at sites to a receiver, and are gone when their context ends."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from moescope.core.errors import InputError
from moescope.core.sites import (
    EXPERT_INDICES,
    EXPERT_OUT,
    EXPERT_POST,
    EXPERT_WEIGHTS,
    HEAD_K,
    HEAD_Q,
    HEAD_V,
    HEAD_Z,
    PATTERN,
    ROUTER_LOGITS,
    Site,
)
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.attention_taps import (
    PATTERN_SLICES,
    attention_refusals,
    attention_sites,
    reducible_sites,
    tap_attention,
)
from moescope.probes.decision_readers import READERS
from moescope.probes.expert_slots import SlotTap, slots_tapped
from moescope.probes.foreign.taps import foreign_taps
from moescope.probes.stream_taps import stream_refusals, stream_sites, tap_stream

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
            row · position · k place each of them is), indices, weights; and the slots' outputs, as `computed` in that same
            order or as `out`
        `….shared_expert.hook_out`: out [row · position or row, position, d_model]
        `blocks.{L}.mlp.hook_post`: post [row, position, d_mlp]
        `….hook_pattern`: pattern [row, head, query, key]
        `….hook_q`, `hook_k`, `hook_v`, `hook_z`: q, k, v, z [row, position, head, d_head]

    Everything is as it was when the context ends, however it ends. Hooks of several contexts may be on at once, except at
    the inside of experts, which one context at a time can read.

    Raises:
        InputError: a site this model does not have; the inside of experts that is being read already.
    """
    with ExitStack() as stack:
        left = list(dict.fromkeys(sites))
        if foreign := foreign_taps(model, anatomy):
            left = stack.enter_context(foreign.tap(left, receive))
        wanted: defaultdict[str, list[Site]] = defaultdict(list)
        for site in left:
            wanted[_kind(site)].append(site)
        if missing := _missing(model, anatomy, wanted):
            raise _unknown(missing[0], model, anatomy)
        others = wanted["stream"], wanted["attention"]
        # Logits first: where both are read off the same module, its hooks run in this order.
        for site in [*wanted["logits"], *wanted["decision"]]:
            s = _moe(anatomy, site)
            handles = (
                [_logits_hook(model, s, site, receive)]
                if site.tensor == ROUTER_LOGITS
                else READERS[s.reader](model, s, _decision_receiver(site, receive))
            )
            for handle in handles:
                stack.callback(handle.remove)
        for asked, tap in zip(others, (tap_stream, tap_attention), strict=True):
            if asked:
                stack.enter_context(tap(model, anatomy, asked, receive))
        if wanted["slots"]:
            stack.enter_context(slots_tapped(_slot_taps(model, anatomy, wanted["slots"], receive)))
        yield


def sites_of(model: nn.Module, anatomy: Anatomy) -> list[Site]:
    """Every site a model has, in order of layers."""
    foreign = foreign_taps(model, anatomy)
    if foreign and foreign.whole:
        return foreign.sites()
    own = {*_routing_sites(model, anatomy), *stream_sites(model, anatomy), *attention_sites(model, anatomy)}
    return foreign.sites(own) if foreign else sorted(own)


def unreachable_sites(anatomy: Anatomy) -> dict[Site, str]:
    """Sites inside experts that this model's family does not offer, with the reason."""
    return {Site(s.layer, s.block, EXPERT_OUT): s.unreachable for s in anatomy.moe if s.unreachable is not None}


def _routing_sites(_model: nn.Module, anatomy: Anatomy) -> Iterator[Site]:
    for s in anatomy.moe:
        tensors = [EXPERT_INDICES, EXPERT_WEIGHTS, *([ROUTER_LOGITS] if s.has_logits else [])]
        if s.unreachable is None and s.experts_path is not None:
            tensors += [EXPERT_OUT, *([EXPERT_POST] if s.neurons else [])]
        yield from (Site(s.layer, s.block, tensor) for tensor in tensors)


def _missing(model: nn.Module, anatomy: Anatomy, wanted: dict[str, list[Site]]) -> list[Site]:
    """Sites that the model does not have; only kinds that are asked for are looked up."""
    missing = []
    for kinds, find in (
        (("decision", "logits", "slots"), _routing_sites),
        (("stream",), stream_sites),
        (("attention",), reducible_sites),
    ):
        if asked := [site for kind in kinds for site in wanted.get(kind, ())]:
            known = set(find(model, anatomy))
            missing += [site for site in asked if site not in known]
    return missing


def _kind(site: Site) -> str:
    if site.tensor in (EXPERT_INDICES, EXPERT_WEIGHTS):
        return "decision"
    if site.tensor == ROUTER_LOGITS:
        return "logits"
    if site.tensor in (EXPERT_OUT, EXPERT_POST):
        return "slots"
    return "attention" if site.tensor in (PATTERN, PATTERN_SLICES, HEAD_Q, HEAD_K, HEAD_V, HEAD_Z) else "stream"


def _moe(anatomy: Anatomy, site: Site) -> Sublayer:
    found = anatomy.moe_at(site.layer, site.block)
    assert found is not None
    return found


def _logits_hook(model: nn.Module, s: Sublayer, site: Site, receive: Receive) -> torch.utils.hooks.RemovableHandle:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits = output[s.router_logits_index] if isinstance(output, (tuple, list)) else output
        receive(site, {"logits": logits.reshape(-1, logits.shape[-1])})

    return model.get_submodule(s.logits_path or "").register_forward_hook(hook)


def _decision_receiver(site: Site, receive: Receive) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def give(ids: torch.Tensor, weights: torch.Tensor) -> None:
        receive(site, {"indices": ids, "weights": weights})

    return give


def _slot_taps(model: nn.Module, anatomy: Anatomy, sites: list[Site], receive: Receive) -> Iterator[SlotTap]:
    """One tap for each experts module, whichever of its sites are wanted."""
    places: defaultdict[tuple[int, str], list[Site]] = defaultdict(list)
    for site in sites:
        places[site.layer, site.block].append(site)
    for (layer, block), wanted in places.items():
        s = _moe(anatomy, Site(layer, block, EXPERT_OUT))
        asked = {site.tensor for site in wanted}
        experts = model.get_submodule(s.experts_path or "")
        receiver = _slot_receiver(s, wanted, receive)
        yield SlotTap(experts, receiver, neurons=EXPERT_POST in asked, out=EXPERT_OUT in asked)


def _slot_receiver(s: Sublayer, sites: list[Site], receive: Receive) -> Callable[[dict[str, torch.Tensor]], None]:
    def hand_over(tensors: dict[str, torch.Tensor]) -> None:
        if s.reader == "skipping":  # no expert at all, though it reads expert 0 with weight 0
            ids = torch.where(tensors["weights"] == 0, s.n_experts or 0, tensors["indices"])
            tensors = {**tensors, "indices": ids}
        for site in sites:
            if site.tensor == EXPERT_OUT:
                receive(site, {name: tensors[name] for name in ("out", "indices", "weights")})
            else:  # without `post` where the kernel keeps its neurons to itself, which the ledger tells
                receive(site, tensors)

    return hand_over


def _unknown(site: Site, model: nn.Module, anatomy: Anatomy) -> InputError:
    """A site that this model does not have, with the nearest that it has, or the reason."""
    reason = unreachable_sites(anatomy).get(Site(site.layer, site.block, EXPERT_OUT))
    if site.tensor in (EXPERT_OUT, EXPERT_POST) and reason is not None:
        return InputError(
            f"this model has no site {site}",
            found=f"the inside of its experts cannot be read: {reason}",
            fix="record without the probes `experts` and `expert_outputs`; routing is recorded all the same",
        )
    refusals = stream_refusals(model, anatomy) | attention_refusals(model, anatomy)
    if site in refusals:
        return InputError(f"this model has no site {site}", found=refusals[site], fix="leave this site out")
    names = [str(s) for s in sites_of(model, anatomy)]
    near = difflib.get_close_matches(str(site), names, 3, 0.3)
    if site.layer >= anatomy.n_layers:
        return InputError(f"this model has no site {site}", expected=f"layers 0 to {anatomy.n_layers - 1}")
    dense = " (this model is dense: it has no routers or experts)" if not anatomy.moe else ""
    return InputError(f"this model has no site {site}", expected=f"for instance {', '.join(near)}{dense}")
