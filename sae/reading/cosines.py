"""Latents whose decoder rows point the same way, in one autoencoder and between two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.sae.autoencoder import Autoencoder
from moescope.sae.reading.run_text import Ints

_BLOCK = 1024


@dataclass(frozen=True)
class Neighbours:
    """Pairs of latents by the cosine of their decoder rows.

    Attributes:
        first, second: [pair] latents; `second` of the other autoencoder.
        value: [pair] cosine.
        null: what random directions would have: the mean of the same for directions drawn at random.
    """

    first: Ints
    second: Ints
    value: NDArray[np.float32]
    null: float


@torch.no_grad()
def neighbours(autoencoder: Autoencoder, other: Autoencoder, *, top: int, seed: int = 0) -> Neighbours:
    """The `top` latents of another autoencoder (or of the same, itself left out) nearest to each latent by decoder cosine.

    The null has as many random directions in the place of the other decoder: the mean cosine of the nearest of them.
    """
    ours, theirs = _directions(autoencoder), _directions(other).to(autoencoder.device)
    top = min(top, len(theirs) - (other is autoencoder))
    random = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed)).to(theirs.device)
    drawn = torch.nn.functional.normalize(random, dim=-1)
    values, ids, nulls = [], [], []
    for start in range(0, len(ours), _BLOCK):
        block = ours[start : start + _BLOCK]
        cosine = block @ theirs.T
        if other is autoencoder:
            rows = torch.arange(len(block), device=cosine.device)
            cosine[rows, rows + start] = -2.0
        found = cosine.topk(top, 1)
        values.append(found.values.cpu())
        ids.append(found.indices.cpu())
        nulls.append((block @ drawn.T).max(1).values.cpu())
    first = np.repeat(np.arange(len(ours)), top)
    return Neighbours(
        first, torch.cat(ids).flatten().numpy(), torch.cat(values).flatten().numpy(), float(torch.cat(nulls).mean())
    )


@torch.no_grad()
def splits(smaller: Autoencoder, larger: Autoencoder, *, least: float = 0.5, seed: int = 0) -> Neighbours:
    """Latents of a larger autoencoder under the latent of a smaller one that they are nearest to (feature splitting).

    A latent of the larger one belongs to the latent of the smaller one of largest decoder cosine, where that is at least
    `least` (Towards Monosemanticity, transformer-circuits.pub/2023/monosemantic-features, by cosine as in arXiv 2408.00657).
    `first` is of the smaller one.
    """
    found = neighbours(larger, smaller, top=1, seed=seed)
    near = found.value >= least
    order = np.argsort(found.second[near], kind="stable")
    return Neighbours(found.second[near][order], found.first[near][order], found.value[near][order], found.null)


def _directions(autoencoder: Autoencoder) -> Float[torch.Tensor, "latent component"]:
    return torch.nn.functional.normalize(autoencoder.decoder.float(), dim=-1)
