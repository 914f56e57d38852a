"""From replays to hit rates with intervals: for each stream and for all of them together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import bootstrap_ratio
from moescope.routing.caching.replay import Counts, Rule, free_uses, in_parallel, replay
from moescope.routing.caching.streams import Sequences, Stream, uses

Average = Literal["choice", "sequence"]


@dataclass(frozen=True)
class HitRates:
    """Hit rates of one policy.

    Attributes:
        sizes: [size] of the cache.
        value, low, high: [stream + 1, size], the last row all streams together; NaN beyond the experts of a stream.
        loads: [stream + 1, size] share of uses that bring an expert in, those that fill a free place included.
    """

    sizes: NDArray[np.int64]
    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    loads: NDArray[np.float64]


def weights_of(stream: Stream, sequences: Sequences, average: Average) -> NDArray[np.float64]:
    """[sequence] weight of a use: 1 for the mean over choices, 1 ÷ uses of the sequence for the mean over sequences."""
    if average == "choice":
        return np.ones(len(sequences.row))
    counted = uses(stream, sequences)
    return np.divide(1.0, counted, out=np.zeros(len(counted)), where=counted > 0)


def replay_all(
    streams: list[Stream],
    sequences: Sequences,
    rule: Rule,
    *,
    average: Average = "choice",
    sizes: NDArray[np.int64] | None = None,
) -> list[Counts]:
    """Replay every stream: streams side by side, or the sequences of a single one.

    Args:
        sizes: ascending sizes of the cache; all of them where not given.
    """
    alone = len(streams) == 1
    return in_parallel([partial(_counts, stream, sequences, rule, average, sizes, alone) for stream in streams])


def _counts(
    stream: Stream, sequences: Sequences, rule: Rule, average: Average, sizes: NDArray[np.int64] | None, alone: bool
) -> Counts:
    chosen = np.arange(1, stream.experts + 1) if sizes is None else sizes[sizes <= stream.experts]
    weight = weights_of(stream, sequences, average)
    threads = (os.cpu_count() or 1) if alone else 1
    return Counts(
        sizes=chosen,
        hits=replay(stream, sequences, weight, rule, chosen, threads=threads),
        free=free_uses(stream, sequences, weight)[:, chosen - 1],
        uses=np.bincount(sequences.row, weights=weight * uses(stream, sequences), minlength=sequences.rows).astype(
            float
        ),
    )


def hit_rates(counts: list[Counts], *, preload: bool, draws: int, seed: int) -> HitRates:
    """Hit rates with a bootstrap over rows; `draws` = 0 leaves the bounds out (NaN).

    Args:
        counts: one a stream.
        preload: uses that fill a free place count as hits.
    """
    widest = max(counts, key=lambda c: len(c.sizes))
    hits = _with_total([_padded(c.hits, len(widest.sizes)) for c in counts])
    found = hits + _with_total([_padded(c.free, len(widest.sizes)) for c in counts]) if preload else hits
    total = _with_total([c.uses[:, None] for c in counts])
    beyond = np.array([[size > c.sizes[-1] for size in widest.sizes] for c in counts] + [[False] * len(widest.sizes)])
    if draws:
        value, low, high = bootstrap_ratio(found, total, draws=draws, seed=seed)
    else:
        value = _share(found, total)
        low = high = np.full_like(value, np.nan)
    blank = [np.where(beyond, np.nan, part) for part in (value, low, high, 1 - _share(hits, total))]
    return HitRates(widest.sizes, blank[0], blank[1], blank[2], blank[3])


def _share(part: NDArray[np.float64], total: NDArray[np.float64]) -> NDArray[np.float64]:
    above, below = part.sum(0), np.broadcast_to(total.sum(0), part.shape[1:])
    share: NDArray[np.float64] = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return share


def _with_total(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """[row, stream + 1, size], the last of all streams together."""
    stacked = np.stack(parts, axis=1)
    return np.concatenate([stacked, stacked.sum(1, keepdims=True)], axis=1)


def _padded(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """A cache larger than a layer holds the whole layer."""
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), mode="edge")
