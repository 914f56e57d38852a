"""A router as a linear map of the stream: its rows with the norm before it folded in, and its scale on data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from moescope.core.errors import InputError
from moescope.core.sites import ROUTER_LOGITS, Site
from moescope.probes.attribution.logit_norms import FrozenNorm, frozen_norm, identity, tolerance
from moescope.probes.live_model import LiveModel
from moescope.sae.data.live import LivePass
from moescope.sae.experts.decisions import places_of


@dataclass
class Taken:
    """What modules before a router were given and gave in one pass."""

    given: torch.Tensor | None = None
    norms: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] | None = None


class RouterReading:
    """One router while its logits are held against what is written into the stream.

    Its logits are W · norm(x) + b wherever that reproduces them on the batch; W and the norm's gain then say how much of a
    direction in the stream reaches each expert's logit.

    Args:
        model: what runs.
        layer, block: which router.

    Raises:
        InputError: no router there, or none whose logits show.
    """

    def __init__(self, model: LiveModel, layer: int, block: str = "mlp") -> None:
        s = model.anatomy.moe_at(layer, block)
        if s is None or s.logits_path is None:
            raise InputError(
                f"layer {layer} has no router {block!r} that shows its logits",
                expected=f"one of layers {[m.layer for m in model.anatomy.moe if m.has_logits]}",
            )
        self.model, self.sublayer = model, s
        self.logits = Site(layer, block, ROUTER_LOGITS)
        self.router: Any = model.module.get_submodule(s.logits_path)
        self.block = model.module.get_submodule(model.anatomy.block_paths[layer])
        self.moe = model.module.get_submodule(s.path)
        self._taken = Taken()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what the router, and the norms of its block, are given while the context lasts."""
        self._taken = Taken(norms=[])
        inside = {id(m) for m in self.moe.modules()}
        with ExitStack() as stack:
            stack.callback(self.router.register_forward_pre_hook(self._on_router).remove)
            for child in self.block.children():
                if not any(id(m) in inside for m in child.modules()) and next(child.children(), None) is None:
                    stack.callback(child.register_forward_hook(self._on_child).remove)
            yield

    @torch.no_grad()
    def rows(self, found: LivePass, *, direct: bool = False) -> Float[torch.Tensor, "expert d_model"] | None:
        """Rows r with: a vector d in the stream adds r · d to the logits, at the mean scale of the norm over these tokens.

        Args:
            found: what the pass showed.
            direct: rows for directions in what the router is given, no norm between.

        Returns:
            The rows; None where the router is no such map.
        """
        weight: Any = getattr(self.router, "weight", None)
        given = self._taken.given
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or given is None:
            return None
        at = places_of(found).to(given.device)
        h = given.reshape(-1, given.shape[-1]).index_select(0, at)
        logits = found[self.logits].vectors.float()
        if weight.shape != (logits.shape[-1], h.shape[-1]):
            return None
        left = logits - h.float() @ weight.float().T
        if float((left - left[:1]).abs().max()) > tolerance(self.model.dtype) * max(1.0, float(logits.abs().max())):
            return None
        if direct:
            return weight.detach().float()
        norm = self._norm(h, at)
        if norm is None:
            return None
        rows = weight.double() * norm.gain * norm.scale.mean()
        rows = rows - rows.mean(-1, keepdim=True) if norm.centred else rows
        return rows.float()

    def _norm(self, h: torch.Tensor, at: torch.Tensor) -> FrozenNorm | None:
        """The norm whose output the router was given."""
        for module, x, y in self._taken.norms or ():
            flat_x, flat_y = (t.reshape(-1, t.shape[-1]).index_select(0, at) for t in (x, y))
            if flat_y.shape == h.shape and torch.equal(flat_y, h):
                return frozen_norm(module, flat_x, flat_y) or (
                    identity(flat_x) if torch.equal(flat_x, flat_y) else None
                )
        return None

    def _on_router(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            self._taken.given = inputs[0].detach()

    def _on_child(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        given = inputs[0] if len(inputs) == 1 else None
        if isinstance(given, torch.Tensor) and isinstance(output, torch.Tensor) and given.shape == output.shape:
            assert self._taken.norms is not None
            self._taken.norms.append((module, given.detach(), output.detach()))
