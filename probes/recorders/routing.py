"""Probe `routing`: the decision every token's experts were given, at every router."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from moescope.core.probe import probe
from moescope.core.sites import EXPERT_INDICES, ROUTER_LOGITS, Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.arrow_rows import constant, lists, slot_order
from moescope.probes.probe import HostBatch, Probe, ProbeContext, Tensors, expectations_at
from moescope.store.coverage import Expectation
from moescope.store.totals import LoadPartial
from moescope.store.writer import BatchRecords

_DECISIONS = "SELECT sum(len(experts)) FROM routing WHERE run_id = $run AND layer = $layer AND block = $block"
_ENTROPIES = "SELECT count(entropy) FROM routing WHERE run_id = $run AND layer = $layer AND block = $block"


@probe(name="routing", tables=("routing", "loads"), default=True)
class RoutingProbe(Probe):
    """Chosen experts and weights as the experts received them, with margin and entropy of the router's scores."""

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        self._logits: dict[tuple[int, str], torch.Tensor] = {}

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The decision at every router, and its logits where the router gives them."""
        decisions = [Site(s.layer, s.block, EXPERT_INDICES) for s in anatomy.moe]
        return decisions + [Site(s.layer, s.block, ROUTER_LOGITS) for s in anatomy.moe if s.router_path]

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Keep ids and weights; from the logits, which come first, margin and entropy."""
        if site.tensor == ROUTER_LOGITS:
            self._logits[site.layer, site.block] = tensors["logits"]
            return {}
        ids = tensors["indices"]
        # Copies: a model may write over its own tensors before these reach the host.
        kept = {
            "ids": ids.to(torch.int32, copy=True),
            "weights": tensors["weights"].detach().to(torch.float32, copy=True),
        }
        logits = self._logits.pop((site.layer, site.block), None)
        if logits is None:
            return kept
        logits = logits.detach().reshape(len(ids), -1).float()
        place = (site.layer, site.block)
        score = self.context.scores.get(place, "softmax")
        scores = logits.sigmoid() if score == "sigmoid" else logits
        shares = scores / scores.sum(-1, keepdim=True) if score == "sigmoid" else logits.softmax(-1)
        kept["entropy"] = torch.special.entr(shares).sum(-1)
        kept["are_probabilities"] = (logits >= 0).all() & ((logits.sum(-1) - 1).abs() < 1e-3).all()
        if place in self.context.verified and ids.shape[-1] < logits.shape[-1]:
            chosen = scores.gather(-1, ids).amin(-1)
            kept["margin"] = chosen - scores.scatter(-1, ids, -torch.inf).amax(-1)
        return kept

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Rows of `routing` and the batch's part of `loads`."""
        tables = []
        for s in self.context.anatomy.moe:
            kept = host.kept.get(Site(s.layer, s.block, EXPERT_INDICES))
            if kept is None:
                continue  # the ledger finds the gap
            ids, weights = kept["ids"].take(host.real, axis=0), kept["weights"].take(host.real, axis=0)
            self._check(s, ids, weights, kept)
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
                        "margin": _optional(kept.get("margin"), host),
                        "entropy": _optional(kept.get("entropy"), host),
                    }
                )
            )
            records.loads += _loads(s, ids, weights, host)
        if tables:
            records.tables["routing"] = pa.concat_tables(tables).unify_dictionaries()

    def _check(self, s: Sublayer, ids: NDArray[Any], weights: NDArray[Any], kept: Any) -> None:
        site = Site(s.layer, s.block, EXPERT_INDICES)
        experts = (s.n_experts or 0) + (s.n_null or 0)
        if len(ids) and (ids.min() < 0 or ids.max() >= experts):
            self.context.report(site, f"expert ids run from {ids.min()} to {ids.max()}, but the layer has {experts}")
        if not np.isfinite(weights).all():
            self.context.report(site, "some weights are NaN or infinite")
        if "entropy" in kept and np.isnan(kept["entropy"]).any():
            self.context.report(Site(s.layer, s.block, ROUTER_LOGITS), "some router logits are NaN")
        if kept.get("are_probabilities", np.False_):
            self.context.report(
                Site(s.layer, s.block, ROUTER_LOGITS),
                "every row is non-negative and sums to 1: these are probabilities, not logits",
            )

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """k decisions a token at every router, and an entropy where there are logits."""
        moe = self.context.anatomy.moe
        decisions = expectations_at(self, moe, EXPERT_INDICES, lambda s: tokens * (s.top_k or 0), _DECISIONS)
        routers = [s for s in moe if s.router_path]
        return decisions + expectations_at(self, routers, ROUTER_LOGITS, lambda _: tokens, _ENTROPIES)


def _optional(values: NDArray[Any] | None, host: HostBatch) -> pa.Array:
    if values is None:
        return pa.nulls(len(host.real), pa.float32())
    return pa.array(values.take(host.real), pa.float32())


def _loads(s: Sublayer, ids: NDArray[Any], weights: NDArray[Any], host: HostBatch) -> list[LoadPartial]:
    experts = (s.n_experts or 0) + (s.n_null or 0)
    names = host.label_names
    key = (host.labels[:, None] * experts + np.clip(ids, 0, experts - 1)).ravel()
    size = len(names) * experts
    tokens = np.bincount(key, minlength=size).reshape(-1, experts)
    sums = np.bincount(key, weights=weights.ravel().astype(np.float64), minlength=size).reshape(-1, experts)
    return [LoadPartial(s.layer, s.block, name, "prefill", tokens[i], sums[i]) for i, name in enumerate(names)]
