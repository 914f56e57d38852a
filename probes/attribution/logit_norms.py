"""A norm as a linear map whose scale is held at what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import nn

Vectors = Float[torch.Tensor, "token d_model"]
# Norms compute in float32 in wider types too.
_AGREEMENT = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def tolerance(dtype: torch.dtype) -> float:
    """How far, against the largest, two ways to compute the same tensor may lie apart in a type."""
    return _AGREEMENT.get(dtype, 1e-4)


@dataclass(frozen=True)
class FrozenNorm:
    """y = scale · gain · (x − share · mean x) + bias, one scale a token; a norm with its scale held fixed.

    Attributes:
        gain, bias: of each channel.
        centred: whether the mean over the channels is taken off first (LayerNorm; not RMSNorm).
        scale: of each token: 1 over the root mean square or the standard deviation.
    """

    gain: Float[torch.Tensor, " d_model"]
    bias: Float[torch.Tensor, " d_model"]
    centred: bool
    scale: Float[torch.Tensor, " token"]

    def back(self, directions: Float[torch.Tensor, "token target d_model"]) -> torch.Tensor:
        """Directions d with d · (y − bias) = back(d) · x."""
        found = directions * self.gain * self.scale[:, None, None]
        return found - found.mean(-1, keepdim=True) if self.centred else found

    def __call__(self, x: Vectors) -> Vectors:
        """The map applied."""
        wide = x.double()
        wide = wide - wide.mean(-1, keepdim=True) if self.centred else wide
        return self.scale[:, None] * self.gain * wide + self.bias


@torch.no_grad()
def frozen_norm(norm: nn.Module | Callable[[torch.Tensor], torch.Tensor], x: Vectors, y: Vectors) -> FrozenNorm | None:
    """What a norm did to x to give y, with its scale frozen; found by trying the module on a few vectors.

    Works for RMSNorm and LayerNorm in all their spellings (weight, 1 + weight, without weights). Whether the map is one is
    checked on x and y themselves.

    Args:
        norm: the module.
        x, y: what it was given and gave.

    Returns:
        None where the module is no such norm.

    Example:
        >>> x = torch.randn(3, 8)
        >>> norm = nn.LayerNorm(8)
        >>> found = frozen_norm(norm, x, norm(x))
        >>> found.centred, bool(torch.allclose(found(x).float(), norm(x), atol=1e-5))
        (True, True)
    """
    width = x.shape[-1]
    if y.shape != x.shape or width % 2:
        return None
    signs = torch.ones(width, dtype=x.dtype, device=x.device)
    signs[1::2] = -1  # mean 0, mean square 1: either kind of norm gives gain · signs + bias
    signs = signs * 1024  # against which an epsilon vanishes
    plus, minus = (_tried(norm, vector) for vector in (signs, -signs))
    if plus is None or minus is None:
        return None
    bias, gain = (plus + minus) / 2, (plus - minus) / 2 * signs.sign().double()
    centred = _tried(norm, torch.full_like(signs, 1024.0))
    if centred is None:
        return None
    is_centred = bool((centred - bias).abs().max() < 0.1 * gain.abs().max())  # LayerNorm gives its bias for a constant
    wide = x.double()
    wide = wide - wide.mean(-1, keepdim=True) if is_centred else wide
    unscaled, found = wide * gain, y.double() - bias
    scale = (unscaled * found).sum(-1) / unscaled.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    result = FrozenNorm(gain, bias, is_centred, scale)
    far = (result(x) - y.double()).abs().max()
    return result if bool(far <= tolerance(y.dtype) * y.abs().max()) else None


def identity(x: Vectors) -> FrozenNorm:
    """The map that leaves everything as it is."""
    ones = torch.ones(x.shape[-1], dtype=torch.float64, device=x.device)
    return FrozenNorm(ones, torch.zeros_like(ones), False, torch.ones(len(x), dtype=torch.float64, device=x.device))


def _tried(norm: nn.Module | Callable[[torch.Tensor], torch.Tensor], vector: torch.Tensor) -> torch.Tensor | None:
    """What a module gives for one vector; its hooks are left out."""
    forward = norm.forward if isinstance(norm, nn.Module) else norm
    held = next(norm.parameters(), vector) if isinstance(norm, nn.Module) else vector
    try:
        out = forward(vector.to(held.device)[None, None])
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return (
        out.double().reshape(-1).to(vector.device)
        if isinstance(out, torch.Tensor) and out.numel() == vector.numel()
        else None
    )
