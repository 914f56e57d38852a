"""Steps on the slots that were chosen: other experts in them, or fewer in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Int

from moescope.core.edit_kinds.experts import RandomRouting, SwapExperts, TopP
from moescope.probes.edits.amounts import written
from moescope.probes.edits.decision_steps import TokenStep
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import Decision, step

_KEY = (1 << 62) - 1


@step("swap_experts")
class SwapStep(TokenStep[SwapExperts]):
    """Exchanges two experts in the slots."""

    other: torch.Tensor | None = None

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Where the slots of each expert go."""
        table = torch.arange(self.choices).repeat(len(rows), 1)
        for number, row in enumerate(rows):
            for edit in row:
                table[number, [edit.first, edit.second]] = torch.tensor([edit.second, edit.first])
        self.other = written(self.other, table.to(self.device))

    def decide(self, decision: Decision, now: Now) -> None:
        """Exchange at the edit's tokens."""
        assert self.other is not None
        swapped = self.of_token(now, self.other).gather(-1, decision.ids)
        decision.ids = torch.where((self.amount(now) > 0)[:, None], swapped.to(decision.ids.dtype), decision.ids)


@step("random_routing")
class RandomStep(TokenStep[RandomRouting]):
    """Experts by a hash of seed, layer, place in the sequence and token id: no state, and no host read.

    The same token at the same place gets the same experts, whatever batch or pass it comes in.
    """

    seed: torch.Tensor | None = None

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """The seeds."""
        seeds = torch.tensor([row[0].seed if row else 0 for row in rows], dtype=torch.int64)
        self.seed = written(self.seed, seeds.to(self.device))

    def decide(self, decision: Decision, now: Now) -> None:
        """The experts with the largest hashes, in the slots as they come."""
        assert self.seed is not None
        assert self.place.sublayer is not None
        n, k = self.place.sublayer.n_experts or 0, decision.ids.shape[1]
        place, ids = (t.to(self.device).reshape(-1).long() for t in (now.position, now.ids))
        key = mixed_up(self.of_token(now, self.seed) + (self.place.layer << 32))
        key = mixed_up(mixed_up(key ^ place) ^ ids)
        expert = torch.arange(n, device=self.device)
        keys = mixed_up(key[:, None] ^ mixed_up(expert + 1)) & _KEY
        chosen = keys.topk(k, dim=-1).indices.to(decision.ids.dtype)
        decision.ids = torch.where((self.amount(now) > 0)[:, None], chosen, decision.ids)


@step("top_p")
class TopPStep(TokenStep[TopP]):
    """Slots beyond a share p of the token's scores are given weight 0."""

    needs_rule: ClassVar[bool] = True
    reads_logits = True
    share: torch.Tensor | None = None
    keeps_sum: torch.Tensor | None = None

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Shares, and whether the sum of weights stays."""
        share = torch.tensor([row[0].p if row else 1.0 for row in rows], dtype=torch.float32)
        keeps = torch.tensor([bool(row) and row[0].renormalise for row in rows])
        self.share = written(self.share, share.to(self.device))
        self.keeps_sum = written(self.keeps_sum, keeps.to(self.device))

    def decide(self, decision: Decision, now: Now) -> None:
        """Drop the smallest slots at the edit's tokens."""
        assert self.share is not None
        assert self.keeps_sum is not None
        assert decision.logits is not None
        rule = self.place.rule
        assert rule is not None
        ids, weights = decision.ids, decision.weights
        inside = ids < decision.logits.shape[-1]
        scores = rule.shares(decision.logits).gather(-1, torch.where(inside, ids, 0))
        scores = torch.where(inside & (weights != 0), scores, 0.0)
        ordered, order = torch.sort(scores, dim=-1, descending=True, stable=True)
        reached = ordered.cumsum(-1) - ordered >= self.of_token(now, self.share)[:, None]  # by those before it
        reached[:, 0] = False
        dropped = torch.zeros_like(reached).scatter(-1, order, reached) & (self.amount(now) > 0)[:, None]
        left = torch.where(dropped, 0.0, weights)
        total, kept = weights.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
        scaled = torch.where(kept != 0, left * (total / torch.where(kept != 0, kept, 1.0)), left)
        changed = dropped.any(-1, keepdim=True)
        keeps = self.of_token(now, self.keeps_sum)[:, None]
        decision.weights = torch.where(changed, torch.where(keeps, scaled, left).to(weights.dtype), weights)


def mixed_up(key: Int[torch.Tensor, "*any"]) -> Int[torch.Tensor, "*any"]:
    """The finaliser of SplitMix64 on 64-bit integers: neighbouring keys come out far apart."""
    key = (key ^ ((key >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    key = (key ^ ((key >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return key ^ ((key >> 31) & ((1 << 33) - 1))
