"""Probe `experts`: what every chosen expert put out, and how many of its neurons took part, reduced as it passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.probe import probe
from moescope.core.sites import EXPERT_OUT, EXPERT_POST, SHARED_OUT, Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.probe import Arrays, HostBatch, Probe, ProbeContext, Tensors, expectations_at, no_inside
from moescope.probes.slot_reductions import neuron_counts, slot_reductions
from moescope.store.coverage import Expectation
from moescope.store.totals import ExpertPartial
from moescope.store.writer import BatchRecords

_SLOTS = "SELECT sum(tokens) FROM experts WHERE run_id = $run AND layer = $layer AND block = $block AND expert >= 0"
# Null experts have no neurons to see, and those of shared ones are not looked at.
_NEURONS = """
SELECT sum(CASE WHEN expert < n_experts THEN neurons // d_expert ELSE tokens END)
FROM expert_partials
JOIN layers USING (run_id, layer, block)
WHERE run_id = $run AND layer = $layer AND block = $block AND expert >= 0
"""


@probe(name="experts", tables=("experts",), default=True)
class ExpertsProbe(Probe):
    """Running reductions for each expert: load, mean output norm, largest |output| with its channel and token, neurons.

    A neuron is an entry a of act(gate) · up, the input of the down projection (of act(up) where there is no gate).
    `zero_share` is the share of a = 0, the sparsity of ProSparse (arXiv 2402.13516); `active_share` the share of
    |a| > `threshold`. With the threshold 0 that is the activation ratio of the Sparsing Law (arXiv 2411.02335) at an error of
    nothing, and 1 − `zero_share`: no number of ours is in it. A ReLU expert shows its sparsity so; a SiLU expert has
    next to no exact zeros, and what counts as small in it is for the user to say.

    Shared experts are one row, with id −1: they run as one module, whatever number of them a family counts. Their output is
    what they add to the routed ones, a gate of theirs included, so that their weight is 1; they take every token and have
    no neurons here.

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
        """The experts' neurons, which come with their outputs; the outputs alone where no neurons can be seen; shared experts."""
        reached = [s for s in anatomy.moe if s.unreachable is None]
        return [experts_site(s) for s in reached] + [shared_site(s) for s in reached if has_shared(s)]

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Norm of every slot; for every expert the largest |output|, with slot and channel; neurons counted. No host read."""
        if site.tensor == SHARED_OUT:
            return _shared_kept(tensors)
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
            if s.unreachable is not None or not has_shared(s):
                continue
            if kept := host.kept.get(shared_site(s)):
                records.experts.append(self._shared_partial(s, kept, host))
            else:
                self.context.report(Site(s.layer, s.block, EXPERT_OUT), "the output of its shared experts was not seen")

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

    def _shared_partial(self, s: Sublayer, kept: Arrays, host: HostBatch) -> ExpertPartial:
        norms = kept["shared_norms"].take(host.real).astype(np.float64)
        if not np.isfinite(norms).all():
            problem = "some outputs of shared experts are NaN or infinite"
            self.context.report(Site(s.layer, s.block, EXPERT_OUT), problem)
        row_token = np.full(host.mask.size, -1, np.int64)
        row_token[host.real] = host.token
        tokens, total, none = np.array([len(norms)]), norms.sum(keepdims=True), np.zeros(1, np.int64)
        channel, place = (kept[name].astype(np.int64) for name in ("shared_channel", "shared_winner"))
        largest = kept["shared_largest"].astype(np.float32)
        return ExpertPartial(
            s.layer, s.block, tokens, tokens.astype(np.float64), total, total, largest, channel, row_token[place],
            none, none, none, shared=True,
        )  # fmt: skip

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """k slots a token at every router whose experts can be read, and as many rows of neurons where these can.

        Shared experts take every token of a step or none, and where they were not seen the router's own site says so.
        """
        reached = [s for s in self.context.anatomy.moe if s.unreachable is None]
        with_neurons = [s for s in reached if experts_site(s).tensor == EXPERT_POST]
        found = expectations_at(self, reached, EXPERT_OUT, lambda s: tokens * (s.top_k or 0), _SLOTS)
        return found + expectations_at(self, with_neurons, EXPERT_POST, lambda s: tokens * (s.top_k or 0), _NEURONS)


def experts_site(s: Sublayer) -> Site:
    """Where slot outputs are read: with the neurons where these can be seen, in the kernel's own order."""
    return Site(s.layer, s.block, EXPERT_POST if s.neurons else EXPERT_OUT)


def has_shared(s: Sublayer) -> bool:
    """Whether a router has shared experts beside it whose output can be read."""
    return bool(s.n_shared) and s.block == "mlp"


def shared_site(s: Sublayer) -> Site:
    """Where what shared experts add is read."""
    return Site(s.layer, s.block, SHARED_OUT)


def computed_slots(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot outputs [token · k, d_model] without bringing them into order, and which place each row is."""
    if "computed" in tensors:
        return tensors["computed"].detach(), tensors["slot"]
    out = tensors["out"].detach().flatten(0, 1)
    return out, torch.arange(len(out), device=out.device)


def _shared_kept(tensors: Tensors) -> Tensors:
    """The same reductions for shared experts, as one expert that every token takes."""
    out, mask = tensors["out"].detach(), tensors["mask"].reshape(-1)
    out = out.reshape(-1, out.shape[-1])
    place = torch.arange(len(out), device=out.device)
    norms, largest, winner, channel = slot_reductions(out, place, torch.zeros_like(place)[:, None], mask, 1)
    return {"shared_norms": norms, "shared_largest": largest, "shared_winner": winner, "shared_channel": channel}


def _sums(ids: NDArray[Any], values: NDArray[Any], experts: int) -> NDArray[np.float64]:
    """Sum of values by expert, added in token order."""
    return np.bincount(ids, values, experts).astype(np.float64)
