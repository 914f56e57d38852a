"""`ProjectOut`: a direction taken out of the stream."""

from __future__ import annotations

from typing import ClassVar

import torch

from moescope.core.edit_kinds.stream import ProjectOut
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import step
from moescope.probes.edits.steps.stream import VectorStep


@step("project_out")
class ProjectOutStep(VectorStep[ProjectOut]):
    """given − strength · (given · u) u, u the unit vector."""

    unit: ClassVar[bool] = True

    def changed(self, given: torch.Tensor, amount: torch.Tensor, now: Now) -> torch.Tensor:
        """The stream without its component along the vector."""
        wide, unit = self.along(given, now)
        return wide - amount.to(wide.dtype) * (wide * unit).sum(-1, keepdim=True) * unit
