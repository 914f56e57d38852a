"""Probe `routing`: the decision every token's experts were given, at every router."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from moescope.core.probe import probe
from moescope.core.sites import EXPERT_INDICES, ROUTER_LOGITS, Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.arrow_rows import constant, lists, slot_order
from moescope.probes.batches import Batch, Side
from moescope.probes.decision_faults import faults_of_ids, faults_of_logits, rule_faults
from moescope.probes.probe import Arrays, HostBatch, Probe, ProbeContext, Tensors, expectations_at, no_routers
from moescope.probes.routing_rule import BoundRule, same_weights
from moescope.store.coverage import Expectation
from moescope.store.totals import LoadPartial
from moescope.store.writer import BatchRecords

NEAR_TIE = 1e-4
_DECISIONS = "SELECT sum(len(experts)) FROM routing WHERE run_id = $run AND layer = $layer AND block = $block"
_ENTROPIES = "SELECT count(entropy) FROM routing WHERE run_id = $run AND layer = $layer AND block = $block"
_KEPT = ("ids", "weights", "finite", "like_probabilities", "entropy", "margin", "same_set", "same_weights")
_TINY = torch.finfo(torch.float32).tiny
_SUM_OF_SHARES = 1e-3
_SUM_OF_NARROW_SHARES = 1e-2


@probe(name="routing", tables=("routing", "loads"), default=True)
class RoutingProbe(Probe):
    """Chosen experts and weights as the experts received them, with margin and entropy of the router's scores."""

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        self._waiting: dict[tuple[int, str], Tensors] = {}
        self._counts: dict[tuple[int, str], Counter[str]] = {}

    def enter(self, batch: Batch, *, step: int, side: Side) -> None:
        """Forget what an earlier pass left half done."""
        self._waiting.clear()

    @classmethod
    def no_use(cls, anatomy: Anatomy) -> str | None:
        """Where there is no such thing to record."""
        return no_routers(anatomy)

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The decision at every router, and its logits where the router gives them."""
        decisions = [Site(s.layer, s.block, EXPERT_INDICES) for s in anatomy.moe]
        return decisions + [Site(s.layer, s.block, ROUTER_LOGITS) for s in anatomy.moe if s.has_logits]

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Keep ids and weights; once the logits are there too, which come before or after, what is worth knowing of them."""
        place = (site.layer, site.block)
        kept: dict[str, torch.Tensor] = {}
        if site.tensor == EXPERT_INDICES:
            ids, weights = tensors["indices"], tensors["weights"].detach()
            # Copies: a model may write over its own tensors before these reach the host.
            kept = {"ids": ids.to(torch.int32, copy=True), "weights": weights.to(torch.float32, copy=True)}
        both = {**self._waiting.pop(place, {}), **tensors}
        if "logits" not in both or "indices" not in both:
            self._waiting[place] = both
            return kept
        ids, weights = both["indices"], both["weights"].detach()
        logits = both["logits"].detach().flatten(0, -2)
        if len(logits) != len(ids):
            return kept  # of another pass, or not of these tokens; the ledger finds the gap
        return kept | _of_logits(logits) | _of_rule(self.context.rules.get(place), logits, ids, weights)

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Rows of `routing` and the step's part of `loads`."""
        tables = []
        for s in self.context.anatomy.moe:
            found = [host.kept.get(Site(s.layer, s.block, tensor), {}) for tensor in (EXPERT_INDICES, ROUTER_LOGITS)]
            kept = {name: a.take(host.real, axis=0) for part in found for name, a in part.items() if name in _KEPT}
            if "ids" not in kept:
                continue  # the ledger finds the gap
            self._check(s, kept)
            ids, weights = kept["ids"], kept["weights"]
            order = slot_order(weights, ids)
            if order is not None:
                ids, weights = np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)
            rows = len(ids)
            tables.append(
                pa.table(
                    {
                        "token": host.token,
                        "layer": pa.array(np.full(rows, s.layer, np.uint16)),
                        "block": constant(s.block, rows),
                        "experts": lists(ids.astype(np.uint16), pa.uint16()),
                        "weights": lists(weights, pa.float32()),
                        "margin": _optional(kept.get("margin"), rows, nan_is_null=True),
                        "entropy": _optional(kept.get("entropy"), rows),
                    }
                )
            )
            records.loads += _loads(s, ids, weights, host)
        if tables:
            records.tables["routing"] = pa.concat_tables(tables).unify_dictionaries()

    def _check(self, s: Sublayer, kept: Arrays) -> None:
        counts = self._counts.setdefault((s.layer, s.block), Counter())
        decision, router = (Site(s.layer, s.block, tensor) for tensor in (EXPERT_INDICES, ROUTER_LOGITS))
        for fault in faults_of_ids(kept["ids"], kept["weights"], s):
            self.context.report(decision, fault)
        counts["tokens"] += len(kept["ids"])
        if "entropy" in kept:
            counts["like_probabilities"] += int(kept["like_probabilities"].sum())
            for fault in faults_of_logits(kept["finite"], kept["like_probabilities"]):
                self.context.report(router, fault)
        if "margin" in kept:
            # At an exact tie either expert is right.
            same_set = ~(kept["margin"] < -NEAR_TIE) & kept.get("same_set", np.True_)
            counts["near_ties"] += int((np.abs(kept["margin"]) < NEAR_TIE).sum())
            counts["ruled"] += len(same_set)
            counts["same_set"] += int(same_set.sum())
            counts["same"] += int((same_set & kept.get("same_weights", np.True_)).sum())

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """k decisions a token at every router, and an entropy where there are logits."""
        for (layer, block), counts in self._counts.items():
            bound = self.context.rules.get((layer, block))
            for tensor, fault in rule_faults(counts, bound.rule if bound else None):
                self.context.report(Site(layer, block, tensor), fault)
        moe = self.context.anatomy.moe
        decisions = expectations_at(self, moe, EXPERT_INDICES, lambda s: tokens * (s.top_k or 0), _DECISIONS)
        routers = [s for s in moe if s.has_logits]
        return decisions + expectations_at(self, routers, ROUTER_LOGITS, lambda _: tokens, _ENTROPIES)

    def state(self) -> dict[str, Any]:
        """Counts of every router."""
        return {f"{layer}/{block}": dict(counts) for (layer, block), counts in self._counts.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        for key, counts in state.items():
            layer, block = key.split("/")
            self._counts.setdefault((int(layer), block), Counter()).update(counts)

    def summary(self) -> dict[str, Any]:
        """Over the whole run: near ties (another batch size may decide them differently) and the rules' agreement."""
        places = {
            f"blocks.{layer}.{block}": counts for (layer, block), counts in self._counts.items() if counts["ruled"]
        }
        if not places:
            return {}
        return {
            "near_ties": sum(counts["near_ties"] for counts in places.values()),
            "near_ties_by_router": {name: counts["near_ties"] for name, counts in places.items()},
            "rule_agreement_by_router": {name: counts["same"] / counts["ruled"] for name, counts in places.items()},
        }


def _of_logits(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """[token] Whether the logits are finite, and whether they look like shares that sum to 1."""
    most = _SUM_OF_SHARES if logits.element_size() >= torch.float32.itemsize else _SUM_OF_NARROW_SHARES
    total = logits.float().sum(-1)  # of finite logits it is finite, and otherwise not
    return {"finite": total.isfinite(), "like_probabilities": (logits.amin(-1) >= 0) & ((total - 1).abs() < most)}


def _of_rule(
    bound: BoundRule | None, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """[token] Entropy, and with a rule that holds: margin, and whether it gives the same experts and weights."""
    shares = bound.shares(logits) if bound is not None and bound.rule.weights_fit else logits.float().softmax(-1)
    # As torch.special.entr, to the same rounding, in half its time on a CPU: 0 · ln 0 counts as 0, a NaN stays.
    found = {"entropy": -shares.clamp(min=_TINY).log().mul_(shares).sum(-1)}
    if bound is None or not bound.rule.choice_verified:
        return found
    ids = ids.clamp(min=0)  # an id below 0 is reported on the host, and must not end the run here
    found["margin"] = bound.margin(logits, ids)
    if bound.rule.groups is not None:  # an expert of a group that was left out has no margin to show it
        found["same_set"] = bound.agrees(logits, ids)
    if bound.rule.weights_fit:
        nothing = (weights == 0) | (ids >= logits.shape[-1])
        found["same_weights"] = (same_weights(bound.weights(logits, ids), weights) | nothing).all(-1)
    return found


def _optional(values: NDArray[Any] | None, rows: int, *, nan_is_null: bool = False) -> pa.Array:
    return pa.nulls(rows, pa.float32()) if values is None else pa.array(values, pa.float32(), from_pandas=nan_is_null)


def _loads(s: Sublayer, ids: NDArray[Any], weights: NDArray[Any], host: HostBatch) -> list[LoadPartial]:
    names, experts = host.label_names, s.n_choices
    key = (host.labels[:, None] * experts + np.clip(ids, 0, experts - 1)).ravel()
    size = len(names) * experts
    tokens = np.bincount(key, minlength=size).reshape(-1, experts)
    sums = np.bincount(key, weights=weights.ravel().astype(np.float64), minlength=size).reshape(-1, experts)
    return [LoadPartial(s.layer, s.block, name, host.phase, tokens[i], sums[i]) for i, name in enumerate(names)]
