"""How an autoencoder does on vectors that training did not see."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float

_PIECE = 4096


@torch.no_grad()
def held_out_measures(
    module: Any, vectors: Float[torch.Tensor, "row component"], widths: tuple[int, int | None]
) -> dict[str, float | int | None]:
    """Explained variance, active latents and silent ones on vectors held out; all None where there are none.

    The explained variance is 1 − Σ‖x − x̂‖² / Σ‖x − mean x‖² over the vectors.

    Args:
        module: SAELens' module for use.
        vectors: [input, target] beside each other for transcoders.
        widths: components of the input and, for a transcoder, of the target.

    Returns:
        `explained_variance`, `mse` (mean squared error of a vector), `l0`, `silent_share` (latents that are active on none of
        them), `vectors`.
    """
    if not len(vectors):
        return {"explained_variance": None, "mse": None, "l0": None, "silent_share": None, "vectors": 0}
    wanted = vectors if widths[1] is None else vectors[:, widths[0] :]
    mean = wanted.double().mean(dim=0)
    error = spread = active = 0.0
    fired = torch.zeros(int(module.cfg.d_sae), dtype=torch.bool)
    for start in range(0, len(vectors), _PIECE):
        piece = vectors[start : start + _PIECE]
        x, target = (piece, piece) if widths[1] is None else (piece[:, : widths[0]], piece[:, widths[0] :])
        acts = module.encode(x)
        # A transcoder with a skip adds it in its forward pass; one that normalises notes the scale when it encodes.
        got = module(x) if widths[1] is not None else module.decode(acts)
        error += float((target.double() - got.double()).pow(2).sum())
        spread += float((target.double() - mean).pow(2).sum())
        active += float((acts > 0).sum())
        fired |= (acts > 0).any(dim=0)
    return {
        "explained_variance": 1 - error / spread if spread else None,
        "mse": error / len(vectors),
        "l0": active / len(vectors),
        "silent_share": float((~fired).float().mean()),
        "vectors": len(vectors),
    }
