"""`FakeQuant`: weights of experts rounded to few bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from moescope.core.edit_kinds.experts import FakeQuant
from moescope.core.errors import InputError
from moescope.probes.anatomy import Sublayer
from moescope.probes.edits.step import Place, WeightStep, step
from moescope.probes.edits.steps.stream import strength_fault
from moescope.probes.expert_access import is_dispatched

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Experts modules outside transformers' dispatch whose layout is known: whether inputs come before outputs.
_TRANSPOSED = {"LongcatFlashExperts": False, "Llama4TextExperts": True}


@step("fake_quant")
class FakeQuantStep(WeightStep[FakeQuant]):
    """w + strength · (q(w) − w) with q symmetric: one scale an output row, max |w| of the row over 2^(bits − 1) − 1.

    Every expert that is not named keeps every bit. The changed weights are new parameters in the place of the model's own,
    which `leave` puts back.
    """

    def __init__(self, edits: Sequence[FakeQuant | None], place: Place) -> None:
        assert place.sublayer is not None
        self.owned = [*stacked_weights(place.model, place.sublayer)]
        self.own: list[nn.Parameter] = []
        self.changed: list[nn.Parameter] = []
        super().__init__(edits, place)

    @staticmethod
    def form(edit: Any) -> Any:
        """Nothing: numbers of any FakeQuant can take the place of another's."""
        return ()

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Why an edit cannot be made in a place; None where it can."""
        s = place.sublayer
        if s is None or s.kind != "moe":
            return f"block {place.layer} has no experts {edit.block!r}"
        if not (isinstance(edit.bits, int) and 2 <= edit.bits <= 8):
            return f"bits are 2 to 8, and not {edit.bits}"
        if not edit.ids:
            return "it names no expert"
        if wrong := [e for e in edit.ids if not 0 <= e < (s.n_experts or 0)]:
            return f"the layer has experts 0 to {(s.n_experts or 0) - 1} with weights, no expert {wrong[0]}"
        if edit.positions != "all":
            return f"weights are the same for every token: positions cannot be {edit.positions!r}"
        return why_no_weights(place.model, s, place.anatomy.d_model) or strength_fault(edit)

    def update(self, edits: Sequence[FakeQuant | None]) -> None:
        """Take the edit's numbers; weights already put in are changed in place."""
        edit = edits[0]
        if edit is None or any(other != edit for other in edits):
            raise InputError(
                "FakeQuant changes weights, which all rows of a batch share",
                expected="the same FakeQuant in every intervention of a session",
                fix="run interventions that differ in it one after another",
            )
        self.edit = edit
        for (_, _, axis), own, changed in zip(self.owned, self.own, self.changed, strict=True) if self.own else ():
            changed.data.copy_(self._rounded(own, axis))

    def enter(self) -> None:
        """Put the changed parameters in."""
        for module, name, axis in self.owned:
            own = module._parameters[name]
            assert own is not None
            self.own.append(own)
            self.changed.append(nn.Parameter(self._rounded(own, axis), requires_grad=False))
            module._parameters[name] = self.changed[-1]

    def leave(self) -> None:
        """Put the model's own parameters back, the same objects."""
        for (module, name, _), own in zip(self.owned, self.own, strict=False):
            module._parameters[name] = own
        self.own.clear()
        self.changed.clear()

    @torch.no_grad()
    def _rounded(self, own: torch.Tensor, axis: int) -> torch.Tensor:
        found = own.detach().clone()
        if self.edit.strength:
            for expert in self.edit.ids:
                wide = own[expert].detach()
                wide = wide if wide.dtype == torch.float64 else wide.float()
                rounded = fake_quantised(wide, self.edit.bits, axis=axis - 1)
                found[expert] = torch.lerp(wide, rounded, self.edit.strength).to(found.dtype)
        return found


def fake_quantised(weight: Float[torch.Tensor, "a b"], bits: int, *, axis: int = 0) -> Float[torch.Tensor, "a b"]:
    """A weight rounded to `bits`, symmetric, with one scale for each index of `axis` (round half to even).

    Args:
        weight: of one linear map.
        bits: levels run from −(2^(bits − 1) − 1) to 2^(bits − 1) − 1.
        axis: the output's: 0 for [out, in], 1 for [in, out].

    Example:
        >>> fake_quantised(torch.tensor([[1.0, 0.4, -0.1]]), 2).tolist()
        [[1.0, 0.0, -0.0]]
    """
    levels = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1 - axis, keepdim=True) / levels
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).round().clamp(-levels, levels) * scale


def stacked_weights(model: nn.Module, s: Sublayer) -> Iterator[tuple[nn.Module, str, int]]:
    """Weights of the experts of a router, [expert, …, …]: module, parameter's name, and which axis is the output's."""
    experts = model.get_submodule(s.experts_path or "")
    transposed = _transposed(experts)
    for name, weight in experts.named_parameters(recurse=False):
        if weight.ndim == 3 and len(weight) in (s.n_experts, s.n_choices) and transposed is not None:
            yield experts, name, 2 if transposed else 1


def why_no_weights(model: nn.Module, s: Sublayer, d_model: int) -> str | None:
    """Why the weights of a router's experts cannot be changed by expert; None where they can."""
    if s.experts_path is None:
        return "its experts are no module of their own"
    experts = model.get_submodule(s.experts_path)
    name = type(experts).__name__
    found = [*stacked_weights(model, s)]
    if not found or len(found) < sum(weight.ndim > 2 for weight in experts.parameters(recurse=False)):
        return f"how the weights lie in {name} is not known"
    for module, parameter, axis in found:
        weight = module._parameters[parameter]
        assert weight is not None
        if weight.is_meta:
            return "its weights are brought in only while it runs"
        if weight.dtype not in FLOATS:
            return f"its weights are quantised already ({str(weight.dtype).removeprefix('torch.')})"
        width = d_model if "latent" not in " ".join(dict(model.get_submodule(s.path).named_modules())) else None
        side = weight.shape[axis] if parameter.startswith("down") else weight.shape[3 - axis]
        if width is not None and side != width:
            return f"{parameter} of {name} lies as {list(weight.shape)}, which does not fit a stream of {width:,}"
    return None


def _transposed(experts: nn.Module) -> bool | None:
    """Whether weights lie as [expert, in, out]; None where that is not known."""
    if is_dispatched(experts):
        return bool(getattr(experts, "is_transposed", False))
    return _TRANSPOSED.get(type(experts).__name__)
