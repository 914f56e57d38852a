"""Which latents fire: how many at once, which never, which nearly always; and how alike their decoder rows are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.sae.autoencoder import Autoencoder
from moescope.sae.judging.controls import in_parts, random_rows
from moescope.sae.judging.rows import ByDocument, MeasureRow, quantiles

DENSE = 0.1
_QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
_COSINES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_SAME = 0.9


@dataclass(frozen=True)
class Firing:
    """Where an autoencoder's latents are over 0.

    Attributes:
        l0: [row] latents active on each vector.
        active: [latent] vectors on which each is active.
    """

    l0: NDArray[np.int64]
    active: NDArray[np.int64]


def firing(autoencoder: Autoencoder, x: Float[torch.Tensor, "row component"]) -> Firing:
    """Encode vectors and count."""
    l0, active = [], torch.zeros(autoencoder.d_sae, dtype=torch.int64)
    for part in in_parts(x, autoencoder.d_sae):
        on = autoencoder.encode(part.to(autoencoder.device)) > 0
        l0.append(on.sum(-1).cpu())
        active += on.sum(0).cpu()
    return Firing(torch.cat(l0).numpy(), active.numpy())


def latent_rows(found: Firing, by_document: ByDocument, summary: Mapping[str, Any]) -> list[MeasureRow]:
    """L0 with its quantiles, the share of latents that never fire on the judged vectors, and of those that fire on over 10 %.

    Args:
        found: on the judged vectors.
        by_document: their documents.
        summary: how training ended, which may hold the share that was dead then (`dead_share`).
    """
    n, latents = len(found.l0), len(found.active)
    ((mean, low, high),) = by_document.means(found.l0[:, None].astype(float))
    rows = [MeasureRow("l0", "sae", mean, n, "latents", low, high)]
    for (name, _), value in zip(
        _QUANTILES.items(), quantiles(found.l0.astype(float), list(_QUANTILES.values())), strict=True
    ):
        rows.append(MeasureRow(f"l0_{name}", "sae", value, n, "latents"))
    rows.append(MeasureRow("dead_share", "sae", float((found.active == 0).mean()), latents, "share of latents"))
    rows.append(MeasureRow("dense_share", "sae", float((found.active > DENSE * n).mean()), latents, "share of latents"))
    trained = summary.get("dead_share")
    if isinstance(trained, (int, float)):
        rows.append(MeasureRow("dead_share_training", "sae", float(trained), latents, "share of latents"))
    return rows


def decoder_rows(autoencoder: Autoencoder, *, seed: int) -> list[MeasureRow]:
    """How close each decoder row's nearest other row is, beside as many random unit vectors of the same width.

    Rows of norm 0 have no direction and are left out. Nothing where fewer than two are left.
    """
    decoder = autoencoder.decoder.float().cpu()
    decoder = decoder[decoder.norm(dim=-1) > 0]
    if len(decoder) < 2:
        return []
    drawn = random_rows(len(decoder), decoder.shape[1], torch.Generator().manual_seed(seed))
    rows = []
    for condition, vectors in (("sae", decoder), ("random_decoder", drawn)):
        nearest = nearest_cosines(vectors)
        rows.append(MeasureRow("max_cosine", condition, float(nearest.mean()), len(nearest), "cosine"))
        for (name, _), value in zip(_COSINES.items(), quantiles(nearest, list(_COSINES.values())), strict=True):
            rows.append(MeasureRow(f"max_cosine_{name}", condition, value, len(nearest), "cosine"))
        share = float((nearest > _SAME).mean())
        rows.append(MeasureRow("twin_share", condition, share, len(nearest), "share of latents"))
    return rows


def nearest_cosines(rows: Float[torch.Tensor, "row component"]) -> NDArray[np.float64]:
    """Largest cosine of each row with another.

    Example:
        >>> nearest_cosines(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])).tolist()
        [1.0, 1.0, 0.0]
    """
    unit = rows / rows.norm(dim=-1, keepdim=True)
    found, start = [], 0
    for part in in_parts(unit, len(unit)):
        cosines = part @ unit.T
        own = torch.arange(len(part))
        cosines[own, start + own] = -torch.inf
        found.append(cosines.amax(-1))
        start += len(part)
    return torch.cat(found).double().numpy()
