"""How much of an edit each token gets: its strength at the edit's positions, 0 elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float

from moescope.core.edit import Edit
from moescope.core.positions import Positions
from moescope.probes.edits.now import Now

# What a table says of the positions of an edit.
_ALL, _PROMPT, _GENERATED, _SPAN, _TOKEN = range(5)
_KINDS = {"all": _ALL, "prompt": _PROMPT, "generated": _GENERATED, "span": _SPAN, "token": _TOKEN}
_END = 2**62


class Amounts:
    """Strength and positions of one edit an intervention, as tables on a device.

    Args:
        device: of the tables.

    Example:
        >>> amounts = Amounts(torch.device("cpu"))
        >>> amounts.update([None, Edit(positions="0:1", strength=0.5)])
        >>> ids = torch.tensor([[5, 6], [7, 8]])
        >>> now = Now(ids, ids > 0, torch.tensor([[0, 1], [0, 1]]), False, torch.tensor([0, 1]))
        >>> amounts.at(now).tolist()
        [[0.0, 0.0], [0.5, 0.0]]
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.strength: torch.Tensor | None = None
        self.place: torch.Tensor | None = None

    def update(self, edits: Sequence[Edit | None]) -> None:
        """Write strengths and positions into the tables, in place where they are there already."""
        strengths = [0.0 if edit is None else edit.strength for edit in edits]
        places = [_row(Positions() if edit is None else edit.where) for edit in edits]
        self.strength = written(self.strength, torch.tensor(strengths, dtype=torch.float32, device=self.device))
        self.place = written(self.place, torch.tensor(places, dtype=torch.int64, device=self.device))

    def at(self, now: Now) -> Float[torch.Tensor, "row position"]:
        """The strength at each token: 0 outside an edit's positions, at padding, and in rows without the edit."""
        assert self.strength is not None
        assert self.place is not None
        row = now.row.to(self.device)
        kind, start, stop = (column[:, None] for column in self.place[row].unbind(-1))
        ids, mask, position = (t.to(self.device) for t in (now.ids, now.mask, now.position))
        in_span = (kind == _SPAN) & (position >= start) & (position < stop)
        of_pass = kind == (_GENERATED if now.generated else _PROMPT)
        here = (kind == _ALL) | of_pass | in_span | ((kind == _TOKEN) & (ids == start))
        return torch.where(here & mask, self.strength[row][:, None], 0.0)


def written(table: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """`new` copied into a table of its shape and type, or `new` itself where there is no such table yet."""
    if table is None or table.shape != new.shape or table.dtype != new.dtype:
        return new
    return table.copy_(new)


def _row(where: Positions) -> list[int]:
    if where.which == "token":
        return [_TOKEN, int(where.token_id or 0), 0]
    return [_KINDS[where.which], where.start, _END if where.stop is None else where.stop]
