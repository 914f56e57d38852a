"""`Splice`: an autoencoder's reconstruction in the place of what it reads."""

from __future__ import annotations

from typing import Any

import torch

from moescope.core.edit_kinds.features import Splice
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import step
from moescope.probes.edits.steps.features import FeatureStep
from moescope.probes.edits.steps.stream import exact


@step("splice")
class SpliceStep(FeatureStep[Splice]):
    """given + strength · (x̂ − given); with its error kept, the same bits."""

    def __init__(self, edits: Any, place: Any) -> None:
        self.keeps = next(edit for edit in edits if edit is not None).keep_error
        super().__init__(edits, place)

    @staticmethod
    def form(edit: Any) -> Any:
        """The site, the autoencoder, and whether its error is kept."""
        return edit.site, edit.sae, edit.keep_error

    def changed(self, given: torch.Tensor, amount: torch.Tensor, now: Now) -> torch.Tensor:
        """The reconstruction."""
        wide = exact(given)
        if self.keeps:  # x̂ + (x − x̂)
            return wide
        found = self.decoded(self.code(given)).to(wide)
        return torch.lerp(wide, found, amount.to(wide.dtype).expand_as(wide))
