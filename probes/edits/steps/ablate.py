"""Steps that take experts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from moescope.core.edit_kinds.experts import Ablate
from moescope.probes.edits.amounts import written
from moescope.probes.edits.decision_steps import FactorStep, RouterStep
from moescope.probes.edits.now import Now
from moescope.probes.edits.router_view import RouterView
from moescope.probes.edits.step import Decision, Place, step


@step("ablate:zero")
class AblateZero(FactorStep[Ablate]):
    """The contribution of ablated experts is zero; the other slots are as they were."""

    def factor(self, edit: Ablate) -> float:
        """What is left of the contribution."""
        return 1.0 - edit.strength


@step("ablate:renormalise")
class AblateRenormalise(FactorStep[Ablate]):
    """The other slots take over: the token's sum of weights stays, where any other slot is left."""

    def factor(self, edit: Ablate) -> float:
        """What is left of the contribution, before the others take over."""
        return 1.0 - edit.strength

    def decide(self, decision: Decision, now: Now) -> None:
        """Scale the slots of changed tokens to their former sum."""
        weights, factors = decision.weights, self.factors(decision, now)
        left = weights * factors.to(weights.device)
        total, kept = weights.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
        scaled = torch.where(kept != 0, left * (total / torch.where(kept != 0, kept, 1.0)), left)
        changed = (factors != 1).any(-1, keepdim=True)
        decision.weights = torch.where(changed, scaled.to(weights.dtype), weights)


class _Replaced(FactorStep[Ablate]):
    """An ablation that puts something in the place of the contribution: weight · strength · what stands in."""

    def factor(self, edit: Ablate) -> float:
        """What is left of the contribution."""
        return 1.0 - edit.strength

    @staticmethod
    def why_not(edit: Ablate, place: Place) -> str | None:
        """Experts whose weight multiplies their input have no output before it to stand in for."""
        if place.sublayer is not None and place.sublayer.reader == "dense_scores":
            return "its weights multiply the experts' inputs, so that nothing can stand in for an output"
        return None

    def taken(self, decision: Decision, now: Now) -> torch.Tensor:
        """[token, k] weight that was taken from each slot; called before `decide` changes the weights."""
        return decision.weights.float() * (1.0 - self.factors(decision, now))

    def add(self, decision: Decision, more: torch.Tensor) -> None:
        """Add to what will be added to the experts' output."""
        decision.added = more if decision.added is None else decision.added + more


@step("ablate:copy")
class AblateCopy(_Replaced):
    """What the expert was given stands in for its output."""

    def decide(self, decision: Decision, now: Now) -> None:
        """Weight · input instead of weight · output."""
        share = self.taken(decision, now).sum(-1, keepdim=True)
        super().decide(decision, now)
        self.add(decision, torch.where(share != 0, share * decision.hidden.float(), 0.0))


@step("ablate:mean")
class AblateMean(_Replaced):
    """The expert's mean output stands in for its output."""

    means: torch.Tensor | None = None

    @staticmethod
    def why_not(edit: Ablate, place: Place) -> str | None:
        """Means are needed, one of d_model an expert, of one layer."""
        d_model = place.anatomy.d_model
        if reason := _Replaced.why_not(edit, place):
            return reason
        if edit.means is None:
            return (
                "how='mean' needs `means`, one mean output an expert (moescope.probes.effects.calibration finds them)"
            )
        if edit.layers is None or len(edit.layers) != 1:
            return "means are of one layer's experts: name one layer"
        if len(edit.means) != len(edit.ids) or any(len(mean) != d_model for mean in edit.means):
            return f"means must be {len(edit.ids)} vectors of {d_model} numbers, one an expert"
        return None

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Factors, and a mean output an expert."""
        super().fill(rows)
        width = next((len(edit.means[0]) for row in rows for edit in row if edit.means), 0)
        means = torch.zeros(len(rows), self.choices, width, dtype=torch.float32)
        for number, row in enumerate(rows):
            for edit in row:
                means[number, list(edit.ids)] = torch.tensor(edit.means, dtype=torch.float32)
        self.means = written(self.means, means.to(self.device))

    def decide(self, decision: Decision, now: Now) -> None:
        """Weight · mean instead of weight · output."""
        assert self.means is not None
        share, ids = self.taken(decision, now), decision.ids
        super().decide(decision, now)
        by_expert = share.new_zeros(len(ids), self.choices).scatter_add(-1, ids, share)
        rows, positions = now.ids.shape
        each = self.means[now.row.to(self.device)] if len(self.means) > 1 else self.means.expand(rows, -1, -1)
        mixed = torch.bmm(by_expert.reshape(rows, positions, -1), each)
        self.add(decision, mixed.reshape(len(ids), -1))


@step("ablate:route_around")
class RouteAround(RouterStep[Ablate]):
    """The router cannot choose the expert, and takes its next choice by its own rule."""

    united: ClassVar[bool] = True
    barred: torch.Tensor | None = None

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Which experts are out."""
        self.barred = written(self.barred, self.marks(rows))

    def ask(self, view: RouterView, now: Now) -> None:
        """Bar them at the edit's tokens."""
        assert self.barred is not None
        here = self.amount(now) > 0
        view.touched = view.touched | here
        view.bar(self.of_token(now, self.barred) & here[:, None])
