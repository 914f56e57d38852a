"""Norms as linear maps: both kinds recognised from outside, anything else refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from moescope.probes.attribution.logit_norms import frozen_norm, identity

WIDTH = 16


def filled(norm: nn.Module) -> nn.Module:
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("norm", "centred"),
    [
        (LlamaRMSNorm(WIDTH), False),
        (Gemma2RMSNorm(WIDTH), False),
        (nn.RMSNorm(WIDTH, elementwise_affine=False), False),
        (nn.LayerNorm(WIDTH), True),
        (nn.LayerNorm(WIDTH, bias=False), True),
        (nn.LayerNorm(WIDTH, elementwise_affine=False), True),
        (nn.Identity(), False),
    ],
)
@torch.no_grad()
def test_norms_are_recognised_and_their_scale_frozen(norm: nn.Module, centred: bool, dtype: torch.dtype) -> None:
    norm = filled(norm).to(dtype)
    random = torch.Generator().manual_seed(1)
    x = (torch.randn(5, WIDTH, generator=random) * torch.tensor([0.1, 1, 10, 100, 3.0])[:, None] + 0.5).to(dtype)
    y = norm(x)
    found = frozen_norm(norm, x, y)
    assert found is not None
    assert found.centred is centred
    scale = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found(x), y.double(), atol=scale * float(y.abs().max()), rtol=0)
    # d · (y − bias) = back(d) · x for any direction, and linear in x: the parts of x make up the whole
    directions = torch.randn(5, 3, WIDTH, generator=random, dtype=torch.float64)
    back = found.back(directions)
    wanted = torch.einsum("ptd,pd->pt", directions, found(x) - found.bias)
    torch.testing.assert_close(torch.einsum("ptd,pd->pt", back, x.double()), wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "other", [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Tanh(), nn.Softmax(-1), nn.GroupNorm(4, WIDTH)]
)
@torch.no_grad()
def test_anything_else_is_none(other: nn.Module) -> None:
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    assert frozen_norm(other, x, other(x)) is None


def test_identity_leaves_everything() -> None:
    x = torch.randn(3, WIDTH)
    assert torch.equal(identity(x)(x), x.double())
