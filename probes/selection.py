"""Selections over the residual stream as one operator: torch's on an accelerator, NumPy's on a CPU.

NumPy selects a median some fifteen times faster than torch on a CPU, and a largest entry twice as fast, where reading on
the host costs nothing. As a registered operator it also runs under fake tensors, so that taps can be proven free of host
reads.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


@torch.library.custom_op("moescope::largest_and_median", mutates_args=())
def largest_and_median(stream: torch.Tensor, mask: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of the largest |x| at each position, and the median |x| of each row.

    Args:
        stream: [row, position, d_model].
        mask: [row, position], real tokens.
        count: how many channels at each position.

    Returns:
        Channels [row, position, count] as int64, largest first (on a CPU ties go to the lower channel); and [row] in float32
        the lower median of |x| over the row's real tokens and all channels, NaN for a row without real tokens.
    """
    magnitudes = stream.abs().float()
    channels = magnitudes.topk(count, dim=-1).indices
    medians = magnitudes.masked_fill(~mask.unsqueeze(-1), torch.nan).flatten(1).nanmedian(dim=1).values
    return channels, medians


@largest_and_median.register_kernel("cpu")
def _on_cpu(stream: torch.Tensor, mask: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    magnitudes = stream.abs().float().numpy()
    medians = np.array([_median(row, real) for row, real in zip(magnitudes, mask.numpy(), strict=True)], np.float32)
    flat = magnitudes.reshape(-1, magnitudes.shape[-1])
    channels = np.empty((len(flat), count), np.int64)
    every = np.arange(len(flat))
    for rank in range(count):
        flat.argmax(-1, out=channels[:, rank])
        flat[every, channels[:, rank]] = -1.0  # taken; the medians are done with it
    return torch.from_numpy(channels).reshape(*stream.shape[:-1], count), torch.from_numpy(medians)


def _median(magnitudes: NDArray[np.float32], real: NDArray[np.bool_]) -> float:
    """Lower median of [position, d_model] over real positions; a NaN sorts last, and the norm beside it reports it."""
    length = int(real.sum())
    padded_right = bool(real[:length].all())  # then a view will do
    values = (magnitudes[:length] if padded_right else magnitudes[real]).ravel()
    middle = (len(values) - 1) // 2
    return float(np.partition(values, middle)[middle]) if len(values) else float("nan")


@largest_and_median.register_fake
def _fake(stream: torch.Tensor, mask: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    del mask
    channels = stream.new_empty((*stream.shape[:-1], count), dtype=torch.int64)
    return channels, stream.new_empty(stream.shape[0], dtype=torch.float32)
