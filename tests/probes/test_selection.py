"""Medians and largest channels: the kernel for a CPU and the one for every other device, against sorted lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probes.selection import largest_and_median

# The kernel a CPU takes, and the one of every other device: plain torch, so it can be tried on a CPU.
KERNELS: tuple[Callable[..., Any], ...] = (largest_and_median, largest_and_median._init_fn)


def largest(kernel: Callable[..., Any], stream: torch.Tensor, count: int) -> torch.Tensor:
    return kernel(stream, torch.ones(stream.shape[:2], dtype=torch.bool), count)[0]


def medians(kernel: Callable[..., Any], stream: torch.Tensor, mask: torch.Tensor) -> list[float]:
    return kernel(stream, mask, 1)[1].tolist()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    width=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    left=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_median_is_the_lower_one_of_a_rows_real_tokens(
    lengths: list[int], width: int, dtype: torch.dtype, left: bool, seed: int
) -> None:
    """Whichever side is padded, and whatever stands there."""
    stream = torch.randn(len(lengths), 5, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mask = torch.arange(5)[None, :] < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    stream[~mask] = torch.inf
    expected = []
    for row, real in zip(stream.float().abs(), mask, strict=True):
        values = sorted(row[real].flatten().tolist())
        expected.append(values[(len(values) - 1) // 2])
    before = stream.clone()
    for kernel in KERNELS:
        assert medians(kernel, stream, mask) == expected
    assert torch.equal(stream, before)


def test_a_row_without_real_tokens_has_no_median() -> None:
    stream, mask = torch.ones(2, 3, 4), torch.tensor([[True] * 3, [False] * 3])
    for kernel in KERNELS:
        first, second = medians(kernel, stream, mask)
        assert first == 1
        assert math.isnan(second)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(3, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    distinct=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_largest_channels_are_those_of_the_largest_magnitudes(
    width: int, dtype: torch.dtype, distinct: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (2, 3, width)
    stream = (torch.randn(shape, generator=random) if distinct else torch.randint(-2, 3, shape, generator=random)).to(
        dtype
    )
    before = stream.clone()
    for kernel in KERNELS:
        channels = largest(kernel, stream, 3)
        assert channels.shape == (2, 3, 3)
        found = stream.gather(-1, channels).abs().flatten(0, 1).tolist()
        assert found == [sorted(row, reverse=True)[:3] for row in stream.abs().flatten(0, 1).tolist()]
        assert all(len(set(row)) == 3 for row in channels.flatten(0, 1).tolist())
    assert torch.equal(stream, before), "the model's own tensor is read, never written"
    for row, channels in zip(stream.flatten(0, 1), largest(largest_and_median, stream, 3).flatten(0, 1), strict=True):
        ranked = sorted(range(width), key=lambda channel: (-abs(float(row[channel])), channel))
        assert channels.tolist() == ranked[:3], "on a CPU, ties go to the lower channel"


def test_the_operator_is_well_behaved() -> None:
    """Shapes and types under tracing are those of the real kernel, and nothing is written to its inputs."""
    torch.library.opcheck(largest_and_median, (torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool), 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_ends_nothing(value: float) -> None:
    stream, mask = torch.full((1, 2, 4), value), torch.ones(1, 2, dtype=torch.bool)
    for kernel in KERNELS:
        channels, found = kernel(stream, mask, 3)
        assert found.shape == (1,)
        assert 0 <= int(channels.min()) <= int(channels.max()) < 4


def test_a_view_of_the_models_own_tensor_is_not_written_to() -> None:
    """Neither where it is contiguous nor where it is a slice of something larger."""
    whole = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).abs()
    before = whole.clone()
    for stream in (whole, whole[..., ::2], whole.transpose(0, 1)):
        for kernel in KERNELS:
            kernel(stream, torch.ones(stream.shape[:2], dtype=torch.bool), 3)
    assert torch.equal(whole, before)
