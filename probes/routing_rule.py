"""From logits to decision: the rule is named, and held against the decisions the model took."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int

from moescope.core.sites import EXPERT_INDICES, ROUTER_LOGITS, Site
from moescope.probes.batches import Batch
from moescope.probes.forward import logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.taps import tapped

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class RoutingRule:
    """Top-k of scores, weights from the scores.

    Attributes:
        score: softmax over all experts, or a sigmoid for each.
        renormalise: whether the k weights are divided by their sum.
        scale: factor on the weights.
        agreement: share of tokens for which the rule gives the set of experts and, within 1 %, the weights.
        weight_agreement: the share for which the weights alone follow from the scores of the chosen experts, as they do
            where a bias or a group limit decides the choice but not the weights.
        tokens: how many tokens these are shares of.
    """

    score: Score
    renormalise: bool
    scale: float
    agreement: float
    weight_agreement: float
    tokens: int

    @property
    def verified(self) -> bool:
        """Whether the rule reproduces the decisions: all but one in a thousand, which leaves room for ties."""
        return self.agreement >= 0.999

    @property
    def weights_fit(self) -> bool:
        """Whether the weights show how logits become scores, whatever decides the choice."""
        return self.weight_agreement >= 0.999

    def as_json(self) -> dict[str, Any]:
        """The rule as stored in `layers.routing_rule`."""
        scale = self.scale if math.isfinite(self.scale) else None
        return asdict(self) | {"scale": scale, "verified": self.verified}


def find_rule(
    logits: Float[torch.Tensor, "token n_experts"],
    ids: Int[torch.Tensor, "token k"],
    weights: Float[torch.Tensor, "token k"],
) -> RoutingRule:
    """Try the known rules against real decisions and give the one that agrees most.

    Known so far: top-k of softmax or sigmoid scores without bias or groups, renormalised or not, with a constant scale.
    """
    logits, weights = logits.float(), weights.float()
    found = []
    names: tuple[Score, ...] = ("softmax", "sigmoid")
    for score in names:
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        expected_ids = scores.topk(ids.shape[-1], dim=-1).indices
        same_set = (expected_ids.sort(-1).values == ids.sort(-1).values).all(-1)
        for renormalise in (True, False):
            base = scores.gather(-1, ids)
            base = base / base.sum(-1, keepdim=True) if renormalise else base
            scale = float((weights / base).median())
            same_weights = torch.isclose(base * scale, weights, rtol=1e-2, atol=1e-6).all(-1)
            agreement = float((same_set & same_weights).float().mean())
            fit = float(same_weights.float().mean())
            found.append(RoutingRule(score, renormalise, round(scale, 4), agreement, fit, len(ids)))
    return max(found, key=lambda rule: (rule.agreement, rule.weight_agreement))


def find_rules(model: LiveModel, batch: Batch) -> dict[tuple[int, str], RoutingRule]:
    """Run one batch and find the rule of every router that gives its logits: (layer, block) → rule."""
    seen: dict[Site, dict[str, torch.Tensor]] = {}
    routers = [s for s in model.anatomy.moe if s.router_path]
    sites = [Site(s.layer, s.block, tensor) for s in routers for tensor in (ROUTER_LOGITS, EXPERT_INDICES)]
    if not sites:
        return {}
    on_device = to_device(batch, model)
    with (
        torch.no_grad(),
        tapped(model.module, model.anatomy, sites, lambda site, tensors: seen.update({site: tensors})),
    ):
        logits_of(model, on_device)
    real = on_device.mask.flatten()
    found = {}
    for s in routers:
        decision = seen.get(Site(s.layer, s.block, EXPERT_INDICES))
        scores = seen.get(Site(s.layer, s.block, ROUTER_LOGITS))
        if decision is not None and scores is not None:
            logits = scores["logits"].reshape(len(real), -1)
            found[s.layer, s.block] = find_rule(logits[real], decision["indices"][real], decision["weights"][real])
    return found
