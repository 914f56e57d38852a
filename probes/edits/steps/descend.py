"""`Descend`: a code moved by gradient descent, and what that writes put in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from moescope.core.edit_kinds.features import Descend
from moescope.probes.edits.amounts import written
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import Place, step
from moescope.probes.edits.steps.features import Code, FeatureStep, latents_fault
from moescope.probes.edits.steps.stream import exact


@step("descend")
class DescendStep(FeatureStep[Descend]):
    """given + strength · (Dec(z_N) − Dec(z)), or Dec(z_N) itself; both descents by their explicit gradients.

    The distance to a target shrinks by (1 − 2 rate) a step, so that all steps are one; those of a probe are taken one by one.
    """

    any_strength: ClassVar[bool] = True

    def __init__(self, edits: Sequence[Descend | None], place: Place) -> None:
        self.first = next(edit for edit in edits if edit is not None)
        super().__init__(edits, place)

    @staticmethod
    def form(edit: Any) -> Any:
        """The site, the autoencoder, and everything but numbers."""
        moved = None if edit.ids is None else len(edit.ids)
        by_probe = edit.steps if edit.weights is not None else None
        return edit.site, edit.sae, moved, by_probe, edit.keep, edit.replace

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Why an edit cannot be made in a place; None where it can."""
        if reason := super().why_not(edit, place):
            return reason
        n = len(place.sources[edit.sae].decoder)
        if edit.ids is None and len(edit.numbers) != n:
            return f"it has {n:,} latents, and not {len(edit.numbers):,}"
        if edit.keep is not None and edit.keep > n:
            return f"it has {n:,} latents, of which {edit.keep:,} cannot be kept"
        return latents_fault(edit.ids, place.sources[edit.sae])

    def update(self, edits: Sequence[Descend | None]) -> None:
        """Write the edits' numbers into the tables."""
        super().update(edits)
        count = next(len(e.numbers) for e in edits if e is not None)
        device = self.autoencoder.decoder.device
        ids = [(0,) * count if e is None else e.ids or () for e in edits]
        towards = [(0.0,) * count if e is None else e.numbers for e in edits]
        scalars = [(0.0, 0.0, 0.0) if e is None else _scalars(e) for e in edits]
        if self.first.ids is not None:
            self.ids = written(getattr(self, "ids", None), torch.tensor(ids, device=device))
        for name, values in (("towards", towards), ("scalars", scalars)):
            found = torch.tensor(values, dtype=torch.float32, device=device)
            setattr(self, name, written(getattr(self, name, None), found))

    def changed(self, given: torch.Tensor, amount: torch.Tensor, now: Now) -> torch.Tensor:
        """The stream with the code moved."""
        code = self.code(given)
        change = self._moved(code, now.row.to(code.device)) - code
        wide = exact(given)
        if self.first.replace:
            found = self.decoded(code + change).to(wide)
            return torch.lerp(wide, found, amount.to(wide.dtype).expand_as(wide))
        return wide + amount.to(wide.dtype) * self._written(code, change).to(wide)

    def _written(self, code: Code, change: Code) -> torch.Tensor:
        """What a change of the code writes."""
        if self.own_scale:
            return self.decoded(code + change) - self.decoded(code)
        written_in: torch.Tensor = change @ self.autoencoder.decoder.float()
        return written_in

    def _moved(self, code: Code, row: torch.Tensor) -> Code:
        """The code after the steps."""
        ids = None if self.first.ids is None else self.ids[row][:, None].expand(*code.shape[:2], -1)
        part = code if ids is None else code.gather(-1, ids)
        towards: torch.Tensor = self.towards[row][:, None]
        left, rate, bias = (column[:, None, None] for column in self.scalars[row].unbind(-1))
        if self.first.weights is None:
            part = part + (left - 1) * (part - towards)
        else:
            for _ in range(self.first.steps):
                sure = torch.sigmoid((part * towards).sum(-1, keepdim=True) + bias)
                part = (part + rate * (1 - sure) * towards).clamp(min=0)
        moved = part if ids is None else code.scatter(-1, ids, part)
        if self.first.keep is None:
            return moved
        largest = moved.topk(self.first.keep, dim=-1)
        return torch.zeros_like(moved).scatter(-1, largest.indices, largest.values)

    towards: torch.Tensor
    scalars: torch.Tensor


def _scalars(edit: Descend) -> tuple[float, float, float]:
    """What is left of the distance to a target, the rate, and the probe's bias."""
    return 0.0 if edit.target is None else (1 - 2 * edit.rate) ** edit.steps, edit.rate, edit.bias
