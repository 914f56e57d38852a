"""`MaskHead`: attention heads taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float

from moescope.core.edit_kinds.experts import as_tuple
from moescope.core.edit_kinds.stream import MaskHead
from moescope.core.sites import HEAD_Z
from moescope.probes.attention_pattern import asks_for_interface
from moescope.probes.edits.amounts import Amounts, written
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import HeadStep, Place, step
from moescope.probes.edits.steps.stream import device_of, strength_fault
from moescope.probes.foreign.taps import foreign_taps
from moescope.probes.head_vectors import head_vectors
from moescope.probes.projections import widths

# Attention that adds to its scores, or chooses its keys, by position or by the keys alone: a query of 0 does not make it even.
_UNEVEN = ("relative_attention_bias", "alibi", "rel_logits_proj", "dt_proj")


@step("mask_head")
class MaskHeadStep(HeadStep[MaskHead]):
    """`zero`: the head's output times (1 − strength); `uniform`: its query times (1 − strength), 0 at full strength, so that
    every key it can see is attended to alike. A sink's own logit stays as it is.
    """

    def __init__(self, edits: Sequence[MaskHead | None], place: Place) -> None:
        assert place.sublayer is not None
        self.how = next(edit for edit in edits if edit is not None).how
        self.heads = head_count(place) or 0
        self.amounts = Amounts(device_of(place))
        super().__init__(edits, place)

    @staticmethod
    def form(edit: Any) -> Any:
        """How."""
        return (edit.how,)

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Why an edit cannot be made in a place; None where it can."""
        return _why_not_there(edit, place) or _why_not_uniform(edit, place) or strength_fault(edit)

    def update(self, edits: Sequence[MaskHead | None]) -> None:
        """Write the edits' numbers into the tables."""
        self.amounts.update(edits)
        masked = torch.zeros(len(edits), self.heads)
        for row, edit in enumerate(edits):
            if edit is not None:
                masked[row, list(as_tuple(edit.heads))] = 1
        self.masked = written(getattr(self, "masked", None), masked.to(self.amounts.device))

    def queries(self, q: Float[torch.Tensor, "row head position d_head"], now: Now) -> torch.Tensor:
        """Queries as the kernel gets them."""
        return q if self.how == "zero" else self._less(q, self._amount(q, now).transpose(1, 2))

    def outputs(self, z: Float[torch.Tensor, "row position head d_head"], now: Now) -> torch.Tensor:
        """Head outputs as the projection gets them."""
        return z if self.how == "uniform" else self._less(z, self._amount(z, now))

    def _amount(self, given: torch.Tensor, now: Now) -> Float[torch.Tensor, "row position head"]:
        masked = self.masked[now.row.to(self.masked.device)][:, None]
        return (self.amounts.at(now)[..., None] * masked).to(given.device)

    def _less(self, given: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
        amount = amount[..., None]
        kept = torch.where(amount == 1, 0.0, given * (1 - amount))  # 0 also where the head gave infinity
        return torch.where(amount != 0, kept.to(given.dtype), given)


def head_count(place: Place) -> int | None:
    """Query heads of a place's attention, as its output projection is given them; None where they cannot be told."""
    assert place.sublayer is not None
    attention = place.model.get_submodule(place.sublayer.path)
    reading = head_vectors(attention, place.anatomy.d_model).get(HEAD_Z)
    size = None if reading is None else widths(reading.module)
    if reading is None or size is None:
        return None
    return reading.split(torch.empty(1, 1, size[0], device="meta")).shape[2]


def _why_not_there(edit: MaskHead, place: Place) -> str | None:
    s = place.sublayer
    if s is None:
        return f"block {place.layer} has no attention {edit.block!r}"
    if s.kind != "attention":
        return f"{s.path} is no attention over keys"
    if foreign_taps(place.model, place.anatomy) is not None:
        return "the model runs inside another library's wrapper: load it with transformers"
    heads = head_count(place)
    if heads is None:
        name = type(place.model.get_submodule(s.path)).__name__
        return f"the heads of {name} cannot be told apart before its output projection"
    wrong = [h for h in as_tuple(edit.heads) if not 0 <= h < heads]
    if wrong:
        return f"attention has heads 0 to {heads - 1}, no head {wrong[0]}"
    return None if as_tuple(edit.heads) else "it names no head"


def _why_not_uniform(edit: MaskHead, place: Place) -> str | None:
    if edit.how != "uniform" or place.sublayer is None:
        return None
    attention = place.model.get_submodule(place.sublayer.path)
    name = type(attention).__name__
    if not asks_for_interface(attention):
        return f"{name} computes attention by itself, where its queries cannot be reached; `zero` works"
    found = next((part for part in _UNEVEN if getattr(attention, part, None) is not None), None)
    return None if found is None else f"a query of 0 leaves {name} uneven (its `{found}`); `zero` works"
