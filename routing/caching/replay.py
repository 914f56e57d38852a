"""Replay a stream through a cache at every size at once, under one policy of replacement."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from moescope.routing.caching.streams import Sequences, Stream

Policy = Literal["lru", "lfu", "fifo", "lifo", "look_ahead", "belady"]
POLICIES: tuple[Policy, ...] = ("lru", "lfu", "fifo", "lifo", "look_ahead", "belady")
POLICY_NAMES: dict[str, str] = {
    "lru": "LRU",
    "lfu": "LFU",
    "fifo": "FIFO",
    "lifo": "LIFO",
    "look_ahead": "look-ahead",
    "belady": "Belady",
}
FORESIGHT = ("look_ahead", "belady")
_LONGEST = (1 << 18) - 1  # counts of the compiled priorities have 18 bits
T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """How a cache replaces what it holds.

    Attributes:
        policy: which expert is given up.
        horizon: tokens that look-ahead sees, the present one included.
        in_tokens: Belady counts the time until the next use in tokens, in uses otherwise.
    """

    policy: Policy
    horizon: int = 16
    in_tokens: bool = True


@dataclass(frozen=True)
class Counts:
    """What a replay of one stream found, by row of `Sequences`, each sequence with its weight.

    Attributes:
        sizes: [size] of the cache, ascending.
        hits: [row, size] uses found in a cache that was empty at the start of the sequence.
        free: [row, size] uses that filled a free place: the first C different experts of a sequence.
        uses: [row] all uses.
    """

    sizes: NDArray[np.int64]
    hits: NDArray[np.float64]
    free: NDArray[np.float64]
    uses: NDArray[np.float64]


def replay(stream: Stream, sequences: Sequences, weight: NDArray[np.float64], rule: Rule, sizes: NDArray[np.int64],
           *, threads: int = 1) -> NDArray[np.float64]:  # fmt: skip
    """[row, size] weight of the uses found in the cache, empty at the start of each sequence.

    All experts of a group are tested against the cache before it, then brought in one after another; bringing in is a must,
    so the cache holds at least one. LRU, LFU (by uses since the start of the sequence, also those outside the cache),
    look-ahead and Belady are stack policies: one pass serves all sizes. FIFO and LIFO keep one state a size.

    Args:
        weight: [sequence] of each of its uses.
        sizes: ascending, at most `stream.experts`.
        threads: sequences are spread over as many.
    """
    parts = in_parallel(
        [
            partial(_replayed, stream, sequences.part(a, b), weight[a:b], rule, sizes)
            for a, b in _cuts(sequences, threads)
        ],
        threads,
    )
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def in_parallel(tasks: Sequence[Callable[[], T]], threads: int | None = None) -> list[T]:
    """Results of the tasks, in order; compiled code runs on all cores at once."""
    workers = min(len(tasks), threads or os.cpu_count() or 1)
    if workers <= 1:
        return [task() for task in tasks]
    with ThreadPoolExecutor(workers) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


def free_uses(stream: Stream, sequences: Sequences, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """[row, expert] weight of the uses that fill a free place, for sizes 1, 2, … up to all experts."""
    from moescope.routing.caching.recency_kernel import distinct_experts

    distinct = distinct_experts(stream.ids, sequences.starts, stream.experts)
    having = np.zeros((sequences.rows, stream.experts + 1))
    np.add.at(having, (sequences.row, distinct), weight)
    at_least = np.cumsum(having[:, ::-1], axis=1)[:, ::-1]
    filled: NDArray[np.float64] = np.cumsum(at_least[:, 1:], axis=1)
    return filled


def _cuts(sequences: Sequences, threads: int) -> list[tuple[int, int]]:
    """Runs of whole sequences of about the same number of tokens."""
    starts = sequences.starts
    wanted = np.linspace(starts[0], starts[-1], threads + 1)[1:-1]
    edges = np.unique(np.concatenate([[0], np.searchsorted(starts, wanted), [len(starts) - 1]]))
    return [(int(a), int(b)) for a, b in pairwise(edges)] or [(0, 0)]


def _replayed(
    stream: Stream, sequences: Sequences, weight: NDArray[np.float64], rule: Rule, sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    where = (sequences.starts, sequences.row, weight)
    if rule.policy == "lru":
        from moescope.routing.caching.recency_kernel import recency_depths

        depths = np.zeros((sequences.rows, 1, stream.experts))
        recency_depths(stream.ids, stream.bounds, np.zeros(len(stream.bounds) - 1, np.int64), *where, depths)
        found: NDArray[np.float64] = np.cumsum(depths[:, 0], axis=1)[:, sizes - 1]
        return found
    if rule.policy in ("fifo", "lifo"):
        from moescope.routing.caching.queue_kernels import first_in_first_out, last_in_first_out

        kernel = first_in_first_out if rule.policy == "fifo" else last_in_first_out
        hits = np.zeros((sequences.rows, len(sizes)))
        counted = stream.ids.size + len(weight) * int(sizes[-1])
        kind = np.int32 if counted < 1 << 30 else np.int64
        kernel(stream.ids, stream.bounds, *where, stream.experts, sizes.astype(kind), hits)
        return hits
    return _by_priority(stream, sequences, weight, rule, sizes)


def _by_priority(
    stream: Stream, sequences: Sequences, weight: NDArray[np.float64], rule: Rule, sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    from moescope.routing.caching import pool_kernel, priority_kernels

    number = {"lfu": priority_kernels.LFU, "look_ahead": priority_kernels.LOOK_AHEAD}.get(
        rule.policy, priority_kernels.BELADY
    )
    after = np.zeros((0, 0), np.int32)
    if rule.policy == "belady":
        after = priority_kernels.next_uses(stream.ids, sequences.starts, stream.experts, rule.in_tokens)
    horizon = min(rule.horizon, _LONGEST)
    where = (sequences.starts, sequences.row, weight)
    if len(sizes) == stream.experts and len(stream.bounds) == 2:
        out = np.zeros((sequences.rows, stream.experts))
        priority_kernels.priority_depths(stream.ids, after, number, horizon, *where, out)
    else:
        out = np.zeros((sequences.rows, len(sizes)))
        pool_kernel.segment_depths(
            stream.ids, stream.bounds, after, number, horizon, stream.experts, sizes, *where, out
        )
    hits: NDArray[np.float64] = np.cumsum(out, axis=1)
    return hits
