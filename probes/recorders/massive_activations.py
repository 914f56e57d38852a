"""Massive activations of a block's output: found among few candidates that the device keeps, decided on the host.

An activation x is massive where |x| > 100 and |x| ≥ 1000 × the median |x| over all tokens and channels of its sequence at
that block's output (arXiv 2402.17762; the constants are those of arXiv 2503.22329). The three largest channels of every
token are kept anyway. Only where all three are massive may there be more, so that for the tokens of a sequence with the
largest third value a longer list of channels is kept beside: of a size the shapes settle, so that nothing is read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

SMALLEST, RATIO = 100.0, 1000.0
CHANNELS = 32  # of a token with more than three; one more is looked at, to know whether these are all
_TOKENS, _TOKENS_PER = 16, 32  # listed tokens of a sequence: so many, and one more for so many positions


@torch.library.custom_op("moescope::longer_lists", mutates_args=())
def longer_lists(
    stream: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, medians: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest channels of the tokens whose third value is largest: all that can be massive in more than three.

    On a CPU, where reading costs nothing, the tokens that cannot be are left out, which saves nearly all of the work.

    Args:
        stream: [row, position, d_model], output of a block.
        values: [row, position, 3], the largest of each position by magnitude.
        mask: [row, position], real tokens.
        medians: [row], median |x| over the row's real tokens.

    Returns:
        Positions [row, token] as int32, −1 for none; and for each [row, token, channel], largest first, channels as int32 and
        values as float32.
    """
    del medians
    third = values[..., 2].abs().masked_fill(~mask, -1.0)
    listed = third.topk(_listed_tokens(stream), dim=1).indices
    vectors = stream.gather(1, listed.unsqueeze(-1).expand(-1, -1, stream.shape[-1]))
    channels = vectors.abs().topk(_listed_channels(stream), dim=-1).indices
    return listed.to(torch.int32), channels.to(torch.int32), vectors.gather(-1, channels).to(torch.float32, copy=True)


@longer_lists.register_kernel("cpu")
def _on_cpu(
    stream: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, medians: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions, channels, sizes = _fake(stream, values, mask, medians)
    positions.fill_(-1)
    channels.zero_()
    sizes.zero_()
    third = values[..., 2].abs().float().masked_fill(~mask, -1.0).numpy()
    floor = np.full(len(third), SMALLEST)
    if stream.shape[1] > 1:  # a generated token comes alone, and its median is not that of the prefill
        floor = np.fmax(floor, 0.999 * RATIO * medians.numpy())
    for row in np.flatnonzero((third >= floor[:, None]).any(axis=1)):
        order = np.argsort(-third[row], kind="stable")[: positions.shape[1]]
        listed = torch.from_numpy(order[third[row, order] >= floor[row]])
        vectors = stream[row, listed]
        chosen = vectors.abs().topk(channels.shape[2], dim=-1).indices
        positions[row, : len(listed)] = listed.to(torch.int32)
        channels[row, : len(listed)] = chosen.to(torch.int32)
        sizes[row, : len(listed)] = vectors.gather(-1, chosen).float()
    return positions, channels, sizes


@longer_lists.register_fake
def _fake(
    stream: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, medians: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del values, mask, medians
    shape = (stream.shape[0], _listed_tokens(stream))
    deep = (*shape, _listed_channels(stream))
    return (
        stream.new_empty(shape, dtype=torch.int32),
        stream.new_empty(deep, dtype=torch.int32),
        stream.new_empty(deep, dtype=torch.float32),
    )


def _listed_tokens(stream: torch.Tensor) -> int:
    return min(stream.shape[1], _TOKENS + stream.shape[1] // _TOKENS_PER)


def _listed_channels(stream: torch.Tensor) -> int:
    return min(CHANNELS + 1, stream.shape[-1])


@dataclass
class SiteValues:
    """What was kept at one block's output in one step, on the host.

    Attributes:
        layer: of the block.
        values, channels: [token, 3] largest of each real token, by magnitude.
        median: [token] median |x| of each one's sequence.
        positions, list_channels, list_values: as `longer_lists` gives them.
    """

    layer: int
    values: NDArray[np.float32]
    channels: NDArray[np.int32]
    median: NDArray[np.float64]
    positions: NDArray[np.int32]
    list_channels: NDArray[np.int32]
    list_values: NDArray[np.float32]


def is_massive(values: NDArray[Any], median: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which values [token, channel] are massive beside the median |x| of each token's sequence; none that is not finite."""
    size = np.abs(values.astype(np.float64))
    found: NDArray[np.bool_] = np.isfinite(size) & (size > SMALLEST) & (size >= RATIO * median[:, None])
    return found


def massive_rows(
    site: SiteValues, places: NDArray[np.int64], tokens: NDArray[np.int64], width: int
) -> tuple[pa.Table | None, int]:
    """Rows of `massive_activations` at one block's output, by token and channel.

    Args:
        site: what was kept there.
        places: row · position of each real token in the batch.
        tokens: run-wide number of each.
        width: positions of the batch.

    Returns:
        The rows, None for none; and how many tokens have more massive channels than were kept, or may have.
    """
    suspects = np.flatnonzero(np.abs(site.values).max(axis=1) > SMALLEST)
    massive = is_massive(site.values[suspects], site.median[suspects])
    if not massive.any():
        return None, 0
    full = suspects[massive.all(axis=1)]
    listed, where = _listed(site.positions, width, places[full])
    at, rank = massive.nonzero()
    longer = is_massive(site.list_values[where], site.median[full[listed]])
    long_at, long_rank = longer.nonzero()
    short = ~np.isin(suspects[at], full[listed])  # what is in a longer list is taken from there
    at, rank = suspects[at[short]], rank[short]
    token = np.concatenate([at, full[listed][long_at]])
    channel = np.concatenate(
        [site.channels[at, rank], site.list_channels[where[0][long_at], where[1][long_at], long_rank]]
    )
    value = np.concatenate([site.values[at, rank], site.list_values[where[0][long_at], where[1][long_at], long_rank]])
    missing = int((~listed).sum()) + (int(longer[:, CHANNELS].sum()) if longer.shape[1] > CHANNELS else 0)
    order = np.lexsort((channel, token))
    return _table(site, tokens, token[order], channel[order], value[order].astype(np.float64)), missing


def _table(
    site: SiteValues,
    tokens: NDArray[np.int64],
    at: NDArray[np.int64],
    channel: NDArray[np.int32],
    value: NDArray[np.float64],
) -> pa.Table:
    with np.errstate(divide="ignore"):  # a median of 0 makes the ratio infinite
        ratio = np.abs(value) / site.median[at]
    layer = np.full(len(at), site.layer, np.uint16)
    columns = {"layer": layer, "token": tokens[at], "channel": channel.astype(np.int32), "value": value, "ratio": ratio}
    return pa.table(columns)


def _listed(
    positions: NDArray[np.int32], width: int, places: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Which of some places have a longer list, and the row and number of each of those."""
    known = np.where(positions < 0, -1, np.arange(len(positions))[:, None] * width + positions).ravel()
    order = np.argsort(known)
    found = order[np.searchsorted(known, places, sorter=order).clip(max=len(known) - 1)]
    listed = known[found] == places
    row, number = np.divmod(found[listed], positions.shape[1])
    return listed, (row, number)
