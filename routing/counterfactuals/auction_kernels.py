"""Balanced assignment of tokens to experts by auction, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def auction(scores: Any, capacity: Any, top_k: int, prices: Any, step: float) -> Any:
    """Every token gets `top_k` distinct experts and every expert `capacity` tokens, at nearly the largest sum of scores.

    Tokens bid for experts as in Bertsekas' auction (the method of BASE layers): a token short of experts takes the best one
    at current prices and bids up to what leaves it as well off as with its second choice; a full expert drops its lowest
    bidder and costs what its lowest bid is. A token's bids are all raised to that level, so that the experts it keeps are
    always within `step` of its best k at current prices: the sum is within tokens × k × `step` of the largest.

    Args:
        scores: [token, expert], float32, finite.
        capacity: [expert] int64, tokens each takes; sums to tokens × `top_k`.
        top_k: experts of a token, fewer than there are experts.
        prices: [expert] float64 prices to start from, such as those of tokens before; left at the final prices.
        step: smallest rise of a bid.

    Returns:
        [token, expert] whether the token goes to the expert.
    """
    tokens, experts = scores.shape
    held = np.zeros((tokens, experts), np.bool_)
    slot = np.zeros((tokens, experts), np.int32)
    room = max(1, capacity.max())
    member = np.zeros((experts, room), np.int32)
    bid = np.zeros((experts, room))
    count = np.zeros(experts, np.int64)
    lowest = np.zeros(experts, np.int64)
    need = np.full(tokens, top_k)
    waiting = np.arange(tokens)[::-1].copy()
    last = tokens
    for expert in range(experts):
        if capacity[expert] == 0:
            prices[expert] = np.inf
    while last > 0:
        last -= 1
        token = waiting[last]
        while need[token] > 0:
            best, level = _wish(token, scores, held, prices, step)
            _raise_bids(token, level, scores, held, slot, bid, capacity, count, lowest, prices)
            if count[best] < capacity[best]:
                place = count[best]
                count[best] += 1
            else:
                place = lowest[best]
                loser = member[best, place]
                held[loser, best] = False
                if need[loser] == 0:
                    waiting[last] = loser
                    last += 1
                need[loser] += 1
            member[best, place], slot[token, best] = token, place
            bid[best, place] = scores[token, best] - level
            held[token, best] = True
            need[token] -= 1
            if count[best] == capacity[best]:
                _reprice(best, bid, count, lowest, prices)
    return held


@njit(cache=True, nogil=True)
def _wish(token: Any, scores: Any, held: Any, prices: Any, step: float) -> tuple[int, float]:
    """The best expert that the token does not hold, and what it is left with after bidding up to its second choice."""
    best, first, second = -1, -np.inf, -np.inf
    for expert in range(scores.shape[1]):
        if not held[token, expert]:
            value = scores[token, expert] - prices[expert]
            if best < 0 or value > first:
                best, first, second = expert, value, first
            elif value > second:
                second = value
    return best, (first if second == -np.inf else second) - step


@njit(cache=True, nogil=True)
def _raise_bids(
    token: int,
    level: float,
    scores: Any,
    held: Any,
    slot: Any,
    bid: Any,
    capacity: Any,
    count: Any,
    lowest: Any,
    prices: Any,
) -> None:
    """Lift the token's other bids to where they leave it with as little."""
    for expert in range(scores.shape[1]):
        if held[token, expert]:
            place = slot[token, expert]
            raised = scores[token, expert] - level
            if raised > bid[expert, place]:
                bid[expert, place] = raised
                if lowest[expert] == place and count[expert] == capacity[expert]:
                    _reprice(expert, bid, count, lowest, prices)


@njit(cache=True, nogil=True)
def _reprice(expert: Any, bid: Any, count: Any, lowest: Any, prices: Any) -> None:
    """The price of a full expert is its lowest bid."""
    at = 0
    for place in range(1, count[expert]):
        if bid[expert, place] < bid[expert, at]:
            at = place
    lowest[expert] = at
    prices[expert] = bid[expert, at]
