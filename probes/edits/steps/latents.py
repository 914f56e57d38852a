"""`Latents`: latents of an autoencoder changed by what they write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from moescope.core.edit_kinds.features import Latents
from moescope.probes.edits.amounts import written
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import Place, step
from moescope.probes.edits.steps.features import FeatureStep, latents_fault
from moescope.probes.edits.steps.stream import exact

_ADD, _SET, _SCALE = range(3)
_HOW = {"add": _ADD, "set": _SET, "scale": _SCALE}


@step("latents")
class LatentsStep(FeatureStep[Latents]):
    """given + strength · Σ (z′ − z) · decoder row; a token of which no latent changes keeps every bit."""

    any_strength: ClassVar[bool] = True

    @staticmethod
    def form(edit: Any) -> Any:
        """The site, the autoencoder and the number of latents."""
        return edit.site, edit.sae, len(edit.ids)

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Why an edit cannot be made in a place; None where it can."""
        return super().why_not(edit, place) or latents_fault(edit.ids, place.sources[edit.sae])

    def update(self, edits: Sequence[Latents | None]) -> None:
        """Write the edits' numbers into the tables."""
        super().update(edits)
        nothing = (0,) * next(len(e.ids) for e in edits if e is not None)
        decoder = self.autoencoder.decoder
        ids = torch.tensor([nothing if e is None else e.ids for e in edits], device=decoder.device)
        values = [nothing if e is None else e.values for e in edits]
        how = [[_ADD if e is None else _HOW[e.how], e is not None and e.only_active] for e in edits]
        numbers = torch.tensor(values, dtype=torch.float32, device=decoder.device)
        self.ids = written(getattr(self, "ids", None), ids)
        self.values = written(getattr(self, "values", None), numbers)
        self.how = written(getattr(self, "how", None), torch.tensor(how, dtype=torch.int64, device=decoder.device))
        self.rows = written(getattr(self, "rows", None), decoder[ids].float())

    def changed(self, given: torch.Tensor, amount: torch.Tensor, now: Now) -> torch.Tensor:
        """The stream with the latents' own parts changed."""
        code = self.code(given)
        row = now.row.to(code.device)
        ids = self.ids[row][:, None].expand(*code.shape[:2], -1)
        own = code.gather(-1, ids)
        value = self.values[row][:, None]
        how, only_active = (column[:, None, None] for column in self.how[row].unbind(-1))
        aimed = torch.where(how == _ADD, own + value, torch.where(how == _SET, value, own * value))
        change = torch.where((only_active != 0) & (own <= 0), 0.0, aimed - own)
        wide = exact(given)
        if self.own_scale:
            added = self.decoded(code.scatter_add(-1, ids, change)) - self.decoded(code)
        else:
            added = torch.bmm(change, self.rows[row])
        moved = wide + amount.to(wide.dtype) * added.to(wide)
        return torch.where((change != 0).any(-1, keepdim=True).to(wide.device), moved, wide)
