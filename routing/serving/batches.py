"""Batches: the tokens that are served together, and the loads they put on experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.trace import Router, Trace


@dataclass(frozen=True)
class Batches:
    """Consecutive tokens cut into batches.

    Attributes:
        rows: [token] rows of the trace, those of a batch one after another.
        starts: [batch + 1] where each batch begins in `rows`.
        document: [batch] index of the document in which the batch begins, 0-based and dense.
        left_out: tokens of a last batch that would not be full.
    """

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    document: NDArray[np.int64]
    left_out: int

    @property
    def count(self) -> int:
        """How many batches there are."""
        return len(self.starts) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[batch] tokens."""
        return np.diff(self.starts)

    @property
    def number(self) -> NDArray[np.int64]:
        """[token] the batch it is in."""
        return np.repeat(np.arange(self.count), self.sizes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of tokens left out."""
        return (f"The last {self.left_out:,} tokens, which fill no batch, are left out.",) if self.left_out else ()

    def require_loads(self, loads: Sequence[NDArray[np.float64]]) -> None:
        """Raise `InputError` where not one decision of these [batch, expert] loads is for an expert that computes."""
        if not any(part.any() for part in loads):
            raise InputError(
                "no decision is for an expert that computes, so no device has anything to do",
                found="null experts only",
                fix="analyse another run, or other blocks",
            )

    def loads(self, router: Router) -> NDArray[np.float64]:
        """[batch, expert] decisions, null experts left out."""
        real = router.n_experts - router.n_null
        experts = router.experts[self.rows]
        cells = self.number[:, None] * router.n_experts + experts
        counts = np.bincount(cells.ravel(), minlength=self.count * router.n_experts)
        return counts.reshape(self.count, -1)[:, :real].astype(np.float64)


def cut(trace: Trace, size: int | None, rows: NDArray[np.int64] | None = None) -> Batches:
    """Cut tokens into batches in the order of the run.

    Args:
        trace: the decisions.
        size: tokens of a batch; a last batch that is not full is left out, unless it is the only one. None makes each sequence
            a batch.
        rows: rows of the trace that take part; None for all.
    """
    rows = np.arange(trace.tokens) if rows is None else rows
    if size is None:
        sequence = trace.sequence[rows]
        edges = np.flatnonzero(np.diff(sequence)) + 1
        starts = np.concatenate([[0], edges, [len(rows)]]).astype(np.int64)
    else:
        whole = max(len(rows) // size, 1)
        starts = np.minimum(np.arange(whole + 1, dtype=np.int64) * size, len(rows))
    _, document = np.unique(trace.document[rows[starts[:-1]]], return_inverse=True)
    return Batches(rows[: starts[-1]], starts, document.astype(np.int64), len(rows) - int(starts[-1]))


def balanced_router(router: Router, tokens: int, generator: np.random.Generator) -> Router:
    """A router that draws its experts at random, every set alike, for as many tokens; null experts are experts to it."""
    from moescope.routing.serving.batch_kernels import random_sets

    drawn: NDArray[Any] = random_sets(tokens, router.top_k, router.n_experts, int(generator.integers(2**31)))
    return Router(router.layer, router.block, router.n_experts, router.n_null, drawn)
