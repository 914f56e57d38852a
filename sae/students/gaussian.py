"""Gaussian inputs with the mean and covariance of the real ones: all that a second-order view of them knows."""

from __future__ import annotations

import torch
from jaxtyping import Float


def moments(
    x: Float[torch.Tensor, "vector component"],
) -> tuple[Float[torch.Tensor, " component"], Float[torch.Tensor, "component component"]]:
    """Mean and covariance in float64.

    Example:
        >>> mean, covariance = moments(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> mean.tolist(), covariance.tolist()
        ([1.0, 1.0], [[1.0, 0.0], [0.0, 0.0]])
    """
    wide = x.double()
    mean = wide.mean(0)
    centred = wide - mean
    return mean, centred.T @ centred / len(x)


def gaussian_like(
    mean: Float[torch.Tensor, " component"],
    covariance: Float[torch.Tensor, "component component"],
    count: int,
    *,
    seed: int = 0,
) -> Float[torch.Tensor, "vector component"]:
    """Draws of N(mean, covariance) in float32, by the covariance's eigenvectors: it may be singular.

    Example:
        >>> x = gaussian_like(torch.tensor([3.0, 0.0]), torch.tensor([[4.0, 2.0], [2.0, 1.0]]), 20_000)
        >>> [round(float(v), 1) for v in (x[:, 0].mean(), x[:, 0].std(), x[:, 1].std())]
        [3.0, 2.0, 1.0]
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    drawn: torch.Tensor = (mean.double() + (noise * values.clamp(min=0).sqrt()) @ vectors.T).float()
    return drawn
