"""What steps at a router share: which tokens they act on, tables by expert, and a place in line for the router's rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import nn

from moescope.core.edit import Edit
from moescope.probes.edits.amounts import Amounts, written
from moescope.probes.edits.now import Now
from moescope.probes.edits.router_view import RouterView
from moescope.probes.edits.step import Decision, DecisionStep, Place

E = TypeVar("E", bound=Edit)


class TokenStep(DecisionStep[E]):
    """A decision step that acts on some tokens, one edit an intervention (or several of the same positions)."""

    def __init__(self, edits: Sequence[Any], place: Place) -> None:
        assert place.sublayer is not None
        s = place.sublayer
        self.choices, self.k = s.n_choices, s.top_k or 1
        owner = place.model.get_submodule(s.experts_path or s.path)
        self.device = _device_of(owner)
        self.amounts = Amounts(self.device)
        super().__init__(edits, place)

    def update(self, edits: Sequence[Any]) -> None:
        """Write positions, strengths and tables."""
        rows = [item if isinstance(item, tuple) else (item,) if item is not None else () for item in edits]
        self.live = any(edit.strength != 0 for row in rows for edit in row)
        self.amounts.update([self.reach(row) if row else None for row in rows])
        self.fill(rows)

    def reach(self, row: tuple[Any, ...]) -> Edit:
        """An edit with the positions and the strength of those of one intervention."""
        return row[0] if not self.united else Edit(positions=row[0].positions)

    @abstractmethod
    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Write the step's own tables; `rows` has the edits of each intervention."""

    def amount(self, now: Now) -> Float[torch.Tensor, " token"]:
        """Strength at each token."""
        return self.amounts.at(now).reshape(-1)

    def of_token(self, now: Now, table: torch.Tensor) -> torch.Tensor:
        """[token, …] each token's row of a table [intervention, …]; one row stands for all where there is one."""
        if len(table) == 1:
            return table.expand(now.ids.numel(), *table.shape[1:])
        return table[self.rows(now)]

    def rows(self, now: Now) -> Int[torch.Tensor, " token"]:
        """The intervention of each token."""
        return now.row_of_token.to(self.device)

    def by_expert(
        self,
        rows: Sequence[tuple[Any, ...]],
        value: Callable[[Any], float],
        *,
        start: float,
        join: Callable[[float, float], float],
    ) -> Float[torch.Tensor, "intervention choice"]:
        """A table of one number an expert, `start` where no edit names it; several edits of one expert are joined."""
        table = [[start] * self.choices for _ in rows]
        for number, row in enumerate(rows):
            for edit in row:
                for expert in edit.ids:
                    table[number][expert] = join(table[number][expert], value(edit))
        return torch.tensor(table, dtype=torch.float32, device=self.device)

    def marks(self, rows: Sequence[tuple[Any, ...]]) -> torch.Tensor:
        """[intervention, choice] whether an edit of strength over 0 names the expert."""
        return self.by_expert(rows, lambda edit: float(edit.strength != 0), start=0.0, join=max) > 0


class RouterStep(TokenStep[E]):
    """An edit of logits or of the choice: all of a router's are put to its rule at once."""

    phase: ClassVar[int] = 0
    needs_rule: ClassVar[bool] = True
    reads_logits = True

    @abstractmethod
    def ask(self, view: RouterView, now: Now) -> None:
        """Put the edit into the view."""

    def decide(self, decision: Decision, now: Now) -> None:
        """Not for these: their view is settled by the rule."""
        raise NotImplementedError


class FactorStep(TokenStep[E]):
    """Weights times a factor by expert, after the choice; several edits of one intervention act as one table."""

    phase: ClassVar[int] = 2
    graded: ClassVar[bool] = True
    united: ClassVar[bool] = True
    table: torch.Tensor | None = None

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """The product of the factors of each expert's edits."""
        table = self.by_expert(rows, self.factor, start=1.0, join=lambda a, b: a * b)
        self.table = written(self.table, table)

    @abstractmethod
    def factor(self, edit: Any) -> float:
        """What one edit multiplies the weights of its experts by, at its strength."""

    def factors(self, decision: Decision, now: Now) -> Float[torch.Tensor, "token k"]:
        """The factor of every slot, 1 where nothing acts on it."""
        assert self.table is not None
        ids = decision.ids
        found = self.table[0][ids] if len(self.table) == 1 else self.table[self.rows(now)[:, None], ids]
        return torch.where(self.amount(now)[:, None] > 0, found, 1.0)

    def decide(self, decision: Decision, now: Now) -> None:
        """Multiply where the factor is not 1."""
        factors, weights = self.factors(decision, now), decision.weights
        scaled = (weights * factors.to(weights.device)).to(weights.dtype)
        decision.weights = torch.where(factors != 1, scaled, weights)


def _device_of(owner: nn.Module) -> torch.device:
    """Where a module computes; the hook of weights that are brought in only while it runs knows where to."""
    weight = next(owner.parameters(), None)
    if weight is not None and not weight.is_meta:
        return weight.device
    hooks = (getattr(module, "_hf_hook", None) for module in owner.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "cpu"))
