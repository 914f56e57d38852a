"""Shared experts: what they add to the routed ones, gate and averaging included.

With what is recorded here, and `routed_scale`, the sum holds that makes up a block with experts:
`routed_scale · Σ weight · slot + shared = output of the MoE module`. What comes after that sum is not part of it: AXK1
norms it, and where the shared expert stands beside the MoE module (the Granite family) the sum is the block's own. Where
experts work in a latent width (Nemotron-H with `moe_latent_size`), Σ weight · slot is first led back to `d_model` by
`fc2_latent_proj`. A dense MLP beside the experts (Gemma 4) is no shared expert: it is `mlp.1`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moescope.core.sites import SHARED_OUT, Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.block_outputs import SHARED_NAME, changes_in_place

Receive = Callable[[Site, dict[str, torch.Tensor]], None]

# Classes that multiply the sum over the experts by their `routed_scaling_factor`. In every other family that has such a
# factor it is in the weights given to the experts.
_SCALE_AFTER_SUM = ("BeamMoE", "LagunaSparseMoeBlock", "MiniMaxM3VLSparseMoeBlock")


@dataclass(frozen=True)
class SharedExpert:
    """The shared experts of one router.

    Attributes:
        module: the module that computes them.
        gate: its output, through a sigmoid, multiplies theirs (the Qwen family); None where they are not gated.
        share: factor with which they enter the sum: 1/2 where routed and shared are averaged.
        copies: whether the sum is made in place in their output, which must then be copied to last.
    """

    module: nn.Module
    gate: nn.Module | None
    share: float
    copies: bool


def routed_scale(moe: nn.Module) -> float:
    """The factor between Σ weight · slot and what the routed experts add to the output of their MoE module.

    Args:
        moe: the module that holds the router and the experts.

    Returns:
        `routed_scaling_factor` where the family multiplies after the sum (Beam, Laguna, MiniMax M3), 1/2 where routed and
        shared experts are averaged (Cohere 2 MoE by its configuration), 1 elsewhere.

    Example:
        >>> import moescope as ms
        >>> model = ms.load("demo")
        >>> routed_scale(model.module.get_submodule(model.anatomy.moe[0].path))
        1.0
    """
    if type(moe).__name__ in _SCALE_AFTER_SUM:
        return float(moe.routed_scaling_factor)  # type: ignore[arg-type]  # a number
    return _share(moe)


def shared_experts(model: nn.Module, anatomy: Anatomy) -> dict[Site, SharedExpert]:
    """Every site of shared experts that a model has, and how to read it."""
    found: dict[Site, SharedExpert] = {}
    for s in anatomy.moe:
        site = Site(s.layer, s.block, SHARED_OUT)
        owner, module = _shared_module(model, anatomy, s)
        if module is not None and s.block == "mlp":
            gate = getattr(owner, "shared_expert_gate", None)
            gate = gate if isinstance(gate, nn.Module) else None
            found[site] = SharedExpert(module, gate, _share(owner), changes_in_place(owner))
    return found


@contextmanager
def tap_shared_experts(model: nn.Module, anatomy: Anatomy, sites: Collection[Site], receive: Receive) -> Iterator[None]:
    """Call `receive(site, {"out": …})` with what shared experts add, [row · position or row, position, d_model]."""
    known = shared_experts(model, anatomy)
    with ExitStack() as stack:
        for site in sites:
            shared = known[site]
            tap = _SharedTap(site, shared, receive)
            stack.callback(shared.module.register_forward_hook(tap.shared_hook).remove)
            if shared.gate is not None:
                stack.callback(shared.gate.register_forward_hook(tap.gate_hook).remove)
        yield


class _SharedTap:
    """The shared experts' output and their gate's, in whatever order they come."""

    def __init__(self, site: Site, shared: SharedExpert, receive: Receive) -> None:
        self.site, self.shared, self.receive = site, shared, receive
        self.held: dict[str, torch.Tensor] = {}

    def shared_hook(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        out = output[0] if isinstance(output, (tuple, list)) else output
        self._hold("out", out.clone() if self.shared.copies else out)

    def gate_hook(self, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        self._hold("gate", output)

    def _hold(self, name: str, tensor: torch.Tensor) -> None:
        self.held[name] = tensor
        if self.shared.gate is not None and len(self.held) < 2:
            return
        out = self.held["out"]
        if self.shared.gate is not None:
            out = F.sigmoid(self.held["gate"]) * out
        self.held.clear()
        self.receive(self.site, {"out": out if self.shared.share == 1 else out * self.shared.share})


def _shared_module(model: nn.Module, anatomy: Anatomy, s: Sublayer) -> tuple[nn.Module, nn.Module | None]:
    """The module that routes, and its shared experts: inside it, or beside it in the block."""
    owner, block = model.get_submodule(s.path), model.get_submodule(anatomy.block_paths[s.layer])
    for parent in (owner, block):
        for name, child in parent.named_children():
            if SHARED_NAME.fullmatch(name) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                return owner, child
    return owner, None


def _share(moe: nn.Module) -> float:
    return 0.5 if getattr(moe, "shared_expert_combination_strategy", None) == "average" else 1.0
