"""Steps that change how many experts a token takes, or which ranks of the router's preference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import RankRouting, TopK
from moescope.probes.edits.amounts import written
from moescope.probes.edits.decision_steps import RouterStep
from moescope.probes.edits.now import Now
from moescope.probes.edits.router_view import RouterView
from moescope.probes.edits.step import Place, step

E = TypeVar("E", bound=Edit)

# Experts modules that squeeze a dimension of k away.
_NEVER_ONE = ("LongcatFlashExperts",)


class RanksStep(RouterStep[E]):
    """Fills slots by rank. Tokens with fewer ranks than others of the batch have slots of weight 0."""

    ranks: torch.Tensor | None = None
    uniform = False

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Sparsemixer's weights of one expert depend on which others are chosen before it; one loop cannot take k = 1."""
        experts = place.sublayer.experts_path if place.sublayer is not None else None
        alone = len(cls.wanted(edit)) == 1
        if alone and experts and type(place.model.get_submodule(experts)).__name__ in _NEVER_ONE:
            return "the loop over its experts fails where a token takes only one"
        if place.rule is not None and place.rule.rule.score == "sparsemixer":
            return "sparsemixer chooses each expert among those its others leave: its number is part of the rule"
        return None

    @staticmethod
    def wanted(edit: Any) -> tuple[int, ...]:
        """0-based ranks of an edit."""
        raise NotImplementedError

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Ranks by intervention, −1 for slots not in use."""
        own = tuple(range(self.k))
        wanted = [self.wanted(row[0]) if row and row[0].strength != 0 else own for row in rows]
        width = max(map(len, wanted))
        table = torch.tensor([[*ranks, *[-1] * (width - len(ranks))] for ranks in wanted])
        everywhere = all(row and row[0].positions == "all" and row[0].strength != 0 for row in rows)
        self.uniform = everywhere and len({len(ranks) for ranks in wanted}) == 1
        self.ranks = written(self.ranks, table.to(self.device))

    def ask(self, view: RouterView, now: Now) -> None:
        """Put the ranks into the view at the edit's tokens."""
        assert self.ranks is not None
        here = self.amount(now) > 0
        ranks = self.of_token(now, self.ranks)
        own = torch.arange(self.k, device=self.device).expand(len(ranks), -1)
        before = own if view.ranks is None else view.ranks
        width = max(ranks.shape[1], before.shape[1])
        view.narrow, view.as_given = self.uniform, False
        if self.uniform:
            # Padding has slots as well; what is in them is nothing to anybody.
            view.ranks, view.touched = ranks, torch.ones_like(here)
            return
        view.ranks = torch.where(here[:, None], _wide(ranks, width), _wide(before, width))
        view.touched = view.touched | here


@step("top_k")
class TopKStep(RanksStep[TopK]):
    """The first k ranks."""

    @staticmethod
    def wanted(edit: TopK) -> tuple[int, ...]:
        """0 … k − 1."""
        return tuple(range(edit.k))


@step("rank_routing")
class RankRoutingStep(RanksStep[RankRouting]):
    """Given ranks alone."""

    @staticmethod
    def wanted(edit: RankRouting) -> tuple[int, ...]:
        """The ranks, counted from 0."""
        ranks = (edit.ranks,) if isinstance(edit.ranks, int) else edit.ranks
        return tuple(rank - 1 for rank in ranks)


def _wide(ranks: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - ranks.shape[1]
    return torch.cat([ranks, ranks.new_full((len(ranks), missing), -1)], 1) if missing else ranks
