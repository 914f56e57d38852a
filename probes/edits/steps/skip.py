"""`Skip`: a block, or what its attention or its MLP adds, left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float

from moescope.core.edit_kinds.stream import Skip
from moescope.core.sites import ATTN_OUT, MLP_OUT, RESID_POST
from moescope.probes.block_outputs import contributions
from moescope.probes.edits.amounts import Amounts
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import Place, StreamStep, step
from moescope.probes.edits.steps.stream import device_of, exact, strength_fault, why_closed

_SITES = {"block": RESID_POST, "attn": ATTN_OUT, "mlp": MLP_OUT}


@step("skip")
class SkipStep(StreamStep[Skip]):
    """The addend times (1 − strength); for a whole block, the way from its output to its input.

    What is left out is computed all the same, and its keys and values are cached: only the stream goes on without it.

    Attributes:
        part: `block`, `attn` or `mlp`.
        site: where it acts.
    """

    def __init__(self, edits: Sequence[Skip | None], place: Place) -> None:
        self.part = next(edit for edit in edits if edit is not None).part
        self.site = _SITES[self.part]
        self.amounts = Amounts(device_of(place))
        super().__init__(edits, place)

    @staticmethod
    def form(edit: Any) -> Any:
        """The part."""
        return (edit.part,)

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Why an edit cannot be made in a place; None where it can."""
        if reason := why_closed(place):
            return reason
        known = contributions(place.model, place.anatomy, place.layer)
        if edit.part != "block" and not any(site.tensor == _SITES[edit.part] for site in known):
            return f"block {place.layer} has no {'MLP' if edit.part == 'mlp' else 'attention'} whose output can be told"
        return strength_fault(edit)

    def update(self, edits: Sequence[Skip | None]) -> None:
        """Write the edits' numbers into the tables."""
        self.amounts.update(edits)

    def change(self, given: Float[torch.Tensor, "row position d_model"], now: Now) -> torch.Tensor:
        """What attention or the MLP adds, made less."""
        return self.towards(torch.zeros_like(given), given, now)

    def towards(self, entered: torch.Tensor, given: torch.Tensor, now: Now) -> torch.Tensor:
        """`given` moved to `entered` by the strength."""
        amount = self.amounts.at(now).to(given.device)[..., None]
        wide = exact(given)
        moved = torch.lerp(wide, entered.to(wide), amount.to(wide.dtype).expand_as(wide))
        return torch.where(amount != 0, moved.to(given.dtype), given)
