"""Compiled: how deep in the order of last use an expert lies when it is asked for, which is LRU at every size at once.

A cache of C experts under LRU holds the C used last, so an expert asked for at depth d is a hit for every C > d (Mattson,
Gecsei, Slutz and Traiger 1970). Depth is counted on a line of time with one bit a use, set where it is an expert's last:
the experts used since are the bits set after its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True, inline="always")
def _ones(word: np.uint64) -> np.int64:
    """Bits set in a word."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(cache=True, nogil=True)
def recency_depths(
    ids: NDArray[Any],
    bounds: NDArray[np.int64],
    lanes: NDArray[np.int64],
    starts: NDArray[np.int64],
    owner: NDArray[np.int64],
    weight: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Add the weight of each use to the depth it was found at; first uses of a sequence are added nowhere.

    Args:
        ids: [token, use] experts in the order in which they are asked for; those that `out` has no room for are passed by.
        bounds: [group + 1] columns of the uses that are tested together, before any of them is brought in.
        lanes: [group] which lane of `out` a group counts in.
        starts: [sequence + 1] first token of each sequence; the cache is empty there.
        owner, weight: [sequence] row of `out` and weight of its uses.
        out: [row, lane, expert] changed in place: weight of uses found at each depth.
    """
    width, experts = ids.shape[1], out.shape[2]
    longest = 0
    for s in range(len(owner)):
        longest = max(longest, starts[s + 1] - starts[s])
    words = np.zeros((longest * width >> 6) + 1, np.uint64)
    counts = np.zeros(len(words), np.int64)
    last = np.full(experts, -1, np.int64)
    for s in range(len(owner)):
        last[:] = -1
        now = 0
        used = ((starts[s + 1] - starts[s]) * width >> 6) + 1
        words[:used] = np.uint64(0)
        counts[:used] = 0
        for t in range(starts[s], starts[s + 1]):
            for group in range(len(lanes)):
                top = now >> 6
                for column in range(bounds[group], bounds[group + 1]):
                    before = last[ids[t, column]] if ids[t, column] < experts else -1
                    if before < 0:
                        continue
                    block = before >> 6
                    depth = _ones(words[block] >> np.uint64(before & 63)) - 1
                    for later in range(block + 1, top + 1):
                        depth += counts[later]
                    out[owner[s], lanes[group], depth] += weight[s]
                for column in range(bounds[group], bounds[group + 1]):
                    expert = ids[t, column]
                    if expert >= experts:
                        continue
                    before = last[expert]
                    if before >= 0:
                        words[before >> 6] ^= np.uint64(1) << np.uint64(before & 63)
                        counts[before >> 6] -= 1
                    words[now >> 6] |= np.uint64(1) << np.uint64(now & 63)
                    counts[now >> 6] += 1
                    last[expert] = now
                    now += 1


@njit(cache=True, nogil=True)
def distinct_experts(ids: NDArray[Any], starts: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    """[sequence] how many different experts a sequence uses."""
    seen = np.full(experts, -1, np.int64)
    found = np.zeros(len(starts) - 1, np.int64)
    for s in range(len(found)):
        for t in range(starts[s], starts[s + 1]):
            for column in range(ids.shape[1]):
                if ids[t, column] < experts and seen[ids[t, column]] != s:
                    seen[ids[t, column]] = s
                    found[s] += 1
    return found
