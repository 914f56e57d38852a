"""`SetChannel`: channels of the stream set to values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from moescope.core.edit_kinds.experts import as_tuple
from moescope.core.edit_kinds.stream import SetChannel
from moescope.probes.edits.amounts import written
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import Place, step
from moescope.probes.edits.steps.stream import SiteStep, exact, width_at


@step("set_channel")
class SetChannelStep(SiteStep[SetChannel]):
    """x + strength · (value − x) in some channels, where |x| is over a bound; other channels keep every bit."""

    @staticmethod
    def form(edit: Any) -> Any:
        """The site and the number of channels."""
        return edit.site, len(as_tuple(edit.channels))

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Why an edit cannot be made in a place; None where it can."""
        channels, width = as_tuple(edit.channels), width_at(edit.site, place)
        if not channels:
            return "it names no channel"
        if width is not None and (wrong := [c for c in channels if not 0 <= c < width]):
            return f"the stream has channels 0 to {width - 1}, no channel {wrong[0]}"
        if edit.values is not None and len(edit.values) != len(channels):
            return f"it has {len(edit.values)} values for {len(channels)} channels"
        if edit.values is not None and not all(map(math.isfinite, edit.values)):
            return "its values are not all finite"
        if edit.above is not None and not edit.above >= 0:
            return f"|x| is compared with `above`, which is {edit.above:g}"
        return super().why_not(edit, place)

    def update(self, edits: Sequence[SetChannel | None]) -> None:
        """Write the edits' numbers into the tables."""
        super().update(edits)
        count = next(len(as_tuple(e.channels)) for e in edits if e is not None)
        nothing = (0,) * count
        channels = [nothing if e is None else as_tuple(e.channels) for e in edits]
        values = [nothing if e is None or e.values is None else e.values for e in edits]
        above = [-1.0 if e is None or e.above is None else e.above for e in edits]
        device = self.amounts.device
        self.channels = written(getattr(self, "channels", None), torch.tensor(channels, device=device))
        found = torch.tensor(values, dtype=torch.float32, device=device)
        self.values = written(getattr(self, "values", None), found)
        found = torch.tensor(above, dtype=torch.float32, device=device)
        self.above = written(getattr(self, "above", None), found)

    def changed(self, given: torch.Tensor, amount: torch.Tensor, now: Now) -> torch.Tensor:
        """The stream with its channels set."""
        row = now.row.to(self.channels.device)
        here = self.channels[row].to(given.device)[:, None].expand(*given.shape[:2], -1)
        found = given.gather(-1, here)
        wide = exact(found)
        value, above = self.values[row].to(wide)[:, None], self.above[row].to(wide)[:, None, None]
        aimed = torch.lerp(wide, value.expand_as(wide), amount.to(wide.dtype).expand_as(wide)).to(given.dtype)
        return given.scatter(-1, here, torch.where(wide.abs() > above, aimed, found))
