"""What each slot of a router adds to the residual stream: the block's output taken apart, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

from moescope.core.errors import InputError
from moescope.core.sites import EXPERT_OUT, MLP_OUT, SHARED_OUT, Site
from moescope.probes.attribution.logit_norms import FrozenNorm, frozen_norm, tolerance
from moescope.probes.block_outputs import contributions
from moescope.probes.live_model import LiveModel
from moescope.probes.shared_expert_taps import routed_scale
from moescope.probes.taps import sites_of
from moescope.sae.data.live import LivePass


@dataclass(frozen=True)
class Parts:
    """A block's output as a sum: Σ over slots + shared + bias = added.

    Attributes:
        slots: what each chosen expert adds, its weight and every factor and norm behind it included.
        experts: which expert each slot is of.
        shared: what shared experts add, None where there are none.
        bias: what a norm behind the sum adds by itself, None where nothing.
        added: what the block adds to the stream.
    """

    slots: Float[torch.Tensor, "token slot d_model"]
    experts: Int[torch.Tensor, "token slot"]
    shared: Float[torch.Tensor, "token d_model"] | None
    bias: Float[torch.Tensor, " d_model"] | None
    added: Float[torch.Tensor, "token d_model"]


class StreamParts:
    """Takes the output of one router's block apart.

    The stream gets `routed_scale · Σ weight · slot + shared`, through whatever map the family puts behind the sum: nothing, a
    factor, or a norm, whose scale is held at what it was for each token, so that the parts add up. That they do is checked on
    every batch.

    Args:
        model: what runs.
        layer, block: which router.

    Raises:
        InputError: no router there, or its slots or its output cannot be read.
    """

    def __init__(self, model: LiveModel, layer: int, block: str = "mlp") -> None:
        s = model.anatomy.moe_at(layer, block)
        if s is None:
            raise InputError(
                f"layer {layer} has no router {block!r}", expected=f"one of layers {model.anatomy.moe_layers}"
            )
        self.model, self.sublayer = model, s
        self.out = Site(layer, block, EXPERT_OUT)
        self.shared = Site(layer, block, SHARED_OUT)
        self.added = Site(layer, "" if block == "mlp" else block, MLP_OUT)
        there = set(sites_of(model.module, model.anatomy))
        if missing := [site for site in (self.out, self.added) if site not in there]:
            raise InputError(
                f"what the experts of layer {layer} add to the stream cannot be read",
                found=s.unreachable or f"this model has no site {missing[0]}",
                fix="leave this layer out",
            )
        self.has_shared = self.shared in there
        self.moe: Any = model.module.get_submodule(s.path)
        self.block = model.module.get_submodule(model.anatomy.block_paths[layer])
        self.factor = contributions(model.module, model.anatomy, layer)[self.added].factor

    @property
    def sites(self) -> list[Site]:
        """What must be tapped."""
        return [self.out, self.added, *([self.shared] if self.has_shared else [])]

    @property
    def n_choices(self) -> int:
        """Routed and null experts."""
        return self.sublayer.n_choices

    @torch.no_grad()
    def of(self, found: LivePass) -> Parts:
        """The parts of what a pass showed, in float32.

        Raises:
            InputError: they do not add up to the block's output.
        """
        at = found[self.out]
        assert at.weight is not None
        assert at.expert is not None
        added = found[self.added].vectors.float()
        slots = at.vectors.float() * (at.weight.float() * routed_scale(self.moe))[:, None]
        slots, experts = slots.reshape(len(found), -1, slots.shape[-1]), at.expert.reshape(len(found), -1)
        if slots.shape[-1] != added.shape[-1]:
            slots = self._led_back(slots)
        shared = found[self.shared].vectors.float() if self.has_shared else None
        total = slots.sum(1) if shared is None else slots.sum(1) + shared
        behind = self._behind(total, added, self.model.dtype)
        if behind is not None:
            slots = _through(behind, slots)
            shared = None if shared is None else _through(behind, shared)
        bias = behind.bias.float() if behind is not None and bool(behind.bias.any()) else None
        return Parts(slots, experts, shared, bias, added)

    def _behind(self, total: torch.Tensor, added: torch.Tensor, dtype: torch.dtype) -> FrozenNorm | None:
        """The map between the sum and what is added; None for nothing.

        Raises:
            InputError: no map that is known.
        """
        most = tolerance(dtype) * float(added.abs().max())
        maps: Iterable[FrozenNorm | None]
        if self.factor is None:
            if float((total - added).abs().max()) <= most:
                return None
            maps = (frozen_norm(norm, total, added) for norm in self._followers())
        else:
            maps = [self._factored(total, added)]
        for found in maps:
            if found is not None and float((found(total) - added.double()).abs().max()) <= most:
                return found
        raise InputError(
            f"the output of {self.sublayer.block} in layer {self.sublayer.layer} is not told apart by experts",
            found="it is not the sum of what they give, nor a factor or a norm of that sum",
            fix="leave this layer out",
        )

    def _followers(self) -> Iterator[nn.Module]:
        """Children of the block that may norm its output."""
        inside = {id(m) for m in self.moe.modules()}
        return (c for c in self.block.children() if not any(id(m) in inside for m in c.modules()))

    def _factored(self, total: torch.Tensor, added: torch.Tensor) -> FrozenNorm:
        assert self.factor is not None
        zeros = torch.zeros(1, 1, total.shape[-1], dtype=added.dtype, device=added.device)
        shift = self.factor(zeros).double().reshape(-1)
        ones = torch.ones(len(total), dtype=torch.float64, device=added.device)
        return FrozenNorm(self.factor(zeros + 1).double().reshape(-1) - shift, shift, False, ones)

    def _led_back(self, slots: torch.Tensor) -> torch.Tensor:
        """From a latent width in which experts work to that of the stream."""
        up: Any = getattr(self.moe, "fc2_latent_proj", None)
        if up is None or getattr(up, "bias", None) is not None:
            raise InputError(
                f"the experts of layer {self.sublayer.layer} work in a width of their own",
                found=f"{slots.shape[-1]} components, led back to the stream in a way that is not known",
                fix="leave this layer out",
            )
        found: torch.Tensor = slots @ up.weight.float().T
        return found


def _through(norm: FrozenNorm, vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [token, …, d_model] through the map, its bias left out."""
    scale = norm.scale.float().reshape(-1, *([1] * (vectors.ndim - 1)))
    wide = vectors - vectors.mean(-1, keepdim=True) if norm.centred else vectors
    return wide * norm.gain.float() * scale
