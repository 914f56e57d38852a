"""Rules that fix how many experts a token or how many tokens an expert has: expert choice, balance, groups, hash."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats32 = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Smallest rise of a bid, in logits: balanced assignments lie within this of the best sum, a decision.
BID_STEP = 0.01


class AssignmentRule(Protocol):
    """A rule without a threshold."""

    @property
    def words(self) -> str:
        """The rule."""

    def choose(self, logits: Floats32, shares: Floats32, token_id: NDArray[np.int32]) -> Mask:
        """[token, expert] whether the expert is chosen, for tokens that lie one after another."""


def capacities(tokens: int, n_experts: int, top_k: int) -> NDArray[np.int64]:
    """[expert] tokens × k ÷ E each, as whole numbers that differ by at most one and sum to tokens × k.

    Example:
        >>> capacities(5, 4, 2).tolist()
        [2, 3, 2, 3]
    """
    ends = np.arange(n_experts + 1) * tokens * top_k // n_experts
    return np.diff(ends).astype(np.int64)


@dataclass
class ExpertChoice:
    """Each expert takes the tokens of a window that give it the highest probability (arXiv 2202.09368).

    Attributes:
        top_k: experts a token has on average.
        window: tokens that experts choose from.
    """

    top_k: int
    window: int

    @property
    def words(self) -> str:
        """The rule."""
        return f"each expert takes the tokens, of every {self.window:,}, that give it the highest probability"

    def choose(self, logits: Floats32, shares: Floats32, token_id: NDArray[np.int32]) -> Mask:
        """Ties go to the earlier token."""
        chosen = np.zeros(shares.shape, bool)
        for start in range(0, len(shares), self.window):
            part = np.ascontiguousarray(shares[start : start + self.window].T)
            room = capacities(part.shape[1], part.shape[0], self.top_k)
            chosen[start : start + self.window] = _highest(part, room).T
        return chosen


def _highest(values: Floats32, room: NDArray[np.int64]) -> Mask:
    """[row, column] The `room` highest of each row, ties to the lower column."""
    columns = values.shape[1]
    limits = np.unique(room)
    ordered = np.partition(values, np.unique(np.minimum(columns - limits, columns - 1)), axis=1)
    least = np.where(room > 0, np.take_along_axis(ordered, (columns - np.maximum(room, 1))[:, None], 1)[:, 0], np.inf)
    found = values >= least[:, None]
    for row in np.flatnonzero(found.sum(1) != room):
        above, level = values[row] > least[row], np.flatnonzero(values[row] == least[row])
        above[level[: room[row] - above.sum()]] = True
        found[row] = above
    return found


@dataclass
class Balanced:
    """Tokens of a window get k experts each so that all experts have as many, at the largest sum of logits (BASE layers).

    Attributes:
        top_k: experts of a token.
        window: tokens assigned together.
        prices: of experts, kept from window to window.
        bound: largest sums that any balanced assignment could have, added up.
        reached: the sums of those found.
    """

    top_k: int
    window: int
    prices: NDArray[np.float64] | None = None
    bound: float = 0.0
    reached: float = 0.0

    @property
    def words(self) -> str:
        """The rule."""
        return (
            f"the assignment of every {self.window:,} tokens that loads all experts alike at the largest sum of logits"
        )

    def choose(self, logits: Floats32, shares: Floats32, token_id: NDArray[np.int32]) -> Mask:
        """By auction, to within `BID_STEP` of the best sum, a decision."""
        from moescope.routing.counterfactuals.auction_kernels import auction

        tokens, experts = logits.shape
        if self.top_k >= experts:
            return np.ones(logits.shape, bool)
        chosen = np.zeros(logits.shape, bool)
        for start in range(0, tokens, self.window):
            scores = np.maximum(logits[start : start + self.window], np.float32(-1e4))
            room = capacities(len(scores), experts, self.top_k)
            prices = np.zeros(experts) if self.prices is None else self.prices
            prices = np.where(np.isfinite(prices), prices, 0.0)
            held = auction(scores, room, self.top_k, prices, BID_STEP)
            self.bound += dual_bound(scores, room, self.top_k, prices)
            self.reached += float(scores[held].sum(dtype=np.float64))
            self.prices = prices
            chosen[start : start + self.window] = held
        return chosen


def dual_bound(
    scores: NDArray[np.float32], capacity: NDArray[np.int64], top_k: int, prices: NDArray[np.float64]
) -> float:
    """No balanced assignment has a larger sum of scores than this, whatever the prices (linear-programming duality)."""
    finite = np.where(capacity > 0, prices, 0.0)
    value = scores - np.where(capacity > 0, prices, np.inf)
    best = -np.partition(-value, top_k - 1, axis=1)[:, :top_k]
    return float(best.sum() + (finite * capacity).sum())


@dataclass
class Grouped:
    """Experts in k groups of neighbours, the best of each (expert prototyping, arXiv 2105.15082)."""

    top_k: int

    @property
    def words(self) -> str:
        """The rule."""
        return f"the best expert in each of {self.top_k} groups of neighbouring experts"

    def choose(self, logits: Floats32, shares: Floats32, token_id: NDArray[np.int32]) -> Mask:
        """Groups differ by at most one expert in size; ties go to the lower id."""
        ends = np.arange(self.top_k + 1) * logits.shape[1] // self.top_k
        chosen = np.zeros(logits.shape, bool)
        for first, stop in itertools.pairwise(ends.tolist()):
            best = first + logits[:, first:stop].argmax(1)
            chosen[np.arange(len(chosen)), best] = True
        return chosen


@dataclass
class Hash:
    """k experts for each token id, drawn once at random (hash layers, arXiv 2106.04426).

    Attributes:
        top_k: experts of a token.
        seed: of the table.
    """

    top_k: int
    seed: int

    @property
    def words(self) -> str:
        """The rule."""
        return "k experts for each token id, drawn once at random"

    def choose(self, logits: Floats32, shares: Floats32, token_id: NDArray[np.int32]) -> Mask:
        """Every id has a generator of its own, so that its experts do not depend on the other ids of the text."""
        ids, place = np.unique(token_id, return_inverse=True)
        experts = np.arange(logits.shape[1], dtype=np.uint64)
        salt = np.uint64((self.seed * 0xD1B54A32D192ED03) % 2**64)
        mixed = _scrambled(ids.astype(np.uint64)[:, None] * np.uint64(0x1_0000) + experts + salt)
        order = np.argsort(mixed, axis=1, kind="stable")[:, : self.top_k]
        table = np.zeros((len(ids), logits.shape[1]), bool)
        np.put_along_axis(table, order, True, axis=1)
        return table[place]


def _scrambled(numbers: NDArray[Any]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: numbers that look random, the same on every machine."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
