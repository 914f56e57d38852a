"""Sums over the tokens routed to each expert, document by document: what every importance measure is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.trace import Router, Trace

Gate = Literal["given", "renormalised", "softmax"]
Array = NDArray[np.float64]

_NORMS = """
    SELECT token, norms
    FROM expert_outputs
    WHERE run_id = $run AND layer = $layer AND block = $block
    ORDER BY token
"""
LOGITS = """
    SELECT token, logits
    FROM router_logits
    WHERE run_id = $run AND layer = $layer AND block = $block
    ORDER BY token
"""
# Documents beyond this many are resampled in bundles, so that sums of many short texts fit into memory.
_UNITS = 4096


@dataclass(frozen=True)
class ExpertSums:
    """Sums over routed tokens of one router; the leading axis is the unit of resampling, the last the expert.

    Attributes:
        router: whose they are.
        tokens: [unit, 1] tokens; `weighed` those with a weight for every slot.
        count: [unit, expert] tokens routed to the expert.
        weight: sum of weights; None where there are none.
        norm, normed: sum of ‖f‖ and the tokens it runs over; None where no norms of slots are recorded.
        weighted, both: sum of g·‖f‖ and the tokens it runs over.
    """

    router: Router
    tokens: Array
    count: Array
    weighed: Array
    weight: Array | None = None
    norm: Array | None = None
    normed: Array | None = None
    weighted: Array | None = None
    both: Array | None = None


def resampling_units(trace: Trace, *, seed: int) -> tuple[NDArray[np.int64], int, tuple[str, ...]]:
    """[token] unit of resampling, how many there are, and what to say: documents, bundled at random where they are many."""
    documents = trace.n_documents
    if documents <= _UNITS:
        return trace.document.astype(np.int64), documents, ()
    bundle = np.random.default_rng(seed).permutation(documents) % _UNITS
    note = f"{documents:,} documents are resampled in {_UNITS:,} random bundles."
    return bundle[trace.document].astype(np.int64), _UNITS, (note,)


def slot_weights(trace: Trace, router: Router, gate: Gate) -> NDArray[np.float64] | None:
    """[token, k] weights as asked for, NaN where a token has none; None where the router has none at all.

    Args:
        trace: decisions of the run.
        router: one of its routers.
        gate: `given`, as the experts were given them; `renormalised`, divided by their sum over the token's slots;
            `softmax`, of all the router's logits, which must be recorded.

    Raises:
        InputError: `softmax` without recorded logits.
    """
    if gate == "softmax":
        return _softmax(trace, router)
    weights = trace.weights(router).astype(np.float64)
    if np.isnan(weights).all():
        return None
    if gate == "renormalised":
        total = weights.sum(axis=1, keepdims=True)
        weights = np.divide(weights, total, out=np.full_like(weights, np.nan), where=total > 0)
    return weights


def slot_norms(trace: Trace, router: Router) -> NDArray[np.float64] | None:
    """[token, k] L2 norms of each slot's output before its weight, NaN where not recorded; None where none are."""
    return listed(trace, router, _NORMS, router.top_k)


def expert_sums(
    trace: Trace, router: Router, unit: NDArray[np.int64], units: int, *, gate: Gate, norms: bool
) -> ExpertSums:
    """Sum over the tokens of each unit.

    Args:
        trace, router: where the decisions lie.
        unit: [token] unit of resampling, 0 to `units` − 1.
        units: how many there are.
        gate: which weights.
        norms: whether to look for norms of slots.
    """
    weights = slot_weights(trace, router, gate)
    sizes = slot_norms(trace, router) if norms else None
    total = _Totals(router, unit, units)
    tokens = np.bincount(unit, minlength=units).astype(np.float64)[:, None]
    parts: dict[str, Any] = {"tokens": tokens, "weighed": tokens, "count": total.of(None, None)[0]}
    if weights is not None:
        known = _whole(weights)
        parts["weight"] = total.of(weights, known)[0]
        parts["weighed"] = np.bincount(unit[known], minlength=units).astype(np.float64)[:, None]
    if sizes is not None:
        parts["norm"], parts["normed"] = total.of(sizes, _whole(sizes))
    if weights is not None and sizes is not None:
        products = weights * sizes
        parts["weighted"], parts["both"] = total.of(products, _whole(products))
    return ExpertSums(router=router, **parts)


class _Totals:
    """Sums by unit and expert of values that lie slot by slot."""

    def __init__(self, router: Router, unit: NDArray[np.int64], units: int) -> None:
        self._cell = unit[:, None] * router.n_experts + router.experts
        self._shape = (units, router.n_experts)
        self._count: Array | None = None

    def of(self, values: Array | None, known: NDArray[np.bool_] | None) -> tuple[Array, Array]:
        """Sum of values and how many there are; of all tokens, or of those known. Without values both are counts."""
        if known is not None and known.all():
            known = None
        if known is None:
            if self._count is None:
                self._count = self._counted(self._cell.ravel(), None)
            count = self._count
        else:
            count = self._counted(self._cell[known].ravel(), None)
        if values is None:
            return count, count
        cells = self._cell if known is None else self._cell[known]
        return self._counted(cells.ravel(), (values if known is None else values[known]).ravel()), count

    def _counted(self, cells: NDArray[np.int64], values: Array | None) -> Array:
        size = self._shape[0] * self._shape[1]
        return np.bincount(cells, values, minlength=size).astype(np.float64).reshape(self._shape)


def _whole(values: Array) -> NDArray[np.bool_]:
    """[token] whether every slot has a value."""
    return np.asarray(np.isfinite(values).all(axis=1), np.bool_)


def _softmax(trace: Trace, router: Router) -> Array:
    logits = listed(trace, router, LOGITS, router.n_experts)
    if logits is None:
        raise InputError(
            f"run {trace.run.name!r} has no router logits of {router.name}, so there is no softmax over all experts",
            fix='record with --probe router_logits, or take the weights as given (gate="given")',
        )
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    chosen: Array = np.take_along_axis(odds, router.experts.astype(np.int64), axis=1) / odds.sum(axis=1, keepdims=True)
    return chosen


def listed(trace: Trace, router: Router, query: str, width: int) -> Array | None:
    """[token, width] of the list column that `query` gives beside its token, NaN where a token has no whole list.

    None where the router has no rows.
    """
    found = trace.run.sql(query, {"layer": router.layer, "block": router.block}).to_arrow_table()
    if not found.num_rows:
        return None
    rows, listed = np.asarray(found.column(0)), found.column(1).combine_chunks()
    whole = np.asarray(listed.value_lengths().fill_null(0)) == width
    if not whole.any():
        return None
    values = np.asarray(listed.filter(pa.array(whole)).flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)
    rows = rows[whole]
    if len(rows) == trace.tokens and bool((rows == trace.token).all()):
        return values.astype(np.float64)
    at = np.minimum(np.searchsorted(rows, trace.token), len(rows) - 1)
    there = rows[at] == trace.token
    aligned = np.full((trace.tokens, width), np.nan)
    aligned[there] = values[at[there]]
    return aligned
