"""Tables that predict a router's experts, learned from some tokens and judged on others: hits a token."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.routing.pathways.held_out import Halves
from moescope.routing.pathways.pairs import add_pairs
from moescope.routing.trace import Router, Trace

Hits = NDArray[np.int64]
_CELLS = 1 << 26


class Predictor:
    """Everything the tables of one run share: the halves, and the popularity that answers where a table is empty."""

    def __init__(self, trace: Trace, halves: Halves, choices: int | None) -> None:
        """`choices`: how many of each token's experts are to be predicted, in slot order; None for all."""
        self.trace, self.halves, self.choices = trace, halves, choices
        self._previous = self._previous_rows()

    def experts(self, router: Router, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        """[row, choice] the experts of those tokens, as many as count."""
        return np.ascontiguousarray(router.experts[rows, : self.choices])

    def popularity(self, router: Router) -> NDArray[np.float32]:
        """[expert] share of the fitted decisions."""
        chosen = self.experts(router, self.halves.fitted)
        return (np.bincount(chosen.ravel(), minlength=router.n_experts) / chosen.size).astype(np.float32)

    def by_popularity(self, router: Router, size: int) -> Hits:
        """Hits of the `size` most frequent experts."""
        named = best(self.popularity(router)[None], size)[0]
        hits: Hits = named[self.experts(router, self.halves.judged)].sum(1)
        return hits

    def by_token(self, router: Router, size: int) -> Hits:
        """Hits of the experts most frequent for the same token id."""
        return self._by_key(router, self.trace.token_id.astype(np.int64), size)

    def by_two_layers(self, router: Router, before: Router, last: Router, size: int) -> Hits:
        """Hits of the experts most frequent after the first choices of the two routers before."""
        key = before.experts[:, 0].astype(np.int64) * last.n_experts + last.experts[:, 0]
        return self._by_key(router, key, size)

    def by_layer(self, router: Router, last: Router, size: int) -> Hits:
        """Hits of the experts with the largest Σ P(j | i) over the experts i of the router before."""
        fitted = self.halves.fitted
        given = self.experts(last, fitted)
        table = self._transitions(given, self.experts(router, fitted), last.n_experts, router.n_experts)
        return self._summed(router, self.experts(last, self.halves.judged).astype(np.int64), table, size)

    def by_previous_token(self, router: Router, size: int) -> Hits:
        """Hits of the experts with the largest Σ P(j | i) over the experts i that the token before had here."""
        rows = self.halves.fitted[self._previous[self.halves.fitted] >= 0]
        given, target = self.experts(router, self._previous[rows]), self.experts(router, rows)
        table = self._transitions(given, target, router.n_experts, router.n_experts)
        before = self._previous[self.halves.judged]
        shown = self.experts(router, np.maximum(before, 0)).astype(np.int64)
        shown[before < 0] = -1
        return self._summed(router, shown, table, size)

    def _previous_rows(self) -> NDArray[np.int64]:
        """[token] row of the token before in the same sequence; −1 at its start."""
        before = np.arange(-1, self.trace.tokens - 1)
        before[self.trace.starts[:-1]] = -1
        return before

    @staticmethod
    def _transitions(given: NDArray[Any], target: NDArray[Any], rows: int, columns: int) -> NDArray[np.float32]:
        counts = np.zeros((1, rows, columns), np.int64)
        add_pairs(given, target, np.zeros(len(given), np.int32), counts, "all")
        total = counts[0].sum(1, keepdims=True)
        return np.asarray(counts[0] / np.maximum(total, 1), np.float32)

    def _summed(self, router: Router, given: NDArray[np.int64], table: NDArray[np.float32], size: int) -> Hits:
        from moescope.routing.pathways.pair_kernels import summed_hits

        target = self.experts(router, self.halves.judged)
        hits = np.empty(len(target), np.int64)
        summed_hits(given, table, self.popularity(router), target, size, hits)
        return hits

    def _by_key(self, router: Router, key: NDArray[np.int64], size: int) -> Hits:
        """A table of one row for each key seen in the fitted half; other keys get the popular experts."""
        fitted = self.halves.fitted
        known, row = np.unique(key[fitted], return_inverse=True)
        if len(known) * router.n_experts > _CELLS:  # rare keys have little to say: keep the common ones
            common = np.sort(np.argsort(-np.bincount(row), kind="stable")[: _CELLS // router.n_experts])
            kept = np.isin(row, common)
            known, fitted, row = known[common], fitted[kept], np.searchsorted(common, row[kept])
        chosen = self.experts(router, fitted)
        cells = row[:, None] * router.n_experts + chosen
        counts = np.bincount(cells.ravel(), minlength=len(known) * router.n_experts).reshape(len(known), -1)
        popular = self.popularity(router)
        scores = (counts + popular / 2).astype(np.float32)  # popularity breaks ties
        wanted = key[self.halves.judged]
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return self._summed(router, np.where(known[at] == wanted, at, -1)[:, None], scores, size)


def best(scores: NDArray[np.float32], size: int) -> NDArray[np.bool_]:
    """[row, expert] whether the expert is among the `size` with the highest scores; ties go to the lower id."""
    experts = scores.shape[1]
    order = np.argsort(-scores, axis=1, kind="stable")[:, : min(size, experts)]
    member = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(member, order, True, axis=1)
    return member
