"""The step that scales experts' weights."""

from __future__ import annotations

from moescope.core.edit_kinds.experts import Scale
from moescope.probes.edits.decision_steps import FactorStep
from moescope.probes.edits.step import step


@step("scale")
class ScaleStep(FactorStep[Scale]):
    """Multiplies weights after the choice; a strength between 0 and 1 goes that part of the way."""

    def factor(self, edit: Scale) -> float:
        """The factor at the edit's strength."""
        return 1.0 + edit.strength * (edit.factor - 1.0)
