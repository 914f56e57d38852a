"""Filling experts to their capacity, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.routing.pathways.router_logits import read_logits
from moescope.routing.serving.batches import Batches
from moescope.routing.trace import Router, Trace

Priority = Literal["slot", "token", "weight"]


class Filling:
    """Which decisions find room in each batch, in order of priority."""

    def __init__(self, trace: Trace, batches: Batches, priority: Priority, minimum: int) -> None:
        if priority == "weight":
            trace.require_weights()
        self.trace, self.batches, self.priority, self.minimum = trace, batches, priority, minimum
        self._orders: dict[Any, NDArray[np.int64]] = {}
        self._preferences: tuple[tuple[int, str], NDArray[np.uint16]] | None = None

    def capacity(self, router: Router, factor: float) -> NDArray[np.int64]:
        """[batch] decisions one expert takes."""
        real = max(router.n_experts - router.n_null, 1)
        # the product of round numbers may lie a hair above the whole number it is
        fair = np.ceil(np.round(factor * self.batches.sizes * router.top_k / real, 9))
        return np.maximum(self.minimum, fair).astype(np.int64)

    def slots_per_decision(self, router: Router, factor: float) -> float:
        """Slots provided for each decision that is to be placed."""
        real = router.n_experts - router.n_null
        return float(self.capacity(router, factor).sum() * real / (len(self.batches.rows) * router.top_k))

    def refusals(self, router: Router, factors: Sequence[float]) -> NDArray[np.uint16]:
        """[token of the batches, k] at how many of the factors, which ascend, the decision finds no room: the first so many."""
        from moescope.routing.serving.batch_kernels import fill

        experts = router.experts[self.batches.rows]
        found = np.zeros(experts.shape, np.uint16)
        real = router.n_experts - router.n_null
        capacity = np.stack([self.capacity(router, factor) for factor in factors], axis=1)
        fill(experts, self.batches.starts, capacity, real, self.order(router), found)
        return found

    def rerouted(self, router: Router, kept: NDArray[np.bool_], factor: float) -> NDArray[np.bool_]:
        """[token of the batches, k] whether a decision without room found some at its token's next choices."""
        from moescope.routing.serving.batch_kernels import reroute

        experts = router.experts[self.batches.rows]
        ranked = self._ranked(router)
        placed = np.zeros(experts.shape, np.bool_)
        real = router.n_experts - router.n_null
        capacity, order = self.capacity(router, factor), self.order(router)
        reroute(experts, kept, ranked, self.batches.starts, capacity, real, order, placed)
        return placed

    def _ranked(self, router: Router) -> NDArray[np.uint16]:
        """[token of the batches, expert] ids by falling logit; of the router looked at last."""
        key = (router.layer, router.block)
        if self._preferences is None or self._preferences[0] != key:
            scores = read_logits(self.trace.run, router, self.trace.token[self.batches.rows])
            self._preferences = key, np.argsort(-scores, axis=1, kind="stable").astype(np.uint16)
        return self._preferences[1]

    def order(self, router: Router) -> NDArray[np.int64]:
        """[token × k] flat numbers of decisions in order of priority, batch by batch."""
        key = (router.layer, router.block) if self.priority == "weight" else router.top_k
        if key not in self._orders:
            if self.priority == "weight":
                self._orders.clear()
            self._orders[key] = self._sorted(router)
        return self._orders[key]

    def _sorted(self, router: Router) -> NDArray[np.int64]:
        tokens, k = len(self.batches.rows), router.top_k
        if self.priority == "token":
            return np.arange(tokens * k)
        batch = np.repeat(self.batches.number, k)
        if self.priority == "slot":
            return np.lexsort((np.tile(np.arange(k), tokens), batch))
        # Ties of weight, and balanced routers, which have none of their own, go by token and slot.
        weights = self.trace.weights(router)[self.batches.rows].ravel()
        return np.lexsort((-np.nan_to_num(weights), batch))
