"""`Add`: a vector added to the stream."""

from __future__ import annotations

from typing import ClassVar

import torch

from moescope.core.edit_kinds.stream import Add
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import step
from moescope.probes.edits.steps.stream import VectorStep


@step("add")
class AddStep(VectorStep[Add]):
    """given + strength · vector, rounded once to the stream's type."""

    any_strength: ClassVar[bool] = True

    def changed(self, given: torch.Tensor, amount: torch.Tensor, now: Now) -> torch.Tensor:
        """The stream with the vector added."""
        wide, vector = self.along(given, now)
        return wide + amount.to(wide.dtype) * vector
