"""Rules that let each token have as many experts as pass a threshold: top-p, ratio, gap, null experts.

Each gives every expert of a token a cost; the token's experts are those whose cost is at most a limit. So the limit at which
tokens have k experts on average is an order statistic of the costs.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError

Floats32 = NDArray[np.float32]
Mask = NDArray[np.bool_]
Costs = NDArray[np.float64]


class ThresholdRule(Protocol):
    """A rule with one threshold."""

    symbol: str
    words: str

    def costs(self, logits: Floats32, shares: Floats32) -> Costs:
        """[token, expert]; the expert is chosen where this is at most the limit."""

    def choose(self, logits: Floats32, shares: Floats32, limit: float) -> Mask:
        """[token, expert] whether the expert is chosen."""

    def value(self, limit: float) -> float:
        """The limit as the rule's own parameter."""

    def limit(self, value: float) -> float:
        """The rule's own parameter as a limit; raises `InputError` where it makes no sense."""


class TopP:
    """The fewest experts whose probabilities sum to p or more (arXiv 2403.07652)."""

    symbol = "p"
    words = "the fewest experts whose probabilities sum to at least p"

    def costs(self, logits: Floats32, shares: Floats32) -> Costs:
        """Probability of all experts ranked before, ties by lower id."""
        order = np.argsort(-shares, axis=1, kind="stable")
        mass = np.cumsum(np.take_along_axis(shares, order, 1), axis=1, dtype=np.float64)
        before = np.zeros_like(mass)
        before[:, 1:] = mass[:, :-1]
        found = np.empty_like(mass)
        np.put_along_axis(found, order, before, 1)
        return found

    def choose(self, logits: Floats32, shares: Floats32, limit: float) -> Mask:
        """The expert that crosses p is included."""
        from moescope.routing.counterfactuals.threshold_kernels import largest_until

        found: Mask = largest_until(shares, limit)
        return found

    def value(self, limit: float) -> float:
        """The smallest p that goes beyond a mass of `limit`."""
        return float(np.nextafter(limit, 2.0))

    def limit(self, value: float) -> float:
        """Mass before the last expert is below p."""
        if not 0 < value <= 1:
            raise InputError(f"p = {value:g} is no probability mass", expected="above 0, at most 1")
        return float(np.nextafter(value, -1.0))


class Ratio:
    """Experts whose score is at least r times the token's best (arXiv 2402.14800 for two experts)."""

    symbol = "r"
    words = "experts whose probability is at least r times the token's largest"

    def costs(self, logits: Floats32, shares: Floats32) -> Costs:
        """Minus the ratio."""
        found: Costs = -(shares / shares.max(1, keepdims=True)).astype(np.float64)
        return found

    def choose(self, logits: Floats32, shares: Floats32, limit: float) -> Mask:
        """The best expert always passes."""
        found: Mask = shares / shares.max(1, keepdims=True) >= np.float64(-limit)
        return found

    def value(self, limit: float) -> float:
        """r"""
        return -limit

    def limit(self, value: float) -> float:
        """r is a part of the largest."""
        if not 0 <= value <= 1:
            raise InputError(f"r = {value:g} is no ratio to the largest probability", expected="from 0 to 1")
        return -value


class Gap:
    """Experts whose probability lies at most T below the token's best (arXiv 2310.07188 for two experts)."""

    symbol = "T"
    words = "experts whose probability is at most T below the token's largest"

    def costs(self, logits: Floats32, shares: Floats32) -> Costs:
        """The gap."""
        found: Costs = (shares.max(1, keepdims=True) - shares).astype(np.float64)
        return found

    def choose(self, logits: Floats32, shares: Floats32, limit: float) -> Mask:
        """The best expert always passes."""
        found: Mask = shares.max(1, keepdims=True) - shares <= np.float64(limit)
        return found

    def value(self, limit: float) -> float:
        """T"""
        return limit

    def limit(self, value: float) -> float:
        """T is a difference of probabilities."""
        if not 0 <= value <= 1:
            raise InputError(f"T = {value:g} is no difference of probabilities", expected="from 0 to 1")
        return value


class NullExperts:
    """Real experts among the top slots when null experts of logit b compete (AdaMoE, arXiv 2406.13233).

    Args:
        slots: k′, how many a token chooses, null experts included.
        nulls: how many null experts there are.
    """

    symbol = "b"

    def __init__(self, slots: int, nulls: int) -> None:
        self.slots, self.nulls = slots, nulls
        self.words = f"real experts among the {slots} highest logits when {nulls} null experts with logit b compete"

    def costs(self, logits: Floats32, shares: Floats32) -> Costs:
        """Minus the logit; never for experts beyond the slots, always for those that nulls are too few to displace."""
        found = -logits.astype(np.float64)
        rank = np.empty(found.shape, np.int64)
        order = np.argsort(found, axis=1, kind="stable")
        np.put_along_axis(rank, order, np.arange(found.shape[1])[None, :], 1)
        found[rank >= self.slots] = np.inf
        found[rank < self.slots - self.nulls] = -np.inf
        return found

    def choose(self, logits: Floats32, shares: Floats32, limit: float) -> Mask:
        """An expert that ties with the nulls is chosen."""
        from moescope.routing.counterfactuals.threshold_kernels import within_slots

        found: Mask = within_slots(logits, -limit, self.slots, self.slots - self.nulls)
        return found

    def value(self, limit: float) -> float:
        """b"""
        return -limit

    def limit(self, value: float) -> float:
        """b is a logit."""
        return -value


def tuned_limit(costs: Costs, wanted: float) -> float:
    """The smallest limit at which at least `wanted` experts are chosen in all."""
    flat = costs.ravel()
    place = min(max(round(wanted) - 1, 0), len(flat) - 1)
    return float(np.partition(flat, place)[place])
