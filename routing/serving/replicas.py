"""Copies of experts: how many each gets, and where they lie."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from moescope.routing.serving.solvers import by_load

Floats = NDArray[np.float64]


def copies_of_hottest(loads: Floats, extra: int) -> NDArray[np.int64]:
    """[expert] copies: one each, and `extra` more, each to the expert with the most load per copy (ties to the lower id).

    Example:
        >>> copies_of_hottest(np.array([9.0, 2.0, 4.0]), 2).tolist()
        [3, 1, 1]
    """
    copies = np.ones(len(loads), np.int64)
    queue = [(-load, expert) for expert, load in enumerate(loads.tolist())]
    heapq.heapify(queue)
    for _ in range(extra):
        _, expert = queue[0]
        copies[expert] += 1
        heapq.heapreplace(queue, (-loads[expert] / copies[expert], expert))
    return copies


def copies_of_random(experts: int, extra: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """[expert] copies: one each, and `extra` more to experts drawn at random."""
    return 1 + np.bincount(generator.integers(experts, size=extra), minlength=experts)


def spread(loads: Floats, copies: NDArray[np.int64], devices: int) -> Floats:
    """[expert, device] share of an expert's tokens that a device takes: copies are placed by load, equally many on each."""
    owner = np.repeat(np.arange(len(loads)), copies)
    placement = by_load((loads / copies)[owner], devices)
    share = np.zeros((len(loads), devices))
    np.add.at(share, (owner, placement), 1.0 / copies[owner])
    return share
