"""From a router's logits to its decision: the rule is named, and can be computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

Score = Literal["softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"]
Logits = Float[torch.Tensor, "token n_experts"]
Ids = Int[torch.Tensor, "token k"]
Weights = Float[torch.Tensor, "token k"]
Vector = Float[torch.Tensor, " n_experts"]

# Share of tokens whose decision a rule must reproduce: all but one in a thousand, which leaves room for exact ties.
ENOUGH = 0.999
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}
_CLOSE_NARROW = 2e-2


@dataclass(frozen=True)
class Groups:
    """Experts in equal groups, of which only some may be chosen from.

    Attributes:
        number, kept: groups in all, and how many of them a token may use.
        by: what a group is worth: the sum of its two largest selection scores, or its largest.
        others: what experts of other groups get before the top-k: minus infinity, or zero (so that they can be chosen).
    """

    number: int
    kept: int
    by: Literal["top2", "max"] = "top2"
    others: Literal["-inf", "zero"] = "-inf"


@dataclass(frozen=True)
class RoutingRule:
    """How logits become a decision.

    Attributes:
        score: softmax over all experts; a sigmoid or the root of a softplus for each; or sparsemixer (arXiv 2409.12136),
            whose k softmaxes each leave out what was chosen before and what lies far below the largest.
        choice: the top-k is taken of the scores, of the logits, or the experts come from a table of token ids (`hash`).
        bias: name of the vector added for the choice only, or None.
        groups: the limit on groups of experts, or None.
        renormalise: whether the k weights are divided by their sum.
        scale: constant factor on the weights.
        scale_by: name of a vector of further factors, one an expert, or None.
        jitter: width of sparsemixer's mask; 0 for other scores.
        dtype: in which the scores and the biased scores are computed: `float32`, the logits' own (`logits`), or the scores
            in the logits' own and the bias added in float32 (`mixed`).
        choice_agreement: share of tokens for which the rule gives the set of experts that the model used.
        weight_agreement: share for which it gives the weights, from the logits of the experts that the model used.
        agreement: share for which it gives both.
        tokens: how many tokens these are shares of.
    """

    score: Score
    choice: Literal["score", "logits", "hash"] = "score"
    bias: str | None = None
    groups: Groups | None = None
    renormalise: bool = False
    scale: float = 1.0
    scale_by: str | None = None
    jitter: float = 0.0
    dtype: Literal["float32", "logits", "mixed"] = "float32"
    agreement: float = 0.0
    choice_agreement: float = 0.0
    weight_agreement: float = 0.0
    tokens: int = 0

    @property
    def verified(self) -> bool:
        """Whether the rule reproduces the model's decisions, experts and weights."""
        return self.agreement >= ENOUGH

    @property
    def choice_verified(self) -> bool:
        """Whether the rule reproduces which experts the model uses, so that its margins are the model's."""
        return self.choice_agreement >= ENOUGH and self.choice != "hash"

    @property
    def weights_fit(self) -> bool:
        """Whether the weights show how logits become scores, whatever decides the choice."""
        return self.weight_agreement >= ENOUGH

    def as_json(self) -> dict[str, Any]:
        """The rule as stored in `layers.routing_rule`."""
        named = {"verified": self.verified, "choice_verified": self.choice_verified, "text": str(self)}
        return asdict(self) | named

    def __str__(self) -> str:
        chosen = {"hash": "experts by token id", "logits": "top-k of logits", "score": f"top-k of {self.score}"}
        parts = [chosen[self.choice] + (" + bias" if self.bias else "")]
        if self.groups:
            parts.append(f"within {self.groups.kept} of {self.groups.number} groups")
        parts.append(f"weights {self.score}" + (", renormalised" if self.renormalise else ""))
        if self.scale != 1.0 or self.scale_by:
            parts.append(f"times {'a factor for each expert' if self.scale_by else f'{self.scale:g}'}")
        return ", ".join(parts)


