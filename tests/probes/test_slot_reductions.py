"""Reductions over slots and neurons: the kernel for a CPU and the one for every other device, against loops over lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moescope.probes import slot_reductions as under_test
from moescope.probes.slot_reductions import neuron_counts, slot_norms, slot_reductions

# The kernel a CPU takes, and the one of every other device: plain torch, so it can be tried on a CPU.
REDUCE: tuple[Callable[..., Any], ...] = (slot_reductions, slot_reductions._init_fn)
NORMS: tuple[Callable[..., Any], ...] = (slot_norms, slot_norms._init_fn)
COUNT: tuple[Callable[..., Any], ...] = (neuron_counts, neuron_counts._init_fn)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 7),
    k=st.integers(1, 3),
    width=st.integers(1, 5),
    experts=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    coarse=st.booleans(),
    piece=st.sampled_from([1, 8, 1 << 20]),
    seed=st.integers(0, 2**31),
)
def test_slots_reduce_to_what_a_loop_over_them_finds(
    tokens: int, k: int, width: int, experts: int, dtype: torch.dtype, coarse: bool, piece: int, seed: int
) -> None:
    """Whatever order the rows come in, with ids that are no expert's, padding, and ties where values are coarse."""
    random = torch.Generator().manual_seed(seed)
    out = torch.randn(tokens * k, width, generator=random)
    out = (out.round() if coarse else out).to(dtype)
    slot = torch.randperm(tokens * k, generator=random)
    ids = torch.randint(-1, experts + 2, (tokens, k), generator=random)
    mask = torch.rand(tokens, generator=random) < 0.7
    rows = {int(place): row for row, place in enumerate(slot)}
    best: dict[int, tuple[float, int, int]] = {}
    for place in range(tokens * k):
        expert, values = int(ids[place // k, place % k]), out[rows[place]].double().abs().tolist()
        if mask[place // k] and 0 <= expert < experts and max(values) > best.get(expert, (-1.0, 0, 0))[0]:
            best[expert] = (max(values), place, values.index(max(values)))
    norms = [math.hypot(*out[rows[place]].double().tolist()) for place in range(tokens * k)]
    before, size = out.clone(), under_test._PIECE
    under_test._PIECE = piece
    try:
        for kernel, norms_alone in zip(REDUCE, NORMS, strict=True):
            found, largest, winner, channel = kernel(out, slot, ids, mask, experts)
            assert found.tolist() == pytest.approx(norms, rel=1e-5)
            assert torch.equal(norms_alone(out, slot), found)
            for expert in range(experts):
                if expert in best:
                    value, place, at = best[expert]
                    assert float(largest[expert]) == pytest.approx(value, rel=1e-6)
                    if dtype != torch.float64:  # as float32 two of its values may be one
                        assert (int(winner[expert]), int(channel[expert])) == (place, at)
                else:
                    assert float(largest[expert]) == -1
                    assert 0 <= int(winner[expert]) < tokens * k
    finally:
        under_test._PIECE = size
    assert torch.equal(out, before), "the model's own tensor is read, never written"


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    more=st.integers(0, 3),
    width=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    threshold=st.sampled_from([0.0, 0.1, 1.0]),
    piece=st.sampled_from([1, 8, 1 << 20]),
    seed=st.integers(0, 2**31),
)
def test_neurons_are_counted_slot_by_slot(
    rows: int, more: int, width: int, dtype: torch.dtype, threshold: float, piece: int, seed: int
) -> None:
    """Zeros of either sign; slots without neurons, of which nothing is said."""
    random = torch.Generator().manual_seed(seed)
    post = torch.randn(rows, width, generator=random)
    post = (post * (torch.rand(rows, width, generator=random) < 0.6)).to(dtype)  # a negative number times 0 is −0
    slot = torch.randperm(rows + more, generator=random)[:rows]
    limit = float(torch.tensor(threshold))
    expected = [(-1, -1)] * (rows + more)
    for row, place in zip(post.float().tolist(), slot.tolist(), strict=True):
        expected[place] = sum(a == 0 for a in row), sum(abs(a) > limit for a in row)
    before, size = post.clone(), under_test._PIECE
    under_test._PIECE = piece
    try:
        for kernel in COUNT:
            zeros, active = kernel(post, slot, rows + more, threshold)
            assert list(zip(zeros.tolist(), active.tolist(), strict=True)) == expected
    finally:
        under_test._PIECE = size
    assert torch.equal(post, before)


def test_more_neurons_than_sixteen_bits_count() -> None:
    post = torch.zeros(2, 70_000)
    post[0, :3] = 1
    for kernel in COUNT:
        zeros, active = kernel(post, torch.tensor([1, 0]), 2, 0.0)
        assert zeros.tolist() == [70_000, 69_997]
        assert active.tolist() == [0, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("error")
def test_a_value_that_is_no_number_ends_nothing(value: float) -> None:
    out, ids = torch.full((4, 3), value), torch.tensor([[0, 1], [1, 0]])
    for kernel in REDUCE:
        norms, _, winner, channel = kernel(out, torch.arange(4), ids, torch.ones(2, dtype=torch.bool), 2)
        assert not norms.isfinite().any()
        assert 0 <= int(winner.min()) <= int(winner.max()) < 4
        assert 0 <= int(channel.min()) <= int(channel.max()) < 3


def test_the_operators_are_well_behaved() -> None:
    """Shapes and types under tracing are those of the real kernel, and nothing is written to its inputs."""
    slot = torch.randperm(8)
    reduced = (torch.randn(8, 6), slot, torch.randint(0, 3, (4, 2)), torch.ones(4, dtype=torch.bool), 3)
    torch.library.opcheck(slot_reductions, reduced)
    torch.library.opcheck(slot_norms, reduced[:2])
    torch.library.opcheck(neuron_counts, (torch.randn(7, 6), slot[:7], 8, 0.5))


@pytest.mark.parametrize("without_values", [FakeTensorMode, lambda: torch.device("meta")])
def test_the_kernel_of_an_accelerator_reads_nothing_back(without_values: Callable[[], Any]) -> None:
    """Where tensors have no values, a host read has none to give."""
    with without_values():
        slot = torch.zeros(8, dtype=torch.int64)
        ids, mask = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
        out = torch.zeros(8, 6, dtype=torch.bfloat16)
        kept = [*REDUCE[1](out, slot, ids, mask, 3), NORMS[1](out, slot), *COUNT[1](out, slot, 8, 0.1)]
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            bool((out > 0).any())
    assert [tuple(tensor.shape) for tensor in kept] == [(8,), (3,), (3,), (3,), (8,), (8,), (8,)]
