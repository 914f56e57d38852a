"""Compiled: replacement by priority (LFU, look-ahead, Belady) in a pool of thousands of experts, at chosen sizes.

As in `priority_kernels`, a smaller cache holds a subset of a larger one. Between two neighbouring sizes lies a segment: what
the larger holds and the smaller does not. Inside a segment order does not matter, only which expert has the lowest priority;
the one displaced from a segment enters the next where its priority is above that, and passes it by otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moescope.routing.caching.priority_kernels import _COUNT, _IDS, BELADY, LFU, LOOK_AHEAD, _used

__all__ = ["BELADY", "LFU", "LOOK_AHEAD", "segment_depths"]

_HIGHEST = 1 << 62


@njit(cache=True, nogil=True, inline="always")
def _lowest(keys: NDArray[np.int64], begin: Any, end: Any) -> Any:
    found = _HIGHEST
    for place in range(begin, end):
        found = min(found, keys[place])
    return found


@njit(cache=True, nogil=True)
def segment_depths(  # noqa: PLR0912, PLR0915  in one piece: cut into functions it takes twice the time
    ids: NDArray[Any],
    bounds: NDArray[np.int64],
    after: NDArray[np.int32],
    rule: int,
    horizon: int,
    experts: int,
    sizes: NDArray[np.int64],
    starts: NDArray[np.int64],
    owner: NDArray[np.int64],
    weight: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Add the weight of each use to the segment it was found in.

    Args:
        ids, after, rule, horizon, starts, owner, weight: as in `priority_depths`.
        bounds: [group + 1] columns of the uses that are tested together, before any of them is brought in.
        experts: how many there are in the pool.
        sizes: ascending sizes of the cache.
        out: [row, size] changed in place: found in the cache of this size and in no smaller one.
    """
    width, segments = ids.shape[1], len(sizes)
    outside = np.zeros(experts, np.int64)  # counts of experts that lie in no segment
    keys = np.zeros(sizes[-1], np.int64)
    place_of = np.full(experts, -1, np.int64)
    segment_of = np.zeros(sizes[-1], np.int64)
    begins = np.zeros(segments, np.int64)
    begins[1:] = sizes[:-1]
    for segment in range(segments):
        segment_of[begins[segment] : sizes[segment]] = segment
    filled = begins.copy()
    least = np.zeros(segments, np.int64)
    for s in range(len(owner)):
        begin, end = starts[s], starts[s + 1]
        place_of[:] = -1
        outside[:] = 0
        filled[:] = begins
        least[:] = _HIGHEST
        ahead = begin
        for t in range(begin, end):
            while rule == LOOK_AHEAD and ahead < min(end, t + horizon):
                for column in range(width):
                    expert = np.int64(ids[ahead, column])
                    if expert >= experts:
                        continue
                    place = place_of[expert]
                    if place < 0:
                        outside[expert] += _COUNT
                        continue
                    was = keys[place]
                    keys[place] = was + _COUNT
                    segment = segment_of[place]
                    if least[segment] == was:
                        least[segment] = _lowest(keys, begins[segment], filled[segment])
                ahead += 1
            for group in range(len(bounds) - 1):
                for column in range(bounds[group], bounds[group + 1]):
                    place = place_of[ids[t, column]] if ids[t, column] < experts else -1
                    if place >= 0:
                        out[owner[s], segment_of[place]] += weight[s]
                for column in range(bounds[group], bounds[group + 1]):
                    expert = np.int64(ids[t, column])
                    if expert >= experts:
                        continue
                    now = (t - begin) * width + column
                    hole = place_of[expert]
                    was = keys[hole] if hole >= 0 else outside[expert]
                    home = segment_of[hole] if hole >= 0 else segments
                    moving = _used(was, rule, expert, now, after[t, column] if rule == BELADY else 0)
                    segment = 0
                    while segment < home:
                        if filled[segment] < sizes[segment]:
                            hole = filled[segment]
                            filled[segment] += 1
                            break
                        lowest = least[segment]
                        if segment == 0 or moving > lowest:
                            place = place_of[_IDS - (lowest & _IDS)]
                            keys[place] = moving
                            place_of[_IDS - (moving & _IDS)] = place
                            moving = lowest
                            least[segment] = _lowest(keys, begins[segment], sizes[segment])
                        segment += 1
                    expert = np.int64(_IDS - (moving & _IDS))
                    if segment == segments:
                        place_of[expert] = -1
                        outside[expert] = moving
                        continue
                    keys[hole] = moving
                    place_of[expert] = hole
                    if segment == home and least[segment] == was:
                        least[segment] = _lowest(keys, begins[segment], filled[segment])
                    else:
                        least[segment] = min(least[segment], moving)