@dataclass(frozen=True)
class BoundRule:
    """A rule with the vectors of the router it belongs to, read whenever they are needed.

    Attributes:
        rule: the rule.
        vector: gives the live tensor of a name (`rule.bias`, `rule.scale_by`).
    """

    rule: RoutingRule
    vector: Callable[[str], Vector]

    def scores(self, logits: Logits) -> Logits:
        """Scores before any bias: what weights are made of."""
        given = logits.float() if self.rule.dtype == "float32" else logits
        if self.rule.score == "sigmoid":
            return given.sigmoid()
        if self.rule.score == "sqrtsoftplus":
            return F.softplus(given).sqrt()
        return given.softmax(-1)

    def selection(self, logits: Logits) -> Logits:
        """What the router takes its top-k of; experts that may not be chosen have minus infinity."""
        rule = self.rule
        monotone = rule.score == "softmax" and not rule.bias and not rule.groups and rule.dtype == "float32"
        plain = rule.choice == "logits" or rule.score == "sparsemixer" or monotone
        found = logits.float() if plain else self.scores(logits)
        if rule.bias:
            found = found.float() if rule.dtype == "mixed" else found
            found = found + self.vector(rule.bias).to(found)
        return _limited(found, rule.groups) if rule.groups else found

    def weights(self, logits: Logits, ids: Ids) -> Weights:
        """Weights of given experts; 0 for ids beyond the logits (no expert)."""
        rule = self.rule
        inside = ids < logits.shape[-1]
        safe = torch.where(inside, ids, 0)
        mixed = rule.score == "sparsemixer"
        found = _sparsemixer(logits.float(), safe, rule.jitter) if mixed else self.scores(logits).gather(-1, safe)
        found = torch.where(inside, found, 0)
        if rule.renormalise:
            found = found / found.sum(-1, keepdim=True)
        if rule.scale_by:
            found = found * self.vector(rule.scale_by).to(found)[safe]
        return found * rule.scale

    def decide(self, logits: Logits, k: int) -> tuple[Ids, Weights]:
        """The decision the rule takes: ids and weights [token, k], slots by falling selection score.

        Example:
            >>> rule = BoundRule(RoutingRule("softmax", renormalise=True), lambda name: torch.zeros(3))
            >>> ids, weights = rule.decide(torch.tensor([[0.0, 2.0, 1.0]]), 2)
            >>> ids.tolist(), round(float(weights.sum()), 4)
            ([[1, 2]], 1.0)
        """
        ids = self.selection(logits).topk(k, dim=-1).indices
        return ids, self.weights(logits, ids)

    def margin(self, logits: Logits, ids: Ids) -> Float[torch.Tensor, " token"]:
        """Smallest selection score among the chosen experts minus the largest among the others that were eligible.

        NaN where there is no other, or where a slot went to no expert.
        """
        found = self.selection(logits)
        inside = ids < found.shape[-1]
        safe = torch.where(inside, ids, 0)
        gap = found.gather(-1, safe).amin(-1) - found.scatter(-1, safe, -torch.inf).amax(-1)
        return torch.where(inside.all(-1) & gap.isfinite(), gap, torch.nan)

    def shares(self, logits: Logits) -> Logits:
        """Scores over their sum: what the entropy of a decision is taken of."""
        found = self.scores(logits).float()
        return found if self.rule.score in ("softmax", "sparsemixer") else found / found.sum(-1, keepdim=True)

    def agrees(self, logits: Logits, ids: Ids) -> torch.Tensor:
        """[token] Whether the rule chooses this set of experts; decisions with a slot that went to no expert agree."""
        outside = (ids >= logits.shape[-1]).any(-1)
        chosen = self.selection(logits).topk(ids.shape[-1], dim=-1).indices
        return (chosen.sort(-1).values == ids.sort(-1).values).all(-1) | outside

    def with_rule(self, **changes: Any) -> BoundRule:
        """The same router under a changed rule."""
        return replace(self, rule=replace(self.rule, **changes))


def same_weights(rule: Weights, given: Weights) -> torch.Tensor:
    """[token, slot] Whether weights of the rule, which computes in float32, are those of the model, in whatever type they are."""
    rtol = _CLOSE.get(given.dtype, _CLOSE_NARROW)
    return torch.isclose(rule.float(), given.float(), rtol=rtol, atol=1e-6)


def _limited(scores: Logits, groups: Groups) -> Logits:
    grouped = scores.reshape(*scores.shape[:-1], groups.number, -1)
    worth = grouped.topk(2, dim=-1).values.sum(-1) if groups.by == "top2" else grouped.amax(-1)
    kept = torch.zeros_like(worth).scatter(-1, worth.topk(groups.kept, dim=-1).indices, 1).bool()
    allowed = kept.unsqueeze(-1).expand_as(grouped).flatten(-2)
    return scores.masked_fill(~allowed, -torch.inf if groups.others == "-inf" else 0.0)


def _sparsemixer(logits: Logits, ids: Ids, jitter: float) -> Weights:
    """Weight of each chosen expert: a softmax over those not chosen before it and not far below the largest left."""
    by_logit = logits.gather(-1, ids).argsort(stable=True, dim=-1, descending=True)
    left, found = logits, []
    for rank in range(ids.shape[-1]):
        largest = left.amax(-1, keepdim=True)
        far = (largest - logits) / logits.abs().clamp(min=largest) > 2 * jitter
        chosen = ids.gather(-1, by_logit[:, rank, None])
        found.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, chosen))
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(found, -1).gather(-1, by_logit.argsort(-1))
