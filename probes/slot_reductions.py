"""What is kept of every expert's output and neurons, as operators: torch's on an accelerator, a pass in pieces on a CPU.

A CPU spends its time fetching these tensors from memory, so each is fetched once, in pieces that fit its cache, and a piece is
widened to float32 there. As registered operators they also run under fake tensors and in compiled models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_PIECE = 1 << 20  # numbers in a piece: 4 MiB in float32, the fastest of 64 KiB to 64 MiB
_NARROW = (torch.bfloat16, torch.float16)


@torch.library.custom_op("moescope::slot_reductions", mutates_args=())
def slot_reductions(
    out: torch.Tensor, slot: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm of every slot's output; for every expert its largest |output|, with slot and channel.

    Args:
        out: [token · k, d_model], in any order.
        slot: [token · k], which place of token · k each row of `out` is.
        ids: [token, k], expert ids; those that are no expert count for none.
        mask: [token], real tokens; padding never holds a maximum.
        experts: how many experts there are.

    Returns:
        L2 norms [token · k] in float32, by place; and by expert, [experts]: the largest |output| in float32 (−1 where no
        real token chose it), the place of the slot that holds it (the first of equals), and its channel, as int64.
    """
    slots = ids.numel()
    norms, peaks = (out.new_empty(slots, dtype=torch.float32) for _ in range(2))
    norms[slot] = _norms(out)
    peaks[slot] = torch.maximum(out.amax(-1), -out.amin(-1)).float()
    expert = _expert_of(ids, experts)
    peaks = torch.where(mask.reshape(-1, 1).expand(-1, ids.shape[1]).reshape(-1), peaks, -1.0)
    largest = torch.full((experts + 1,), -1.0, device=out.device).scatter_reduce(0, expert, peaks, "amax")
    number = torch.arange(slots, device=out.device)
    first = torch.where(peaks == largest[expert], number, slots)
    winner = torch.full((experts + 1,), slots, device=out.device).scatter_reduce(0, expert, first, "amin")
    winner = winner[:experts].clamp(max=slots - 1)
    row = torch.empty_like(number).scatter(0, slot, number)
    return norms, largest[:experts].clone(), winner, out[row[winner]].abs().argmax(-1)


