"""Compiled: replacement by a priority that does not depend on the size of the cache: LFU, look-ahead, Belady.

A cache that is full gives up the expert of lowest priority among those it held. Where priorities are the same whatever the
size, a smaller cache holds a subset of a larger one (Mattson, Gecsei, Slutz and Traiger 1970), and one pass serves all sizes:
the expert asked for goes to the top, and what it displaces moves down, at each step the lower of two priorities moving on.

A priority is one whole number, the highest part first: (count, last use, expert), or (nearness of the next use, expert). Of
equals the expert with the higher id goes; last uses are never equal, next uses counted in tokens are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

LFU, LOOK_AHEAD, BELADY = 0, 1, 2
_COUNT = 1 << 44  # counts lie above 28 bits of time and 16 bits of expert
_MOST = (1 << 18) - 1
_NEVER = (1 << 31) - 1
_IDS = (1 << 16) - 1


@njit(cache=True, nogil=True)
def next_uses(ids: NDArray[Any], starts: NDArray[np.int64], experts: int, in_tokens: bool) -> NDArray[np.int32]:
    """[token, use] when the expert is used next, since the start of its sequence; 2^31 − 1 for never.

    Args:
        ids: [token, use] experts; ids from `experts` on need no place in a cache.
        starts: [sequence + 1] first token of each sequence.
        experts: how many there are.
        in_tokens: count time in tokens, in uses otherwise.
    """
    width = ids.shape[1]
    found = np.full(ids.shape, _NEVER, np.int32)
    after = np.empty(experts, np.int32)
    for s in range(len(starts) - 1):
        after[:] = _NEVER
        for t in range(starts[s + 1] - 1, starts[s] - 1, -1):
            for column in range(width - 1, -1, -1):
                expert = ids[t, column]
                if expert < experts:
                    found[t, column] = after[expert]
                    after[expert] = t - starts[s] if in_tokens else (t - starts[s]) * width + column
    return found


@njit(cache=True, nogil=True, inline="always")
def _used(key: Any, rule: int, expert: Any, now: Any, after: Any) -> Any:
    """The priority of an expert once it has been used at `now`."""
    if rule == BELADY:
        return ((_NEVER - after) << 16) | (_IDS - expert)
    count = key >> 44
    count = min(count + 1, _MOST) if rule == LFU else count - 1
    return (count << 44) | (now << 16) | (_IDS - expert)


@njit(cache=True, nogil=True)
def priority_depths(  # noqa: PLR0912  one loop over time
    ids: NDArray[Any],
    after: NDArray[np.int32],
    rule: int,
    horizon: int,
    starts: NDArray[np.int64],
    owner: NDArray[np.int64],
    weight: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Add the weight of each use to the depth it was found at, all uses of a token tested before any is brought in.

    Args:
        ids: [token, use] experts in the order in which they are brought in; those from `experts` on are passed by.
        after: [token, use] from `next_uses` for Belady; not read otherwise.
        rule: LFU, LOOK_AHEAD or BELADY.
        horizon: tokens that look-ahead sees, the present one included.
        starts: [sequence + 1] first token of each sequence; the cache is empty there.
        owner, weight: [sequence] row of `out` and weight of its uses.
        out: [row, expert] changed in place.
    """
    width, experts = ids.shape[1], out.shape[1]
    key = np.zeros(experts, np.int64)
    stack = np.zeros(experts, np.int64)
    depth = np.full(experts, -1, np.int64)
    for s in range(len(owner)):
        begin, end = starts[s], starts[s + 1]
        key[:] = 0
        held = 0
        ahead = begin
        for t in range(begin, end):
            if rule == LOOK_AHEAD:
                while ahead < min(end, t + horizon):
                    for column in range(width):
                        if ids[ahead, column] < experts:
                            key[ids[ahead, column]] += _COUNT
                    ahead += 1
            for place in range(held):
                depth[stack[place]] = place
            for column in range(width):
                found = depth[ids[t, column]] if ids[t, column] < experts else -1
                if found >= 0:
                    out[owner[s], found] += weight[s]
            for column in range(width):
                expert = np.int64(ids[t, column])
                if expert >= experts:
                    continue
                now = (t - begin) * width + column
                key[expert] = _used(key[expert], rule, expert, now, after[t, column] if rule == BELADY else 0)
                if depth[expert] < 0:
                    depth[expert] = experts
                    stack[held] = expert
                    held += 1
                moving = stack[0]
                stack[0] = expert
                priority = key[moving]
                place = 0
                while moving != expert:
                    place += 1
                    other = stack[place]
                    theirs = key[other]
                    if other == expert or theirs < priority:
                        stack[place] = moving
                        moving = other
                        priority = theirs
        for place in range(held):
            depth[stack[place]] = -1
