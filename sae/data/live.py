"""Vectors at sites while a model runs: one forward pass, the real tokens, and where in their texts they stand."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from moescope.core.errors import RunError
from moescope.core.sites import EXPERT_OUT, EXPERT_POST, Site
from moescope.probes.batches import Batch, Side
from moescope.probes.forward import logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.recorders.activations import VECTORS, check_vectors_at, neurons_of
from moescope.probes.stopping import run_until, why_no_stop
from moescope.probes.taps import tapped

SLOT_SITES = (EXPERT_OUT, EXPERT_POST)


@dataclass(frozen=True, eq=False)
class SiteVectors:
    """What passed one site: a row for each token that counts, or for each of its slots inside experts.

    Attributes:
        vectors: [row, width] in the model's own type, on the device where that layer runs; heads side by side.
        token: [row] which token of the pass, on the same device.
        heads: how many heads lie side by side; None at a site without heads.
        expert, slot, weight: [row] at sites inside experts: id, column of the decision, and weight as given to the experts;
            None elsewhere.
    """

    vectors: Float[torch.Tensor, "row width"]
    token: Int[torch.Tensor, " row"]
    heads: int | None = None
    expert: Int[torch.Tensor, " row"] | None = None
    slot: Int[torch.Tensor, " row"] | None = None
    weight: Float[torch.Tensor, " row"] | None = None

    def of_expert(self, expert: int | None) -> SiteVectors:
        """The rows of one expert; of all where None."""
        if expert is None or self.expert is None:
            return self
        return self._rows((self.expert == expert).nonzero().flatten())

    def of_head(self, head: int | None) -> SiteVectors:
        """The part of each vector that is one head's; of all where None."""
        if head is None or self.heads is None:
            return self
        width = self.vectors.shape[1] // self.heads
        return replace(self, vectors=self.vectors[:, head * width : (head + 1) * width], heads=None)

    def _rows(self, rows: torch.Tensor) -> SiteVectors:
        picked = {
            name: None if tensor is None else tensor.index_select(0, rows)
            for name, tensor in (("expert", self.expert), ("slot", self.slot), ("weight", self.weight))
        }
        vectors, token = self.vectors.index_select(0, rows), self.token.index_select(0, rows)
        return SiteVectors(vectors, token, self.heads, **picked)


@dataclass(frozen=True, eq=False)
class LivePass:
    """One forward pass, of the tokens that count: real ones from a position on, text by text.

    Attributes:
        batch: what ran.
        row: [token] row of the batch, on the host.
        sequence, position, document, token_id: [token] ids and places, on the host.
        sites: site → what passed it.
        logits: [row, position, vocabulary] where they were asked for; padding lies at the side of the pass.
    """

    batch: Batch
    row: NDArray[np.int64]
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    document: NDArray[np.int64]
    token_id: NDArray[np.int64]
    sites: dict[Site, SiteVectors]
    logits: Float[torch.Tensor, "row position vocabulary"] | None

    def __getitem__(self, site: Site | str) -> SiteVectors:
        return self.sites[Site.parse(site) if isinstance(site, str) else site]

    def __len__(self) -> int:
        return len(self.row)


