"""Steps on a router's logits and on what it may choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from moescope.core.edit_kinds.experts import Bias, Force, Keep, MixRouting
from moescope.probes.edits.amounts import written
from moescope.probes.edits.decision_steps import RouterStep
from moescope.probes.edits.now import Now
from moescope.probes.edits.router_view import RouterView
from moescope.probes.edits.step import Place, step

# SteerMoE's margin over the largest log-probability (arXiv 2509.09660).
_OVER_THE_LARGEST = 0.01
_BELOW_ONE = 1 - 1e-6


@step("bias")
class BiasStep(RouterStep[Bias]):
    """Adds to logits; the decision follows by the rule."""

    graded: ClassVar[bool] = True
    united: ClassVar[bool] = True
    table: torch.Tensor | None = None

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """What is added to each expert's logit."""
        table = self.by_expert(rows, lambda edit: edit.value * edit.strength, start=0.0, join=lambda a, b: a + b)
        self.table = written(self.table, table)

    def ask(self, view: RouterView, now: Now) -> None:
        """Add at the edit's tokens."""
        assert self.table is not None
        here = self.amount(now) > 0
        more = self.of_token(now, self.table)[:, : view.logits.shape[-1]]
        added = (view.logits + more).to(view.logits.dtype)
        view.logits = torch.where(here[:, None] & (more != 0), added, view.logits)
        view.as_given = False
        view.touched = view.touched | here


@step("keep")
class KeepStep(RouterStep[Keep]):
    """Bars every expert but some."""

    barred: torch.Tensor | None = None

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Which experts are out."""
        kept = self.marks(rows)
        inside = torch.tensor([bool(row) and row[0].strength != 0 for row in rows], device=self.device)
        self.barred = written(self.barred, ~kept & inside[:, None])

    def ask(self, view: RouterView, now: Now) -> None:
        """Bar them at the edit's tokens."""
        assert self.barred is not None
        here = self.amount(now) > 0
        view.bar(self.of_token(now, self.barred) & here[:, None])
        view.touched = view.touched | here


@step("force")
class ForceStep(RouterStep[Force]):
    """Puts experts before all others."""

    united: ClassVar[bool] = True
    forced: torch.Tensor | None = None
    given: torch.Tensor | None = None

    @staticmethod
    def form(edit: Force) -> Any:
        """Whether weights are given."""
        return (edit.weight is not None,)

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Which experts, and with what weight."""
        self.forced = written(self.forced, self.marks(rows))
        nothing = float("nan")
        given = self.by_expert(
            rows, lambda e: nothing if e.weight is None else e.weight, start=nothing, join=lambda _, b: b
        )
        self.given = written(self.given, given)

    def ask(self, view: RouterView, now: Now) -> None:
        """Raise their logits over the largest, and put them first."""
        assert self.forced is not None
        assert self.given is not None
        here = self.amount(now) > 0
        forced = self.of_token(now, self.forced) & here[:, None]
        raised = view.logits.amax(-1, keepdim=True) + _OVER_THE_LARGEST
        view.logits = torch.where(forced, raised, view.logits)
        view.force(forced)
        given = torch.where(forced, self.of_token(now, self.given), torch.nan)
        view.given = given if view.given is None else torch.where(given.isnan(), view.given, given)
        view.touched = view.touched | here


@step("mix_routing")
class MixRoutingStep(RouterStep[MixRouting]):
    """Mixes the router's probabilities with given ones, and turns the mixture back into logits."""

    graded: ClassVar[bool] = True
    reference: torch.Tensor | None = None
    share: torch.Tensor | None = None

    @staticmethod
    def why_not(edit: MixRouting, place: Place) -> str | None:
        """One number an expert is needed, and scores that a mixture can be turned back into."""
        s = place.sublayer
        if s is not None and len(edit.reference) not in (s.n_experts, s.n_choices):
            return f"its reference must have {s.n_experts} probabilities, one an expert; it has {len(edit.reference)}"
        if place.rule is not None and place.rule.rule.score == "sparsemixer":
            return "sparsemixer's weights are no shares of one distribution"
        return None

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """References and shares."""
        table = torch.zeros(len(rows), self.choices, dtype=torch.float32)
        for number, row in enumerate(rows):
            for edit in row:
                table[number, : len(edit.reference)] = torch.tensor(edit.reference)
        share = torch.tensor([row[0].share if row else 0.0 for row in rows], dtype=torch.float32)
        self.reference = written(self.reference, table.to(self.device))
        self.share = written(self.share, share.to(self.device))

    def ask(self, view: RouterView, now: Now) -> None:
        """Mix at the edit's tokens."""
        assert self.reference is not None
        assert self.share is not None
        rule = self.place.rule
        assert rule is not None
        share = self.amount(now) * self.of_token(now, self.share)
        here = (share != 0)[:, None]
        scores = rule.scores(view.logits).float()
        total = torch.ones_like(share)[:, None] if rule.rule.score == "softmax" else scores.sum(-1, keepdim=True)
        reference = self.of_token(now, self.reference)[:, : scores.shape[-1]]
        mixed = (1 - share[:, None]) * scores + share[:, None] * reference * total
        view.logits = torch.where(here, _logits_of(mixed, rule.rule.score).to(view.logits.dtype), view.logits)
        view.touched = view.touched | here[:, 0]
        view.as_given = False


def _logits_of(scores: torch.Tensor, score: str) -> torch.Tensor:
    """Logits whose scores are given: the inverse of softmax (up to a constant), sigmoid, or the root of a softplus."""
    if score == "softmax":
        return scores.log()
    if score == "sigmoid":
        return scores.clamp(max=_BELOW_ONE).logit()
    return scores.square().expm1().log()
