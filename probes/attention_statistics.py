"""Statistics of attention, reduced on the device while a pattern passes in slices of queries.

For one head of one sequence of T tokens, A[i, k] being the share of query i's attention that key k gets:

* `sink_alpha_k` = (1/(W − k)) Σ A[i, k] over k ≤ i < W, with W = min(T, 64): how much of the attention of the queries that
  see position k goes there (arXiv 2410.10781, whose T is 64). Columns grow short towards the end of a sequence: attention to
  oneself alone gives 1/(W − k), so that only the first ten positions are kept.
* `alpha_k`: the same over the whole sequence, W = T.
* `mass_first`, `mass_special`, `mass_punctuation`, `mass_self`, `mass_local` (the 16 keys before the query), `mass_other`:
  mean over queries of the share that goes to keys of a class; a key belongs to the first class that fits it. With
  `mass_sink_logit`, the share of a logit that no key owns, they sum to 1.
* `mass_previous`: of the key just before the query, whatever its class.
* `entropy` = −Σ A ln A of a row, in nats, a sink logit counting as one more outcome; `distance` = Σ A · (i − k), in tokens:
  means over queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

from moescope.probes.attention_classes import KEY_CLASSES, LOCAL, PLAIN, PUNCTUATION, SPECIAL
from moescope.probes.attention_slices import PatternSlices

POSITIONS = 10
WINDOW = 64

METRICS = (
    *(f"sink_alpha_{k}" for k in range(POSITIONS)),
    *(f"alpha_{k}" for k in range(POSITIONS)),
    *(f"mass_{name}" for name in KEY_CLASSES),
    "mass_previous",
    "entropy",
    "distance",
)
SINK_METRIC = "mass_sink_logit"
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class AttentionSums:
    """Statistics of one layer's attention for the sequences of a batch, as sums over queries.

    Attributes:
        names: of the metrics.
        sums: [row, metric, head]; a metric's value is sum / n.
        n: [row, metric] queries behind each sum; 0 where a sequence is too short for the position.
    """

    names: tuple[str, ...]
    sums: Float[torch.Tensor, "row metric head"]
    n: Int[torch.Tensor, "row metric"]

    def mean(self, metric: str) -> Float[torch.Tensor, "row head"]:
        """Value of a metric for every sequence and head; NaN where nothing was observed."""
        place = self.names.index(metric)
        counted = self.n[:, place, None]
        return torch.where(counted > 0, self.sums[:, place] / counted, torch.nan)


def reduce_pattern(
    slices: PatternSlices,
    mask: Bool[torch.Tensor, "row position"],
    codes: Int[torch.Tensor, "row position"] | None = None,
    *,
    window: int = WINDOW,
    local: int = LOCAL,
    padded: bool = True,
) -> AttentionSums:
    """Reduce the pattern of a prefill, slice by slice, without reading anything back.

    Args:
        slices: of a pass without a cache before it: its keys are its queries.
        mask: real tokens, on the slices' device; padding at either side.
        codes: plain, special or punctuation (`attention_classes`), by position; None for all plain.
        window: W of `sink_alpha_k`, in tokens.
        local: keys before the query that count as local.
        padded: whether there is padding at all; where not, a pass over each slice is saved.
    """
    sums = _Sums(slices, mask, window, local, codes)
    for pattern, first in slices:
        sums.add(pattern, first, padded=padded)
    return sums.finish()


class _Sums:
    """Running sums of one pattern."""

    def __init__(
        self, slices: PatternSlices, mask: torch.Tensor, window: int, local: int, codes: torch.Tensor | None
    ) -> None:
        self.mask, self.local, self.sinks = mask, local, slices.sinks
        rows, width = mask.shape
        real = mask.float()
        self.position = mask.long().cumsum(-1) - 1
        self.length = mask.sum(-1)
        self.window = self.length.clamp(max=window)
        self.starts = mask.long().argmax(-1)
        self.weights = torch.stack([real, real * (self.position < window)], dim=1)  # [row, all or window, query]
        self.kinds = self._kinds(codes)
        zeros = real.new_zeros
        self.columns = zeros(rows, slices.heads, 2, width)
        self.near = zeros(rows, slices.heads, 3)  # self, local, previous
        self.rest = zeros(rows, slices.heads, 3)  # entropy, distance, sink logit

    def _kinds(self, codes: torch.Tensor | None) -> torch.Tensor:
        """[row, key, kind] Whether a key is the first, special, punctuation, or plain."""
        first = self.mask & (self.position == 0)
        codes = torch.zeros_like(self.position) if codes is None else codes
        others = self.mask & ~first
        return torch.stack([first, *(others & (codes == kind) for kind in (SPECIAL, PUNCTUATION, PLAIN))], -1).float()

    def add(self, pattern: Float[torch.Tensor, "row head query key"], first: int, *, padded: bool) -> None:
        width = self.mask.shape[1]
        pattern = pattern[..., :width]  # a static cache has empty places behind
        queries, keys = pattern.shape[2:]
        end = first + queries
        if padded:  # rows of padding may hold anything, NaN too
            pattern = pattern.masked_fill(~self.mask[:, None, first:end, None], 0.0)
        weights = self.weights[:, :, first:end]
        self.columns[..., :keys] += weights.unsqueeze(1) @ pattern
        self._add_near(pattern, first)
        place = torch.arange(keys, device=pattern.device)
        lever = torch.stack([torch.ones_like(place), first - place], -1).to(pattern.dtype)
        mass, moment = (pattern @ lever).unbind(-1)
        moment = moment + mass * torch.arange(queries, device=pattern.device)
        entropy = -pattern.clamp(min=_TINY).log().mul_(pattern).sum(-1)
        sink = (1 - mass).clamp(min=0.0)
        if self.sinks:
            entropy = entropy - sink * sink.clamp(min=_TINY).log()
        self.rest += torch.stack([entropy, moment, sink], -1).mul(weights[:, 0, None, :, None]).sum(2)

    def _add_near(self, pattern: torch.Tensor, first: int) -> None:
        """Attention to oneself and to the keys just before: what lies along the diagonals."""
        rows, heads, queries, keys = pattern.shape
        back = torch.arange(self.local + 1, device=pattern.device)
        query = first + torch.arange(queries, device=pattern.device)
        key = query[:, None] - back  # [query, distance]
        there = key >= 0
        key = key.clamp(min=0, max=keys - 1)
        seen = pattern.gather(-1, key.expand(rows, heads, queries, -1))
        plain = self.kinds[..., 3][:, key] * there  # [row, query, distance]
        any_key = self.mask[:, key] & there
        weight = self.weights[:, 0, first : first + queries, None]
        by_distance = torch.einsum("rhqd,rqd->rhd", seen, plain * weight)
        previous = torch.einsum("rhq,rq->rh", seen[..., 1], any_key[..., 1] * weight[..., 0])
        self.near += torch.stack([by_distance[..., 0], by_distance[..., 1:].sum(-1), previous], -1)

    def finish(self) -> AttentionSums:
        rows, heads, _, width = self.columns.shape
        k = torch.arange(POSITIONS, device=self.mask.device)
        seen = k < self.length[:, None]  # [row, k]
        at = (self.starts[:, None] + k).clamp(max=width - 1)
        alpha = self.columns.gather(-1, at[:, None, None].expand(rows, heads, 2, -1)) * seen[:, None, None]
        kinds = torch.einsum("rhk,rkc->rhc", self.columns[:, :, 0], self.kinds)
        near, rest = self.near.unbind(-1), self.rest.unbind(-1)
        other = (kinds[..., 3] - near[0] - near[1]).clamp(min=0.0)
        parts = [
            alpha[:, :, 1],
            alpha[:, :, 0],
            kinds[..., :3],
            torch.stack([*near[:2], other, near[2], *rest[:2]], -1),
        ]
        counts = [(w[:, None] - k).clamp(min=0) for w in (self.window, self.length)]
        each = self.length[:, None].expand(-1, len(METRICS) - 2 * POSITIONS)
        names: Sequence[str] = METRICS
        if self.sinks:
            names, each = (*METRICS, SINK_METRIC), torch.cat([each, self.length[:, None]], -1)
            parts.append(rest[2].unsqueeze(-1))
        sums = torch.cat(parts, -1).transpose(1, 2).contiguous()
        return AttentionSums(tuple(names), sums, torch.cat([*counts, each], -1))
