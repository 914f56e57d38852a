"""Compiled loops over batches of tokens that share their experts' capacity; imported inside functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def fill(
    experts: NDArray[Any],
    starts: NDArray[Any],
    capacity: NDArray[Any],
    real: int,
    order: NDArray[Any],
    refusals: NDArray[Any],
) -> None:
    """Count for each decision at how many capacities it finds no room: each expert takes a batch's decisions in `order`.

    A decision is as far back in its expert's queue whatever the capacity, so one pass serves them all.

    Args:
        experts: [token, k].
        starts: [batch + 1] first token of each batch.
        capacity: [batch, factor] decisions that one expert takes, ascending along each row.
        real: experts below this id have a capacity; null experts always have room.
        order: [token × k] flat numbers of decisions, batch by batch.
        refusals: [token, k] filled; without room at the first so many factors.
    """
    k = experts.shape[1]
    for batch in range(len(capacity)):
        load = np.zeros(real, np.int64)
        for place in range(starts[batch] * k, starts[batch + 1] * k):
            token, slot = order[place] // k, order[place] % k
            expert = experts[token, slot]
            if expert >= real:
                continue
            factor = 0
            while factor < capacity.shape[1] and load[expert] >= capacity[batch, factor]:
                factor += 1
            load[expert] += 1
            refusals[token, slot] = factor


@njit(cache=True, nogil=True)
def reroute(
    experts: NDArray[Any],
    kept: NDArray[Any],
    ranked: NDArray[Any],
    starts: NDArray[Any],
    capacity: NDArray[Any],
    real: int,
    order: NDArray[Any],
    placed: NDArray[Any],
) -> None:
    """Give decisions without room to the token's next choice that still has some; marked in `placed` [token, k].

    `ranked` [token, expert] are all ids by falling score; those the token chose, or was already sent to, are passed over.
    """
    k = experts.shape[1]
    for batch in range(len(capacity)):
        load = np.zeros(real, np.int64)
        for token in range(starts[batch], starts[batch + 1]):
            for slot in range(k):
                if kept[token, slot] and experts[token, slot] < real:
                    load[experts[token, slot]] += 1
        reached = np.zeros(starts[batch + 1] - starts[batch], np.int64)
        for place in range(starts[batch] * k, starts[batch + 1] * k):
            token, slot = order[place] // k, order[place] % k
            if kept[token, slot]:
                continue
            at = reached[token - starts[batch]]
            while at < ranked.shape[1]:
                expert = ranked[token, at]
                at += 1
                chosen = expert >= real
                for other in range(k):
                    chosen |= experts[token, other] == expert
                if not chosen and load[expert] < capacity[batch]:
                    load[expert] += 1
                    placed[token, slot] = True
                    break
            reached[token - starts[batch]] = at


@njit(cache=True, nogil=True)
def random_sets(tokens: int, k: int, experts: int, seed: int) -> NDArray[Any]:
    """[token, k] distinct experts in random order, every set alike."""
    np.random.seed(seed)  # noqa: NPY002  compiled code has no other generator to seed
    drawn = np.empty((tokens, k), np.uint16)
    pool = np.arange(experts)
    for token in range(tokens):
        for slot in range(k):
            other = np.random.randint(slot, experts)  # noqa: NPY002  compiled code has no other generator to seed
            pool[slot], pool[other] = pool[other], pool[slot]
            drawn[token, slot] = pool[slot]
    return drawn
