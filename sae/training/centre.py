"""What is found on a sample before training: the geometric median, and the scale of vectors."""

from __future__ import annotations

import torch
from jaxtyping import Float

_ROUNDS, _CLOSE = 100, 1e-5


@torch.no_grad()
def geometric_median(vectors: Float[torch.Tensor, "row component"]) -> Float[torch.Tensor, " component"]:
    """The point whose distances to all vectors have the least sum, by Weiszfeld's iteration.

    Few vectors of enormous norm do not move it, which is why a decoder's bias begins there (Bricken et al. 2023; Gao et al.
    2024). It stops where a step moves it by less than 1e-5 of its distance to the vectors, or after 100 steps.

    Args:
        vectors: finite.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0], [1.0, 1e6]])
        >>> [round(x) for x in geometric_median(points).tolist()]
        [1, 3]
    """
    x = vectors.double()
    found = x.mean(dim=0)
    for _ in range(_ROUNDS):
        distance = (x - found).norm(dim=-1).clamp(min=1e-12)
        weight = 1 / distance
        moved = (weight[:, None] * x).sum(dim=0) / weight.sum()
        step = float((moved - found).norm())
        found = moved
        if step <= _CLOSE * float(distance.median()):
            break
    return found.to(vectors.dtype)


@torch.no_grad()
def scale_to_width(vectors: Float[torch.Tensor, "row component"]) -> float:
    """The number that makes the vectors' mean norm the root of their width, as SAELens estimates it.

    Example:
        >>> scale_to_width(torch.full((3, 4), 2.0))
        0.5
    """
    norm = float(vectors.float().norm(dim=-1).double().mean())
    return float(vectors.shape[-1] ** 0.5 / norm)
