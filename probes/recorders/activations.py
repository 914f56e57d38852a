"""Probe `activations`: whole vectors at sites of the user's choice, for a sample of the tokens, in files beside the store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.probe import probe
from moescope.core.sites import EXPERT_INDICES, EXPERT_OUT, EXPERT_POST, EXPERT_WEIGHTS, PATTERN, Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.batches import Batch, Side
from moescope.probes.probe import Arrays, HostBatch, Probe, ProbeContext, Tensors
from moescope.store.coverage import Expectation
from moescope.store.vector_sampling import sampled
from moescope.store.vector_shards import DTYPES, VectorRows
from moescope.store.writer import BatchRecords

# The name under which a site's tensor is handed over, apart from the decision and what accounts for it.
VECTORS = ("resid", "out", "logits", "given", "post", "q", "k", "v", "z")
_NOT_KEPT = {
    PATTERN: "attention is a matrix a head, and is reduced as it passes: record the probe `attention`",
    EXPERT_INDICES: "the decision is in the table `routing`: record the probe `routing`",
    EXPERT_WEIGHTS: "the decision is in the table `routing`: record the probe `routing`",
}
_TOKENS = "SELECT sum(tokens) FROM activations WHERE run_id = $run AND site || ' vectors' = $site"


@probe(name="activations", tables=("activations",))
class ActivationsProbe(Probe):
    """Vectors of the tokens whose hash(seed, sequence, position) is under the share asked for, at each site of the context.

    Inside experts there is a vector for every slot of a sampled token. They are stored as the model computed them, in its own
    type. Which tokens they are is settled on the host before a forward pass, so that nothing is read back from the device.

    Raises:
        InputError: a site whose tensor is no vector of a token.
    """

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        check_vectors_at(context.sites)
        self._shape = (0, 0)
        self._places: NDArray[np.int64] | None = None
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self._dtypes: dict[Site, str] = {}
        self._expected = 0

    def enter(self, batch: Batch, *, step: int, side: Side) -> None:
        """Settle which places of the coming forward pass are sampled."""
        lengths = batch.lengths
        columns = int(lengths.max()) if step == 0 else 1
        place = np.arange(columns)[None, :]
        first = (columns - lengths if side == "left" else np.zeros_like(lengths))[:, None]
        position = place - first if step == 0 else (lengths + step - 1)[:, None]
        real = (position >= 0) & (position < lengths[:, None]) if step == 0 else np.ones_like(position, np.bool_)
        sequence = np.array([[s.sequence_id] for s in batch.sequences])
        kept = real & sampled(self.context.share, self.context.seed, sequence, np.maximum(position, 0))
        self._shape, self._places = kept.shape, np.flatnonzero(kept)
        self._on_device.clear()

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """The sampled tokens' vectors. No host read: the places came from the host."""
        mask = tensors["mask"]
        if self._places is None or tuple(mask.shape) != self._shape:
            return {}  # a pass tried before the run, or one the host knows nothing of: the ledger finds the gap
        if site.tensor == EXPERT_POST and "post" not in tensors:
            return {}
        places = self._places_on(mask.device)
        kept = {"vector_places": places.clone()}
        if site.tensor in (EXPERT_OUT, EXPERT_POST):
            kept["vector_experts"] = tensors["indices"].index_select(0, places)
        if site.tensor == EXPERT_POST:
            vectors, kept["vector_found"] = neurons_of(places, tensors)
        else:
            whole = next(tensors[name] for name in VECTORS if name in tensors).detach()
            in_rows = whole.dim() > 2 and whole.shape[:2] == mask.shape
            vectors = (whole.flatten(0, 1) if in_rows else whole).index_select(0, places)
        self._dtypes[site] = str(vectors.dtype).removeprefix("torch.")
        # NumPy has no bfloat16: its bits go to the host.
        kept["vectors"] = vectors.view(torch.int16) if vectors.dtype == torch.bfloat16 else vectors
        return kept

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """The step's vectors, for the shards."""
        sequence = np.array([s.sequence_id for s in host.batch.sequences])[host.row]
        self._expected += int(sampled(self.context.share, self.context.seed, sequence, host.position).sum())
        number = np.full(host.mask.size, -1, np.int64)
        number[host.real] = host.token
        for site in self.context.sites:
            kept = host.kept.get(site)
            if not kept or "vectors" not in kept:
                continue  # the ledger finds the gap
            rows = self._rows_at(site, kept, number)
            if rows.tokens:
                records.vectors.append(rows)

    def _rows_at(self, site: Site, kept: Arrays, number: NDArray[np.int64]) -> VectorRows:
        token = number[kept["vector_places"]]
        alive = token >= 0  # a sequence that has ended is still fed padding
        token, vectors, experts = token[alive], kept["vectors"][alive], kept.get("vector_experts")
        dtype = self._dtypes[site]
        if dtype not in DTYPES:
            self.context.report(site, f"vectors of {dtype} cannot be stored")
            return VectorRows(str(site), "float32", vectors[:0], token[:0], None, 0)
        if dtype == "bfloat16":
            vectors = vectors.view(np.uint16)
        tokens = len(token)
        if experts is not None:
            experts, k = experts[alive].astype(np.int32).ravel(), vectors.shape[1]
            token, vectors = token.repeat(k), vectors.reshape(-1, *vectors.shape[2:])
            if "vector_found" in kept:
                found = kept["vector_found"][alive].ravel()
                token, vectors, experts = token[found], vectors[found], experts[found]
        return VectorRows(str(site), dtype, vectors, token, experts, tokens)

    def state(self) -> dict[str, Any]:
        """How many tokens were to be kept so far."""
        return {"expected": self._expected}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._expected = int(state.get("expected", 0))

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """Every sampled token at every site."""
        problems = self.context.problems
        return [
            Expectation(f"{site} vectors", self._expected, _TOKENS, problem=problems.get(str(site)))
            for site in self.sites(self.context.anatomy)
        ]

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Those asked for."""
        return list(self.context.sites)

    def _places_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._on_device:
            assert self._places is not None
            places = torch.from_numpy(self._places)
            # From pageable memory CUDA would first wait for everything queued before.
            pinned = places.pin_memory() if device.type == "cuda" else places
            self._on_device[device] = pinned.to(device, non_blocking=True)
        return self._on_device[device]


def check_vectors_at(sites: Iterable[Site]) -> None:
    """Raise `InputError` for a site whose tensor is no vector of a token."""
    for site in sites:
        if site.tensor in _NOT_KEPT:
            raise InputError(f"no vectors are kept at {site}", fix=_NOT_KEPT[site.tensor])


def neurons_of(places: torch.Tensor, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons of every slot of some tokens, [token, k, d_expert], and which slots have any, [token, k]. No host read.

    Args:
        places: row · position places of the tokens.
        tensors: what a tap at `experts.hook_post` hands over.
    """
    ids, post, slot = tensors["indices"], tensors["post"].detach(), tensors["slot"]
    row = torch.full((ids.numel(),), -1, dtype=slot.dtype, device=slot.device)
    row = row.scatter(0, slot, torch.arange(len(slot), device=slot.device)).reshape(ids.shape).index_select(0, places)
    if not len(post):
        return post.new_zeros((*row.shape, post.shape[-1])), row >= 0
    return post[row.clamp(min=0)], row >= 0