@slot_reductions.register_kernel("cpu")
def _slots_on_cpu(
    out: torch.Tensor, slot: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    slots = ids.numel()
    norm, top, bottom = torch.empty(3, len(out))
    for start, stop, piece in _pieces(out):
        torch.linalg.vector_norm(piece, dim=-1, out=norm[start:stop])
        torch.amax(piece, -1, out=top[start:stop])
        torch.amin(piece, -1, out=bottom[start:stop])
    norms, peaks = torch.empty(slots), torch.empty(slots)
    norms[slot] = norm
    peaks[slot] = torch.maximum(top, -bottom)
    peak = peaks.masked_fill(~mask.reshape(-1).repeat_interleave(ids.shape[1]), -1.0).numpy()
    expert = _expert_of(ids, experts).numpy()
    largest = np.full(experts + 1, -1.0, np.float32)
    with np.errstate(invalid="ignore"):  # NaN is told of from the norms
        np.maximum.at(largest, expert, peak)
    best = np.flatnonzero(peak == largest[expert])
    winner = np.full(experts + 1, slots - 1, np.int64)
    np.minimum.at(winner, expert[best], best)
    row = torch.empty_like(slot)
    row[slot] = torch.arange(slots)
    places = torch.from_numpy(winner[:experts])
    channel = out[row[places]].abs().argmax(-1)
    return norms, torch.from_numpy(largest[:experts].copy()), places, channel


@slot_reductions.register_fake
def _fake_slots(
    out: torch.Tensor, slot: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del slot, mask
    places = out.new_empty((2, experts), dtype=torch.int64)
    norms, largest = (out.new_empty(n, dtype=torch.float32) for n in (ids.numel(), experts))
    return norms, largest, places[0].clone(), places[1].clone()


@torch.library.custom_op("moescope::slot_norms", mutates_args=())
def slot_norms(out: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """L2 norms [token · k] in float32, by place: those of `slot_reductions`, to the bit, alone."""
    norms = out.new_empty(len(out), dtype=torch.float32)
    norms[slot] = _norms(out)
    return norms


@slot_norms.register_kernel("cpu")
def _norms_on_cpu(out: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    norm, norms = torch.empty(len(out)), torch.empty(len(out))
    for start, stop, piece in _pieces(out):
        torch.linalg.vector_norm(piece, dim=-1, out=norm[start:stop])
    norms[slot] = norm
    return norms


@slot_norms.register_fake
def _fake_norms(out: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    del slot
    return out.new_empty(len(out), dtype=torch.float32)


@torch.library.custom_op("moescope::neuron_counts", mutates_args=())
def neuron_counts(
    post: torch.Tensor, slot: torch.Tensor, slots: int, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many neurons of each slot are exactly zero, and how many lie over a threshold.

    Args:
        post: [row, d_expert], in any order.
        slot: [row], which of the places each row is.
        slots: how many places there are.
        threshold: of |neuron|.

    Returns:
        Counts of zeros and of |neuron| > threshold, [slots] as int32, −1 where a slot has no neurons.
    """
    zeros, active = (slot.new_full((slots,), -1, dtype=torch.int32) for _ in range(2))
    zeros[slot] = (post == 0).sum(-1, dtype=torch.int32)
    active[slot] = (post.abs().float() > threshold).sum(-1, dtype=torch.int32)
    return zeros, active


@neuron_counts.register_kernel("cpu")
def _neurons_on_cpu(
    post: torch.Tensor, slot: torch.Tensor, slots: int, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = post.shape[-1]
    counts = np.full((2, slots), -1, np.int32)
    rows = slot.numpy()
    for start, stop, piece in _pieces(post, widen=threshold > 0):
        values: NDArray[Any] = _magnitude_bits(piece) if threshold <= 0 else np.abs(piece.numpy())
        zeros = _count(values == 0)
        counts[0, rows[start:stop]] = zeros
        # NaN, whose comparison with any threshold is false, is told of elsewhere.
        counts[1, rows[start:stop]] = _count(values > threshold) if threshold > 0 else width - zeros
    return torch.from_numpy(counts[0].copy()), torch.from_numpy(counts[1].copy())


@neuron_counts.register_fake
def _fake_neurons(
    post: torch.Tensor, slot: torch.Tensor, slots: int, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    del slot, threshold
    return post.new_empty(slots, dtype=torch.int32), post.new_empty(slots, dtype=torch.int32)


def _norms(out: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(
        out.float() if out.dtype == torch.float64 else out, dim=-1, dtype=torch.float32
    )
    return norms


def _expert_of(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Expert of each place; ids that are none go to a bucket of their own, so that a wrong id cannot end the run."""
    flat = ids.reshape(-1)
    return torch.where((flat < 0) | (flat >= experts), experts, flat)


def _pieces(values: torch.Tensor, *, widen: bool = True) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Rows in pieces: first, one past the last, and the piece, in float32 where it is `widen`ed."""
    rows = max(1, _PIECE // max(1, values.shape[-1]))
    widen = widen and values.dtype != torch.float32
    buffer = torch.empty(min(rows, len(values)), values.shape[-1]) if widen else values
    for start in range(0, len(values), rows):
        piece = values[start : start + rows]
        yield start, start + len(piece), buffer[: len(piece)].copy_(piece) if widen else piece


def _magnitude_bits(piece: torch.Tensor) -> NDArray[np.generic]:
    """An array that is zero exactly where the piece is; NumPy has no bfloat16, and knows float16 only slowly."""
    if piece.dtype in _NARROW:
        bits: NDArray[np.generic] = piece.view(torch.int16).numpy() & np.int16(0x7FFF)
        return bits
    return piece.numpy()


def _count(flags: NDArray[np.bool_]) -> NDArray[np.integer]:
    narrow = np.uint16 if flags.shape[-1] < 1 << 16 else np.uint32
    found: NDArray[np.integer] = np.add.reduce(flags.view(np.uint8), axis=-1, dtype=narrow)
    return found
