"""Probe `experts`: what every chosen expert put out, reduced as it passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.probe import probe
from moescope.core.sites import EXPERT_OUT, Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.probe import Arrays, HostBatch, Probe, Tensors, expectations_at
from moescope.store.coverage import Expectation
from moescope.store.totals import ExpertPartial
from moescope.store.writer import BatchRecords

_SLOTS = "SELECT sum(tokens) FROM experts WHERE run_id = $run AND layer = $layer AND block = $block AND expert >= 0"


@probe(name="experts", tables=("experts",), default=True)
class ExpertsProbe(Probe):
    """Running reductions for each expert: load, mean output norm, largest |output| with its channel and token."""

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The slot outputs of every router's experts."""
        return [Site(s.layer, s.block, EXPERT_OUT) for s in anatomy.moe]

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Norm of every slot; for every expert the largest |output|, with slot and channel. No host read."""
        out, ids, mask = tensors["out"].detach(), tensors["indices"], tensors["mask"]
        experts = self._sublayer(site).n_experts or 0
        slots = ids.numel()
        # Ids that are no expert go to a bucket of their own, so that a wrong id cannot end the run; padding never wins.
        flat = ids.reshape(-1)
        flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
        peak = torch.where(mask.reshape(-1, 1), out.abs().amax(-1).float(), -1.0).reshape(-1)
        largest = torch.full((experts + 1,), -1.0, device=out.device).scatter_reduce(0, flat, peak, "amax")
        number = torch.arange(slots, device=out.device)
        ties = torch.where(peak == largest[flat], number, slots)
        winner = (
            torch.full((experts + 1,), slots, device=out.device)
            .scatter_reduce(0, flat, ties, "amin")
            .clamp(max=slots - 1)
        )
        channel = out[winner // ids.shape[1], winner % ids.shape[1]].abs().argmax(-1)
        return {
            "ids": ids.to(torch.int32, copy=True),
            "weights": tensors["weights"].detach().to(torch.float32, copy=True),
            "norms": torch.linalg.vector_norm(out, dim=-1, dtype=torch.float32),
            "largest": largest[:experts],
            "winner": winner[:experts],
            "channel": channel[:experts],
        }

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """The batch's part of `experts`."""
        for s in self.context.anatomy.moe:
            site = Site(s.layer, s.block, EXPERT_OUT)
            if kept := host.kept.get(site):
                records.experts.append(self._partial(s, site, kept, host))

    def _partial(self, s: Sublayer, site: Site, kept: Arrays, host: HostBatch) -> ExpertPartial:
        experts = s.n_experts or 0
        ids = kept["ids"].take(host.real, axis=0).ravel()
        weights, norms = (kept[n].take(host.real, axis=0).ravel().astype(np.float64) for n in ("weights", "norms"))
        if not np.isfinite(norms).all():
            self.context.report(site, "some expert outputs are NaN or infinite")
        valid = (ids >= 0) & (ids < experts)
        ids, weights, norms = ids[valid], weights[valid], norms[valid]
        row_token = np.full(host.mask.size, -1, np.int64)
        row_token[host.real] = host.token
        tokens = np.bincount(ids, minlength=experts)
        chosen = tokens > 0
        return ExpertPartial(
            s.layer,
            s.block,
            tokens,
            _sums(ids, weights, experts),
            _sums(ids, norms, experts),
            _sums(ids, weights * norms, experts),
            np.where(chosen, kept["largest"], -1).astype(np.float32),
            np.where(chosen, kept["channel"], -1),
            np.where(chosen, row_token[kept["winner"] // kept["ids"].shape[1]], -1),
        )

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """k slots a token at every router."""
        return expectations_at(self, self.context.anatomy.moe, EXPERT_OUT, lambda s: tokens * (s.top_k or 0), _SLOTS)

    def _sublayer(self, site: Site) -> Sublayer:
        return next(s for s in self.context.anatomy.moe if (s.layer, s.block) == (site.layer, site.block))


def _sums(ids: NDArray[Any], values: NDArray[np.float64], experts: int) -> NDArray[np.float64]:
    """Sum of values by expert, added in token order."""
    return np.bincount(ids, values, experts).astype(np.float64)
