"""How often latents are active: from the store where they were counted, else from the unedited model on a part of the corpus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.sites import Site
from moescope.probes.batches import Batch
from moescope.probes.forward import logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.taps import tapped
from moescope.store.store import Store

Rates = Mapping[str, NDArray[np.float64]]
_ENOUGH = 16_384  # tokens; a latent of a thousandth is then active on sixteen

_COUNTED = """
    SELECT feature, sum(active)::DOUBLE / sum(tokens) AS rate
    FROM features
    WHERE sae_id = ?
    GROUP BY feature
    ORDER BY feature
"""


def latent_rates(
    model: LiveModel, batches: Iterable[Batch], store: Store, autoencoders: Mapping[str, Any], *, tokens: int = _ENOUGH
) -> dict[str, NDArray[np.float64]]:
    """Name of an autoencoder → share of tokens on which each latent is active.

    Args:
        model: unedited.
        batches: of the corpus; so many are run as hold `tokens` tokens.
        store: the table `features` is asked first.
        autoencoders: by name.
        tokens: enough to count on.
    """
    found = {name: rates for name, a in autoencoders.items() if (rates := _stored(store, a)) is not None}
    left = {name: a for name, a in autoencoders.items() if name not in found}
    return found | (_counted(model, batches, left, tokens) if left else {})


def _stored(store: Store, autoencoder: Any) -> NDArray[np.float64] | None:
    """Shares of the table `features`, where all latents are in it."""
    sae_id = getattr(autoencoder, "sae_id", None)
    rows = store.fetch(_COUNTED, [sae_id]) if sae_id else []
    n = len(autoencoder.decoder)
    return np.array([rate for _, rate in rows], np.float64) if [i for i, _ in rows] == list(range(n)) else None


@torch.no_grad()
def _counted(
    model: LiveModel, batches: Iterable[Batch], autoencoders: Mapping[str, Any], tokens: int
) -> dict[str, NDArray[np.float64]]:
    sums = {name: torch.zeros(len(a.decoder), dtype=torch.int64) for name, a in autoencoders.items()}
    masks: list[torch.Tensor] = []

    def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
        vectors = next(iter(tensors.values()))
        for name, a in autoencoders.items():
            if a.site == site:
                rows = vectors.reshape(masks[0].numel(), -1)[masks[0].flatten().to(vectors.device)]
                sums[name] += (a.encode(rows.to(a.decoder.device)) > 0).sum(0).cpu()

    seen = 0
    with tapped(model.module, model.anatomy, list({a.site for a in autoencoders.values()}), receive):
        for batch in batches:
            masks[:] = [to_device(batch, model).mask]
            logits_of(model, to_device(batch, model))
            seen += batch.tokens
            if seen >= tokens:
                break
    return {name: total.numpy() / max(seen, 1) for name, total in sums.items()}
