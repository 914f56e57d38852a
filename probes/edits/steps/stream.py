"""What steps of the stream share: their site, their amounts, and what their places must have."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float

from moescope.core.edit_kinds.stream import AlongVector, StreamEdit
from moescope.core.sites import RESID_POST, RESID_PRE, Site
from moescope.probes.block_outputs import contributions, why_no_stream
from moescope.probes.edits.amounts import Amounts, written
from moescope.probes.edits.now import Now
from moescope.probes.edits.passages import HEADS, MLP_INPUT, NEURONS, PASSAGES, QUERIES, passage_at
from moescope.probes.edits.step import Place, StreamStep
from moescope.probes.foreign.taps import foreign_taps

_NAMES = {
    NEURONS: "dense MLP whose neurons",
    MLP_INPUT: "MLP whose input",
    QUERIES: "attention whose queries",
    HEADS: "attention whose head outputs",
}

S = TypeVar("S", bound=StreamEdit)
V = TypeVar("V", bound=AlongVector)


class SiteStep(StreamStep[S]):
    """A step at one stream of vectors.

    Attributes:
        site: one of `moescope.core.edit_kinds.stream.StreamSite`.
    """

    any_strength: ClassVar[bool] = False  # whether it means something below 0 and over 1

    def __init__(self, edits: Sequence[S | None], place: Place) -> None:
        self.site = str(next(edit for edit in edits if edit is not None).site)
        self.amounts = Amounts(device_of(place))
        super().__init__(edits, place)

    @staticmethod
    def form(edit: Any) -> Any:
        """The site."""
        return (edit.site,)

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Why an edit cannot be made in a place; None where it can."""
        return why_no_site(edit.site, place) or strength_fault(edit, any_strength=cls.any_strength)

    def update(self, edits: Sequence[S | None]) -> None:
        """Write the edits' numbers into the tables."""
        self.amounts.update(edits)

    def change(self, given: Float[torch.Tensor, "row position d_model"], now: Now) -> torch.Tensor:
        """The stream as it goes on."""
        amount = self.amounts.at(now).to(given.device)[..., None]
        return torch.where(amount != 0, self.changed(given, amount, now).to(given.dtype), given)

    @abstractmethod
    def changed(
        self, given: torch.Tensor, amount: Float[torch.Tensor, "row position 1"], now: Now
    ) -> Float[torch.Tensor, "row position d_model"]:
        """What takes the place of `given` where the amount is not 0."""


class VectorStep(SiteStep[V]):
    """A step along a vector; `table` holds one row an intervention."""

    unit: ClassVar[bool] = False  # whether only the direction counts

    @staticmethod
    def form(edit: Any) -> Any:
        """The site and the width."""
        return edit.site, len(edit.vector)

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Why an edit cannot be made in a place; None where it can."""
        width = width_at(edit.site, place)
        if width is not None and len(edit.vector) != width:
            return f"its vector has {len(edit.vector):,} numbers, the stream {width:,}"
        if not all(map(math.isfinite, edit.vector)):
            return "its vector has numbers that are not finite"
        if cls.unit and not any(edit.vector):
            return "its vector is 0 and has no direction"
        return super().why_not(edit, place)

    def update(self, edits: Sequence[V | None]) -> None:
        """Write the edits' numbers into the tables."""
        super().update(edits)
        nothing = (0.0,) * next(len(e.vector) for e in edits if e is not None)
        rows = torch.tensor([nothing if e is None else e.vector for e in edits], dtype=torch.float64)
        if self.unit:
            rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        self.table = written(getattr(self, "table", None), rows.float().to(self.amounts.device))

    def along(self, given: torch.Tensor, now: Now) -> tuple[torch.Tensor, torch.Tensor]:
        """`given` in the type that is computed in, and each row's vector beside it, [row, 1, d_model]."""
        wide = exact(given)
        return wide, self.table[now.row.to(self.table.device)].to(wide)[:, None]


def device_of(place: Place) -> torch.device:
    """Where a block's weights are; the CPU where they are brought in only while it runs."""
    block = place.model.get_submodule(place.anatomy.block_paths[place.layer])
    found = next((p.device for p in block.parameters() if not p.is_meta), None)
    return found or torch.device("cpu")


def exact(given: torch.Tensor) -> torch.Tensor:
    """`given` in float32, or wider where it is."""
    return given if given.dtype == torch.float64 else given.float()


def why_no_site(site: str, place: Place) -> str | None:
    """Why the stream cannot be changed at a site of a layer; None where it can."""
    if reason := why_closed(place):
        return reason
    if site in PASSAGES:
        found = passage_at(place.model, place.anatomy, place.layer, site)
        return None if found is not None else f"block {place.layer} has no {_NAMES[site]} can be told"
    known = contributions(place.model, place.anatomy, place.layer)
    if site in (RESID_PRE, RESID_POST) or Site(place.layer, "", site) in known:
        return None
    return f"what block {place.layer} adds at {site} passes no module"


def width_at(site: str, place: Place) -> int | None:
    """How many channels a stream has; None where the site is not there."""
    if site not in PASSAGES:
        return place.anatomy.d_model
    found = None if why_closed(place) else passage_at(place.model, place.anatomy, place.layer, site)
    return None if found is None else found.width


def why_closed(place: Place) -> str | None:
    """Why nothing of a block's stream can be changed; None where it can."""
    if place.layer >= place.anatomy.n_layers:
        return f"the model has layers 0 to {place.anatomy.n_layers - 1}, no layer {place.layer}"
    if place.anatomy.no_stream is not None:
        return place.anatomy.no_stream
    if foreign_taps(place.model, place.anatomy) is not None:
        return "the model runs inside another library's wrapper: load it with transformers"
    return why_no_stream(place.model.get_submodule(place.anatomy.block_paths[place.layer]))


def strength_fault(edit: Any, *, any_strength: bool = False, whole: bool = False) -> str | None:
    """What is wrong with an edit's strength; None where nothing is."""
    if not math.isfinite(edit.strength):
        return "its strength is not a finite number"
    if whole and edit.strength not in (0, 1):
        return f"its strength is 0 or 1, nothing between, and not {edit.strength:g}"
    if not any_strength and not 0 <= edit.strength <= 1:
        return f"its strength lies between 0 and 1, and is {edit.strength:g}"
    return None
