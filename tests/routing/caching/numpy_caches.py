"""Cache replay in plain NumPy: all sequences and all sizes side by side, token after token, nothing compiled.

For tests and for timing beside `moescope.routing.caching`; it imports nothing of moescope.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
_NEVER = 1 << 30


def hits_by_size(experts: Ints, n_experts: int, starts: Ints, policy: str, *, horizon: int = 16) -> Ints:
    """[size] uses found in caches of 1, 2, … experts that are empty at the start of each sequence.

    Args:
        experts: [token, k] distinct ids in slot order; starts: [sequence + 1] first token of each sequence.
        policy: lru, lfu, fifo, lifo, look_ahead or belady.
    """
    lengths, (_, k) = np.diff(starts), experts.shape
    number, longest = len(lengths), int(lengths.max())
    sizes = np.arange(1, n_experts + 1)
    ids = np.full((number, longest, k), -1)
    ids[np.repeat(np.arange(number), lengths), _positions(lengths)] = experts
    upcoming = _next_tokens(ids, n_experts) if policy == "belady" else None
    cached = np.zeros((number, n_experts, n_experts), bool)  # [sequence, size, expert]
    held = np.zeros((number, n_experts), np.int64)
    arrived = np.zeros((number, n_experts, n_experts), np.int64)
    last, count, ahead, following = np.zeros((4, number, n_experts), np.int64)
    hits = np.zeros(n_experts, np.int64)
    for t in range(longest):
        if policy == "look_ahead":
            for seen in range(min(horizon, longest)) if t == 0 else range(t + horizon - 1, min(t + horizon, longest)):
                row, slot = np.nonzero(ids[:, seen] >= 0)
                np.add.at(ahead, (row, ids[row, seen, slot]), 1)
        rows = np.flatnonzero(lengths > t)
        hits += cached[rows[:, None], :, ids[rows, t]].sum((0, 1))
        for slot in range(k):
            now, expert = t * k + slot + 1, ids[rows, t, slot]
            last[rows, expert] = now
            count[rows, expert] += 1
            ahead[rows, expert] -= 1
            if upcoming is not None:
                following[rows, expert] = upcoming[rows, t, slot]
            absent = ~cached[rows, :, expert]
            worst = _badness(policy, last[rows], count[rows], ahead[rows], following[rows], arrived[rows])
            victim = np.where(cached[rows], worst, np.iinfo(np.int64).min).argmax(2)
            row, size = np.nonzero(absent & (held[rows] == sizes))
            cached[rows[row], size, victim[row, size]] = False
            held[rows] += absent & (held[rows] < sizes)
            row, size = np.nonzero(absent)
            arrived[rows[row], size, expert[row]] = now
            cached[rows, :, expert] = True
    return hits


def _badness(policy: str, last: Ints, count: Ints, ahead: Ints, following: Ints, arrived: Ints) -> Ints:
    """[sequence, size or 1, expert]: the cached expert with the most is given up."""
    if policy == "fifo":
        return -arrived
    if policy == "lifo":
        return arrived
    if policy == "belady":
        return (following * last.shape[1] + np.arange(last.shape[1]))[:, None]
    first = {"lru": 0, "lfu": count, "look_ahead": ahead}[policy]
    return (-first * _NEVER - last)[:, None]


def _positions(lengths: Ints) -> Ints:
    return np.concatenate([np.arange(length) for length in lengths])


def _next_tokens(ids: Ints, n_experts: int) -> Ints:
    """[sequence, token, slot] the next token that uses the expert."""
    number, longest, k = ids.shape
    after = np.full((number, n_experts), _NEVER)
    found = np.full(ids.shape, _NEVER)
    for t in range(longest - 1, -1, -1):
        rows = np.flatnonzero(ids[:, t, 0] >= 0)
        for slot in range(k):
            found[rows, t, slot] = after[rows, ids[rows, t, slot]]
        for slot in range(k):
            after[rows, ids[rows, t, slot]] = t
    return found
