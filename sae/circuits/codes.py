"""Discrete codes of head outputs: the largest latent of one small sparse autoencoder over all heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch.nn import functional as F

from moescope.core.errors import InputError, RunError

NONE = -1


@dataclass(frozen=True)
class HeadCoder:
    """A small sparse autoencoder over head outputs.

    `a = ReLU((z/s − b) E + e)`, `ẑ = a D + b`, trained on ‖z/s − ẑ‖² + λ Σ a, rows of D of unit length.

    Attributes:
        encoder, bias, centre, scale: E [d_head, code], e [code], b [d_head], s.
        fvu, active: of its training: share of the variance that it leaves, mean number of latents over 0.
    """

    encoder: Float[torch.Tensor, "d_head code"]
    bias: Float[torch.Tensor, " code"]
    centre: Float[torch.Tensor, " d_head"]
    scale: float
    fvu: float
    active: float

    @torch.no_grad()
    def __call__(self, z: Float[torch.Tensor, "prompt head d_head"]) -> NDArray[np.int64]:
        """[prompt, head] the latent that is largest, ties by lower number; −1 where none is over 0."""
        acts = F.relu((z.float() / self.scale - self.centre) @ self.encoder + self.bias)
        top, code = acts.max(-1)
        found: NDArray[np.int64] = torch.where(top > 0, code, NONE).cpu().numpy()
        return found


def train_coder(
    z: Float[torch.Tensor, "prompt head d_head"],
    *,
    codes: int,
    sparsity: float = 0.03,
    steps: int = 500,
    batch: int = 1024,
    rate: float = 3e-3,
    seed: int = 0,
) -> HeadCoder:
    """Train it on the outputs of all heads together.

    Args:
        z: head outputs at the prompts' last tokens.
        codes: latents.
        sparsity: λ, for inputs of unit mean square.
        steps, batch, rate: of training with Adam.
        seed: of weights and order.

    Raises:
        InputError: outputs without any spread.
        RunError: a loss that is not finite.

    Example:
        >>> z = torch.randn(40, 3, 8, generator=torch.Generator().manual_seed(0))
        >>> train_coder(z, codes=16, steps=5)(z).shape
        (40, 3)
    """
    x = z.reshape(-1, z.shape[-1]).float()
    scale = float(x.square().mean().sqrt())
    if not np.isfinite(scale) or scale == 0:
        raise InputError(
            "the heads' outputs cannot be coded", found="all 0" if scale == 0 else "numbers that are not finite"
        )
    x = x / scale
    random = torch.Generator().manual_seed(seed)
    decoder = F.normalize(torch.randn(codes, x.shape[1], generator=random), dim=1).requires_grad_()
    encoder = decoder.detach().T.clone().requires_grad_()
    bias, centre = torch.zeros(codes, requires_grad=True), x.mean(0).clone().requires_grad_()
    weights = [encoder, bias, centre, decoder]
    optimizer = torch.optim.Adam(weights, lr=rate)
    with torch.enable_grad():
        for step in range(steps):
            rows = x[torch.randint(len(x), (min(batch, len(x)),), generator=random)]
            unit = F.normalize(decoder, dim=1)
            acts = F.relu((rows - centre) @ encoder + bias)
            loss = (acts @ unit + centre - rows).square().sum(1).mean() + sparsity * acts.sum(1).mean()
            if step % 50 == 0 and not bool(loss.isfinite()):
                raise RunError("the autoencoder over head outputs did not train", found="a loss that is not finite")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
            optimizer.step()
    with torch.no_grad():
        acts = F.relu((x - centre) @ encoder + bias)
        rest = (acts @ F.normalize(decoder, dim=1) + centre - x).square().sum()
        spread = (x - x.mean(0)).square().sum().clamp(min=1e-12)
        return HeadCoder(
            encoder.detach(),
            bias.detach(),
            centre.detach(),
            scale,
            float(rest / spread),
            float((acts > 0).sum(1).float().mean()),
        )
