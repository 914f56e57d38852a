"""Choices of threshold rules, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def largest_until(shares: Any, limit: float) -> Any:
    """[token, expert] The largest shares of each token, until their sum exceeds the limit; ties by lower id."""
    tokens, experts = shares.shape
    chosen = np.zeros((tokens, experts), np.bool_)
    left = np.empty(experts, np.float32)
    for token in range(tokens):
        left[:] = shares[token]
        mass = 0.0
        for _ in range(experts):
            best, largest = 0, left[0]
            for expert in range(1, experts):
                if left[expert] > largest:
                    best, largest = expert, left[expert]
            chosen[token, best] = True
            left[best] = -1.0
            mass += np.float64(largest)
            if mass > limit:
                break
    return chosen


@njit(cache=True, nogil=True)
def within_slots(logits: Any, null: float, slots: int, sure: int) -> Any:
    """[token, expert] At most `slots` and at least `sure` of the highest logits, those of `null` or more between."""
    tokens, experts = logits.shape
    chosen = np.zeros((tokens, experts), np.bool_)
    for token in range(tokens):
        above = 0
        for expert in range(experts):
            if np.float64(logits[token, expert]) >= null:
                above += 1
        if sure <= above <= slots:
            for expert in range(experts):
                chosen[token, expert] = np.float64(logits[token, expert]) >= null
            continue
        for _ in range(min(slots, max(above, sure))):
            best, largest = -1, np.float32(-np.inf)
            for expert in range(experts):
                if not chosen[token, expert] and (best < 0 or logits[token, expert] > largest):
                    best, largest = expert, logits[token, expert]
            chosen[token, best] = True
    return chosen
