"""`Clamp`: the component along a direction held between bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from moescope.core.edit_kinds.stream import Clamp
from moescope.probes.edits.amounts import written
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import Place, step
from moescope.probes.edits.steps.stream import VectorStep


@step("clamp")
class ClampStep(VectorStep[Clamp]):
    """given + strength · (clamp(c) − c) u, c = given · u; a token whose component lies within the bounds keeps every bit."""

    unit: ClassVar[bool] = True

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Why an edit cannot be made in a place; None where it can."""
        if edit.low is None and edit.high is None:
            return "it has neither a lower nor an upper bound"
        if any(bound is not None and math.isnan(bound) for bound in (edit.low, edit.high)):
            return "a bound is no number"
        if edit.low is not None and edit.high is not None and edit.low > edit.high:
            return f"its lower bound {edit.low:g} lies over its upper bound {edit.high:g}"
        return super().why_not(edit, place)

    def update(self, edits: Sequence[Clamp | None]) -> None:
        """Write the edits' numbers into the tables."""
        super().update(edits)
        bounds = [(-math.inf, math.inf) if e is None else _bounds(e) for e in edits]
        found = torch.tensor(bounds, dtype=torch.float32, device=self.amounts.device)
        self.bounds = written(getattr(self, "bounds", None), found)

    def changed(self, given: torch.Tensor, amount: torch.Tensor, now: Now) -> torch.Tensor:
        """The stream with its component within the bounds."""
        wide, unit = self.along(given, now)
        low, high = self.bounds[now.row.to(self.bounds.device)].to(wide)[:, None, :, None].unbind(2)
        component = (wide * unit).sum(-1, keepdim=True)
        held = component.clamp(low, high)
        return torch.where(held == component, wide, wide + amount.to(wide.dtype) * (held - component) * unit)


def _bounds(edit: Clamp) -> tuple[float, float]:
    return -math.inf if edit.low is None else edit.low, math.inf if edit.high is None else edit.high
