"""Sums over tokens of what experts write along latents, and of what routers do where latents are active."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int

from moescope.sae.experts.stream_parts import Parts

_ROOM = 1 << 23  # numbers of one [token, feature] piece


@dataclass(frozen=True)
class Slots:
    """What each chosen expert adds, with shared experts as one more: the last of `experts`' ids.

    Attributes:
        vectors: [row, slot, d_model].
        experts: [row, slot].
        added: [row, d_model] what they are parts of.
    """

    vectors: Float[torch.Tensor, "row slot d_model"]
    experts: Int[torch.Tensor, "row slot"]
    added: Float[torch.Tensor, "row d_model"]


def slots_of(parts: Parts, n_choices: int) -> Slots:
    """Parts of a block's output as slots, the shared experts' last."""
    if parts.shared is None:
        return Slots(parts.slots, parts.experts.long(), parts.added)
    ids = torch.full_like(parts.experts[:, :1], n_choices)
    vectors = torch.cat([parts.slots, parts.shared[:, None]], 1)
    return Slots(vectors, torch.cat([parts.experts, ids], 1).long(), parts.added)


@dataclass
class WriterTally:
    """What the experts of one router write along each latent, over tokens.

    Attributes:
        along: direction set → [expert, feature] sum of contributions over tokens on which the latent is active.
        chosen: [expert, feature] active tokens that chose the expert.
        whole: [expert, d_model] sum of what each expert adds, over all tokens.
        block: [feature] sum of the block's output along the decoder over active tokens.
    """

    directions: dict[str, torch.Tensor]
    n_experts: int
    along: dict[str, torch.Tensor] = field(init=False)
    chosen: torch.Tensor = field(init=False)
    whole: torch.Tensor = field(init=False)
    block: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        first = next(iter(self.directions.values()))

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=first.device)

        self.along = {name: zeros(self.n_experts, len(first)) for name in self.directions}
        self.chosen = zeros(self.n_experts, len(first))
        self.whole = zeros(self.n_experts, first.shape[1])
        self.block = zeros(len(first))

    def add(self, slots: Slots, active: Float[torch.Tensor, "row feature"]) -> None:
        """Count a batch; `active` is 1 where a latent is active, else 0."""
        main = next(iter(self.directions.values()))
        vectors, ids, added = (t.to(main.device) for t in (slots.vectors, slots.experts, slots.added))
        self.whole.index_add_(0, ids.flatten(), vectors.flatten(0, 1).double())
        step = max(1, _ROOM // active.shape[1])
        chosen = torch.zeros_like(self.chosen, dtype=torch.float32)
        along = {name: torch.zeros_like(chosen) for name in self.directions}
        block = torch.zeros(active.shape[1], device=main.device)
        for start in range(0, len(active), step):
            at = slice(start, start + step)
            on = active[at]
            block += ((added[at] @ main.T) * on).sum(0)
            for slot in range(ids.shape[1]):
                chosen.index_add_(0, ids[at, slot], on)
                for name, rows in self.directions.items():
                    along[name].index_add_(0, ids[at, slot], (vectors[at, slot] @ rows.T) * on)
        self.chosen += chosen
        self.block += block
        for name, found in along.items():
            self.along[name] += found

    def everywhere(self, name: str) -> Float[torch.Tensor, "expert feature"]:
        """Sum of contributions over all tokens, active or not."""
        return self.whole @ self.directions[name].double().T


@dataclass
class GateTally:
    """What one router does where each latent is active.

    Attributes:
        logits: [feature, choice] sum of logits, centred over a token's choices, over active tokens; `all_logits` over all.
        chosen: [feature, choice] decisions for it on active tokens; `all_chosen` on all.
        rows: [choice, d_model] what a vector in the stream adds to the logits, weighted by tokens; None where that is not known.
    """

    features: int
    n_choices: int
    device: torch.device
    tokens: int = 0
    logits: torch.Tensor = field(init=False)
    chosen: torch.Tensor = field(init=False)
    all_logits: torch.Tensor = field(init=False)
    all_chosen: torch.Tensor = field(init=False)
    rows: torch.Tensor | None = None
    linear: bool = True

    def __post_init__(self) -> None:
        self.logits = torch.zeros(self.features, self.n_choices, dtype=torch.float64, device=self.device)
        self.chosen = torch.zeros_like(self.logits)
        self.all_logits = self.logits.sum(0)
        self.all_chosen = torch.zeros_like(self.all_logits)

    def add(
        self,
        logits: Float[torch.Tensor, "token choice"],
        chosen: Float[torch.Tensor, "token choice"],
        active: Float[torch.Tensor, "token feature"],
        rows: Float[torch.Tensor, "choice d_model"] | None,
    ) -> None:
        """Count a batch; logits centred, `chosen` and `active` 1 or 0."""
        self.tokens += len(logits)
        self.logits += (active.T @ logits).double()
        self.chosen += (active.T @ chosen).double()
        self.all_logits += logits.double().sum(0)
        self.all_chosen += chosen.double().sum(0)
        if rows is None or not self.linear:
            self.rows, self.linear = None, False
            return
        part = rows.double().to(self.device) * len(logits)
        self.rows = part if self.rows is None else self.rows + part

    def weights(self) -> Float[torch.Tensor, "choice d_model"] | None:
        """Rows over all batches, centred over choices."""
        if self.rows is None or not self.tokens:
            return None
        mean = self.rows / self.tokens
        return mean - mean.mean(0)


def centred_choices(
    logits: torch.Tensor, ids: torch.Tensor, n_choices: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits less their mean over a token's choices, and which were chosen, both [token, choice] float32."""
    wide = logits.float().to(device)
    if wide.shape[1] < n_choices:  # null experts that have no logit of their own
        wide = torch.cat([wide, wide.mean(1, keepdim=True).expand(-1, n_choices - wide.shape[1])], 1)
    chosen = torch.zeros(len(wide), wide.shape[1], device=device)
    chosen.scatter_(1, ids.long().to(device), 1.0)
    return wide - wide.mean(1, keepdim=True), chosen
