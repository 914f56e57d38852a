"""The matrices of a router's experts, in one layout: what each neuron reads and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from moescope.core.errors import InputError
from moescope.probes.live_model import LiveModel

_NEVER_NEGATIVE = ("relu",)


@dataclass(frozen=True)
class ExpertMatrices:
    """The weights of all experts of a router.

    Attributes:
        gate: what decides whether a neuron is on: the gate's rows, or of experts without a gate the up projection's.
        gate_bias: None where there is none.
        down: what a unit of each neuron writes.
        signed: whether neurons take both signs: gated experts, and activations that are not rectified.
    """

    gate: Float[torch.Tensor, "expert neuron d_model"]
    gate_bias: Float[torch.Tensor, "expert neuron"] | None
    down: Float[torch.Tensor, "expert neuron d_model"]
    signed: bool

    @property
    def n_experts(self) -> int:
        """Experts."""
        return int(self.gate.shape[0])

    @property
    def d_expert(self) -> int:
        """Neurons of each."""
        return int(self.gate.shape[1])


def expert_matrices(model: LiveModel, layer: int, block: str = "mlp") -> ExpertMatrices:
    """The matrices of one router's experts, as the model holds them.

    Raises:
        InputError: no router there, or experts whose weights are not 3-D parameters of known names.

    Example:
        >>> import moescope as ms
        >>> found = expert_matrices(ms.load("demo"), 0)
        >>> found.down.shape == (found.n_experts, found.d_expert, 192), found.signed
        (True, True)
    """
    s = model.anatomy.moe_at(layer, block)
    if s is None:
        raise InputError(f"layer {layer} has no router {block!r}", expected=f"one of layers {model.anatomy.moe_layers}")
    experts: Any = model.module.get_submodule(s.experts_path or "") if s.experts_path else None
    gated = bool(getattr(experts, "has_gate", True))
    first: Any = getattr(experts, "gate_up_proj" if gated else "up_proj", None)
    down: Any = getattr(experts, "down_proj", None)
    width = model.anatomy.d_model
    plain = all(isinstance(w, torch.Tensor) and w.ndim == 3 and w.is_floating_point() for w in (first, down))
    transposed = bool(getattr(experts, "is_transposed", False))
    if not plain or (first.shape[1 if transposed else 2] != width or down.shape[2 if transposed else 1] != width):
        raise InputError(
            f"the experts of layer {layer} are not told apart neuron by neuron",
            found=s.unreachable or f"the weights of {type(experts).__name__} are not laid out in a way that is known",
            fix="leave this layer out",
        )
    rows = first.detach().transpose(1, 2) if transposed else first.detach()  # [expert, neuron, d_model]
    bias = getattr(experts, "gate_up_proj_bias" if gated else "up_proj_bias", None)
    bias = bias.detach() if isinstance(bias, torch.Tensor) else None
    if gated:
        joined = bool(getattr(experts, "is_concatenated", True))
        half = rows.shape[1] // 2
        rows = rows[:, :half] if joined else rows[:, ::2]
        bias = None if bias is None else bias[:, :half] if joined else bias[:, ::2]
    written = down.detach() if transposed else down.detach().transpose(1, 2)
    act = type(getattr(experts, "act_fn", None)).__name__.lower()
    signed = gated or not act.startswith(_NEVER_NEGATIVE)
    return ExpertMatrices(rows.float(), None if bias is None else bias.float(), written.float(), signed)
