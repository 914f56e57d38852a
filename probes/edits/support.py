"""Which kinds of edits a model takes: a table, with the reason where one does not work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import (
    Ablate,
    Bias,
    FakeQuant,
    Force,
    How,
    Keep,
    MixRouting,
    RandomRouting,
    RankRouting,
    Scale,
    SwapExperts,
    TopK,
    TopP,
)
from moescope.core.edit_kinds.features import Descend, Latents, Splice
from moescope.core.edit_kinds.stream import Add, Clamp, MaskHead, ProjectOut, SetChannel, Skip
from moescope.core.errors import InputError
from moescope.core.sites import EXPERT_OUT, RESID_POST, Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.edits.checks import check_edit, why_not_model
from moescope.probes.edits.router_rules import why_no_rule
from moescope.probes.live_model import LiveModel

_TRIED = "an autoencoder"
_SLOTS = f"mlp.{EXPERT_OUT}"


@dataclass(frozen=True)
class Support:
    """Whether a model takes a kind of edit.

    Attributes:
        edit: `ablate zero`, `add`, …
        layers: blocks in which it works.
        reason: why it does not work in the others (or in any); None where it works everywhere.
    """

    edit: str
    layers: tuple[int, ...]
    reason: str | None

    @property
    def works(self) -> bool:
        """Whether it works in some layer."""
        return bool(self.layers)


class _TrialAutoencoder:
    """Stands where an autoencoder is checked, and is never run."""

    def __init__(self, d_model: int) -> None:
        self.site, self.d_in, self.decoder = Site(0, "", RESID_POST), d_model, torch.zeros(1, d_model)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Not for a trial."""
        raise NotImplementedError

    decode = encode


def edit_support(model: LiveModel) -> dict[str, Support]:
    """Every kind of edit and where a model takes it: a trial edit of each is checked in every layer, and none is applied.

    `set_routing` and `patch` are checked without the run they replay.

    Example:
        >>> import moescope as ms
        >>> table = edit_support(ms.load("demo"))
        >>> table["ablate route_around"].layers, table["add"].reason
        ((0, 1, 2, 3, 4, 5), None)
    """
    found = {}
    sources: dict[str, Any] = {_TRIED: _TrialAutoencoder(model.anatomy.d_model)}
    for name, block, make in _trials(model.anatomy):
        layers, reason = [], why_not_model(model)
        for layer in _layers(model.anatomy, block) if reason is None else ():
            try:
                check_edit(model, make(layer), sources)
                layers.append(layer)
            except InputError as refused:
                reason = refused.found or refused.problem
        if not layers and reason is None:
            reason = "a dense model, without routers or experts" if block == "mlp" else "it has no attention"
        found[name] = Support(name, tuple(layers), reason)
    whole = why_not_model(model)
    for name in ("set_routing recorded", "set_routing own", "patch"):
        base = found["add"] if name == "patch" else found["scale"]
        layers, reason = list(base.layers), base.reason
        if name.endswith("own") and whole is None:
            refused_by = {s.layer: why_no_rule(model, s, "weights") for s in model.anatomy.moe if s.block == "mlp"}
            reason = next((r for r in refused_by.values() if r), reason)
            layers = [layer for layer in layers if not refused_by.get(layer)]
        found[name] = Support(name, tuple(layers), reason)
    return found


def _trials(anatomy: Anatomy) -> Iterator[tuple[str, str, Callable[[int], Edit]]]:
    """A small edit of each kind: its name, the sublayer it needs, and how to make it for a layer."""
    width, routers = anatomy.d_model, {s.layer: s for s in anatomy.moe if s.block == "mlp"}

    def routed(make: Callable[[int, Sublayer], Edit]) -> Callable[[int], Edit]:
        return lambda layer: make(layer, routers[layer])

    hows: tuple[How, ...] = ("zero", "renormalise", "route_around", "copy")
    for how in hows:
        yield f"ablate {how}", "mlp", partial(_ablate, how)
    mean = [[0.0] * width]
    yield "ablate mean", "mlp", lambda layer: Ablate(layer=layer, experts=0, how="mean", means=mean)
    yield "force", "mlp", lambda layer: Force(layer=layer, experts=0)
    yield "bias", "mlp", lambda layer: Bias(layer=layer, experts=0, value=1.0)
    yield "scale", "mlp", lambda layer: Scale(layer=layer, experts=0, factor=0.5)
    yield "keep", "mlp", routed(lambda layer, s: Keep(layer=layer, experts=range(s.n_choices)))
    yield (
        "mix_routing",
        "mlp",
        routed(lambda layer, s: MixRouting(layer=layer, reference=[1 / s.n_choices] * s.n_choices)),
    )
    yield "top_k", "mlp", lambda layer: TopK(layer=layer, k=2)
    yield "rank_routing", "mlp", lambda layer: RankRouting(layer=layer, ranks=(2, 3))
    yield "top_p", "mlp", lambda layer: TopP(layer=layer, p=0.5)
    yield "random_routing", "mlp", lambda layer: RandomRouting(layer=layer)
    yield "swap_experts", "mlp", lambda layer: SwapExperts(layer=layer)
    yield "fake_quant", "mlp", lambda layer: FakeQuant(layer=layer, experts=0)
    vector = (1.0,) * width
    yield "add", "", lambda layer: Add(layer=layer, vector=vector)
    yield "project_out", "", lambda layer: ProjectOut(layer=layer, vector=vector)
    yield "clamp", "", lambda layer: Clamp(layer=layer, vector=vector, high=1.0)
    yield "set_channel", "", lambda layer: SetChannel(layer=layer, channels=0)
    yield "splice", "", lambda layer: Splice(layer=layer, sae=_TRIED, forced=True)
    yield "splice slots", "mlp", lambda layer: Splice(layer=layer, sae=_TRIED, site=_SLOTS, forced=True)  # type: ignore[arg-type]  # a constant
    yield "latents", "", lambda layer: Latents(layer=layer, sae=_TRIED, latents=0, values=1.0, forced=True)
    yield "descend", "", lambda layer: Descend(layer=layer, sae=_TRIED, target=[1.0], forced=True)
    yield "skip block", "", lambda layer: Skip(layer=layer)
    yield "skip attn", "", lambda layer: Skip(layer=layer, part="attn")
    yield "skip mlp", "", lambda layer: Skip(layer=layer, part="mlp")
    yield "mask_head zero", "attn", lambda layer: MaskHead(layer=layer, heads=0)
    yield "mask_head uniform", "attn", lambda layer: MaskHead(layer=layer, heads=0, how="uniform")


def _ablate(how: How, layer: int) -> Edit:
    return Ablate(layer=layer, experts=0, how=how)


def _layers(anatomy: Anatomy, block: str) -> list[int]:
    if block == "mlp":
        return [s.layer for s in anatomy.moe if s.block == "mlp"]
    if block == "attn":
        return [s.layer for s in anatomy.sublayers if s.block == "attn" and s.kind == "attention"]
    return list(range(anatomy.n_layers))
