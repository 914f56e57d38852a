"""Probe `experts`: what every chosen expert put out, and how many of its neurons took part, reduced as it passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.probe import probe
from moescope.core.sites import EXPERT_OUT, EXPERT_POST, Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.probe import Arrays, HostBatch, Probe, ProbeContext, Tensors, expectations_at, no_inside
from moescope.probes.slot_reductions import neuron_counts, slot_reductions
from moescope.store.coverage import Expectation
from moescope.store.totals import ExpertPartial
from moescope.store.writer import BatchRecords

_SLOTS = "SELECT sum(tokens) FROM experts WHERE run_id = $run AND layer = $layer AND block = $block AND expert >= 0"
# Null experts have no neurons to see.
_NEURONS = """
SELECT sum(CASE WHEN expert < n_experts THEN neurons // d_expert ELSE tokens END)
FROM expert_partials
JOIN layers USING (run_id, layer, block)
WHERE run_id = $run AND layer = $layer AND block = $block
"""


@probe(name="experts", tables=("experts",), default=True)
class ExpertsProbe(Probe):
    """Running reductions for each expert: load, mean output norm, largest |output| with its channel and token, neurons.

    A neuron is an entry a of act(gate) · up, the input of the down projection (of act(up) where there is no gate).
    `zero_share` is the share of a = 0, the sparsity of ProSparse (arXiv 2402.13516); `active_share` the share of
    |a| > `threshold`. With the threshold 0 that is the activation ratio of the Sparsing Law (arXiv 2411.02335) at an error of
    nothing, and 1 − `zero_share`: no number of ours is in it. A ReLU expert shows its sparsity so; a SiLU expert has
    next to no exact zeros, and what counts as small in it is for the user to say.

    Args:
        context: of the run.
        threshold: of |a|, from 0.
    """

    def __init__(self, context: ProbeContext, *, threshold: float = 0.0) -> None:
        super().__init__(context)
        self._threshold = threshold
        self._sublayers = {(s.layer, s.block): s for s in context.anatomy.moe}

    @classmethod
    def no_use(cls, anatomy: Anatomy) -> str | None:
        """Where there is no such thing to record."""
        return no_inside(anatomy)

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The experts' neurons, which come with their outputs; the outputs alone where no neurons can be seen."""
        return [experts_site(s) for s in anatomy.moe if s.unreachable is None]

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Norm of every slot; for every expert the largest |output|, with slot and channel; neurons counted. No host read."""
        ids, mask = tensors["indices"], tensors["mask"]
        experts = self._sublayers[site.layer, site.block].n_choices
        out, slot = computed_slots(tensors)
        norms, largest, winner, channel = slot_reductions(out, slot, ids, mask.reshape(-1), experts)
        # Copies: a model may write over its own tensors before these reach the host.
        kept = {
            "ids": ids.to(torch.int32, copy=True),
            "weights": tensors["weights"].detach().to(torch.float32, copy=True),
            "norms": norms.reshape(ids.shape),
            "largest": largest,
            "winner": winner,
            "channel": channel,
        }
        if "post" in tensors:
            post = tensors["post"].detach()
            zeros, active = neuron_counts(post, tensors["slot"], ids.numel(), self._threshold)
            kept |= {"zeros": zeros, "active": active, "width": torch.full((1,), post.shape[-1], device=post.device)}
        return kept

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """The batch's part of `experts`."""
        for s in self.context.anatomy.moe:
            if kept := host.kept.get(experts_site(s)):
                records.experts.append(self._partial(s, kept, host))

    def _partial(self, s: Sublayer, kept: Arrays, host: HostBatch) -> ExpertPartial:
        experts, k = s.n_choices, kept["ids"].shape[1]
        ids = kept["ids"].take(host.real, axis=0).ravel()
        weights, norms = (kept[n].take(host.real, axis=0).ravel().astype(np.float64) for n in ("weights", "norms"))
        if not np.isfinite(norms).all():
            self.context.report(Site(s.layer, s.block, EXPERT_OUT), "some expert outputs are NaN or infinite")
        valid = (ids >= 0) & (ids < experts)
        ids, weights, norms = ids[valid], weights[valid], norms[valid]
        row_token = np.full(host.mask.size, -1, np.int64)
        row_token[host.real] = host.token
        tokens = np.bincount(ids, minlength=experts)
        chosen = tokens > 0
        neurons, active, zeros = np.zeros((3, experts), np.int64)
        if "zeros" in kept:
            counts = [kept[name].reshape(-1, k).take(host.real, axis=0).ravel()[valid] for name in ("zeros", "active")]
            seen = counts[0] >= 0
            neurons = np.bincount(ids[seen], minlength=experts) * int(kept["width"][0])
            zeros, active = (_sums(ids[seen], count[seen], experts).astype(np.int64) for count in counts)
        return ExpertPartial(
            s.layer,
            s.block,
            tokens,
            _sums(ids, weights, experts),
            _sums(ids, norms, experts),
            _sums(ids, weights * norms, experts),
            np.where(chosen, kept["largest"], -1).astype(np.float32),
            np.where(chosen, kept["channel"], -1),
            np.where(chosen, row_token[kept["winner"] // k], -1),
            neurons,
            active,
            zeros,
        )

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """k slots a token at every router whose experts can be read, and as many rows of neurons where these can."""
        reached = [s for s in self.context.anatomy.moe if s.unreachable is None]
        with_neurons = [s for s in reached if experts_site(s).tensor == EXPERT_POST]
        found = expectations_at(self, reached, EXPERT_OUT, lambda s: tokens * (s.top_k or 0), _SLOTS)
        return found + expectations_at(self, with_neurons, EXPERT_POST, lambda s: tokens * (s.top_k or 0), _NEURONS)


def experts_site(s: Sublayer) -> Site:
    """Where slot outputs are read: with the neurons where these can be seen, in the kernel's own order."""
    return Site(s.layer, s.block, EXPERT_POST if s.neurons else EXPERT_OUT)


def computed_slots(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot outputs [token · k, d_model] without bringing them into order, and which place each row is."""
    if "computed" in tensors:
        return tensors["computed"].detach(), tensors["slot"]
    out = tensors["out"].detach().flatten(0, 1)
    return out, torch.arange(len(out), device=out.device)


def _sums(ids: NDArray[Any], values: NDArray[Any], experts: int) -> NDArray[np.float64]:
    """Sum of values by expert, added in token order."""
    return np.bincount(ids, values, experts).astype(np.float64)