@torch.no_grad()
def site_vectors(
    model: LiveModel,
    batch: Batch,
    sites: Collection[Site | str],
    *,
    first: int = 0,
    logits: bool = False,
    side: Side = "right",
) -> LivePass:
    """Run a batch and keep the vectors of its real tokens at some sites, where the model has them.

    Without `logits` the pass ends with the last block that a site needs. Edits that are in force when it is called take part.
    Nothing is read back to the host while the model runs.

    Args:
        model: what runs.
        batch: its sequences, for instance of `run_batches`.
        sites: of the stream, of what is added to it, of heads, of MLPs' inputs and neurons, of experts' outputs and neurons, or
            router logits.
        first: tokens before this position of their sequence do not count.
        logits: run to the end and give the logits too.
        side: where shorter sequences are filled up.

    Raises:
        InputError: a site that the model does not have, or that has no vectors of tokens (decisions, attention patterns).
        RunError: a site that no tensor passed.

    Example:
        >>> import moescope as ms
        >>> from moescope.probes.batches import BatchPlan
        >>> model = ms.load("demo")
        >>> batch = next(iter(BatchPlan(ms.Corpus.load(["Hello world."]), model.tokenizer, 1, 64)))
        >>> found = site_vectors(model, batch, ["blocks.2.mlp.experts.hook_out"], first=1)
        >>> slots = found["blocks.2.mlp.experts.hook_out"]
        >>> len(slots.vectors) == 2 * len(found) == 2 * (batch.tokens - 1)
        True
    """
    asked = tuple(dict.fromkeys(Site.parse(site) if isinstance(site, str) else site for site in sites))
    check_vectors_at(asked)
    ids, mask = batch.padded(model.pad_id, side=side)
    row, column = np.nonzero(mask)
    position = column - (mask.argmax(1)[row] if side == "left" else 0)
    counts = position >= first
    row, column, position = row[counts], column[counts], position[counts]
    keeper = _Keeper(torch.from_numpy(row * mask.shape[1] + column), mask.shape)
    on_device = to_device(batch, model, side=side)
    found = None
    with tapped(model.module, model.anatomy, asked, keeper.receive):
        if logits or not asked or why_no_stop(model) is not None:
            found = logits_of(model, on_device)
        else:
            run_until(model, on_device, max(site.layer for site in asked))
    if missing := [site for site in asked if site not in keeper.kept]:
        raise RunError(f"nothing passed at {missing[0]}", fix="leave this site out")
    sequences = batch.sequences
    numbers = [np.array([getattr(s, name) for s in sequences])[row] for name in ("sequence_id", "document_id")]
    return LivePass(
        batch,
        row,
        numbers[0],
        position,
        numbers[1],
        ids[row, column],
        {site: keeper.vectors_at(site) for site in asked},
        found if logits else None,
    )


class _Keeper:
    """Keeps the rows of the tokens that count, as they pass; slots without neurons are left out when the pass is over."""

    def __init__(self, places: torch.Tensor, shape: tuple[int, ...]) -> None:
        self._places, self._shape = places, shape
        self._on: dict[torch.device, torch.Tensor] = {}
        self.kept: dict[Site, dict[str, Any]] = {}

    def receive(self, site: Site, tensors: dict[str, torch.Tensor]) -> None:
        """A tap's receiver. No host read."""
        if site.tensor == EXPERT_POST and "post" not in tensors:
            return
        places = self._on_device(next(iter(tensors.values())).device)
        kept: dict[str, Any] = {}
        if site.tensor in SLOT_SITES:
            kept = {name: tensors[name].index_select(0, places) for name in ("indices", "weights")}
        if site.tensor == EXPERT_POST:
            kept["vectors"], kept["found"] = neurons_of(places, tensors)
        else:
            whole = next(tensors[name] for name in VECTORS if name in tensors).detach()
            in_rows = whole.dim() > 2 and tuple(whole.shape[:2]) == self._shape
            kept["vectors"] = (whole.flatten(0, 1) if in_rows else whole).index_select(0, places)
        self.kept[site] = kept

    def vectors_at(self, site: Site) -> SiteVectors:
        """What was kept, as rows."""
        kept = self.kept[site]
        vectors = kept["vectors"]
        token = torch.arange(len(vectors), device=vectors.device)
        if site.tensor not in SLOT_SITES:
            heads = vectors.shape[1] if vectors.dim() == 3 else None
            return SiteVectors(vectors.flatten(1), token, heads)
        k = vectors.shape[1]
        found = SiteVectors(
            vectors.flatten(0, 1),
            token.repeat_interleave(k),
            None,
            kept["indices"].flatten(),
            torch.arange(k, device=vectors.device).repeat(len(vectors)),
            kept["weights"].flatten(),
        )
        return found if "found" not in kept else found._rows(kept["found"].flatten().nonzero().flatten())

    def _on_device(self, device: torch.device) -> torch.Tensor:
        if device not in self._on:
            places = self._places.pin_memory() if device.type == "cuda" else self._places
            self._on[device] = places.to(device, non_blocking=True)
        return self._on[device]
