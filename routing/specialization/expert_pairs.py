"""Pairs of experts counted in the decisions of a run, whole and by groups of documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.statistics import document_weights
from moescope.routing.specialization.chance_pairs import chance_pairs
from moescope.routing.trace import Router, Trace

Pairs = Literal["all", "adjacent"]
Floats = NDArray[np.float64]

# Resampling units: more documents than this are dealt into so many groups, or counts by document would not fit.
MOST_UNITS = 400


@dataclass(frozen=True)
class PairCounts:
    """Pairs of one router.

    Attributes:
        router: whose decisions.
        tokens: [expert] tokens that chose it.
        together: [expert, expert] tokens that chose both, symmetric, 0 on the diagonal.
        chance: [expert, expert] tokens expected to choose both by load alone.
    """

    router: Router
    tokens: NDArray[np.int64]
    together: NDArray[np.int64]
    chance: Floats

    @property
    def over_chance(self) -> Floats:
        """[expert, expert] observed over expected; 1 where nothing is expected."""
        return np.divide(self.together, self.chance, out=np.ones(self.chance.shape), where=self.chance > 0)


def count_router(router: Router, pairs: Pairs) -> PairCounts:
    """Count one router's pairs.

    Args:
        router: whose decisions.
        pairs: `all`, or `adjacent`: only pairs of neighbouring slots. Their expectation is the same share of all pairs.
    """
    size, k, total = router.n_experts, router.top_k, len(router.experts)
    tokens = np.bincount(router.experts.ravel(), minlength=size)
    every = _columns(size)
    counts = count_columns(router, every, np.zeros(total, np.int64), 1, pairs)[0]
    together = np.zeros((size, size), np.int64)
    upper = np.triu_indices(size, 1)
    together[upper] = counts
    together += together.T
    part = 1.0 if pairs == "all" or k < 2 else 2 / k  # k − 1 neighbours of k(k − 1) ÷ 2 pairs
    chance = part * total * chance_pairs(np.minimum(tokens / total, 1.0), k)
    return PairCounts(router, tokens, together, chance)


def count_columns(
    router: Router, column: NDArray[np.int64], unit: NDArray[np.int64], units: int, pairs: Pairs
) -> NDArray[np.int32]:
    """[unit, column] pairs counted.

    Args:
        router: whose decisions.
        column: [expert, expert] where each pair is counted, the lower id first; −1 for nowhere.
        unit: [token] its row; units: how many rows there are.
        pairs: as in `count_router`.
    """
    from moescope.routing.specialization.pair_kernels import count_pairs

    counts = np.zeros((units, int(column.max(initial=-1)) + 1), np.int32)
    step = max(router.top_k - 1, 1) if pairs == "all" else 1
    count_pairs(router.experts, unit, column, step, counts)
    return counts


def _columns(size: int) -> NDArray[np.int64]:
    """[expert, expert] a number for each pair, lower id first."""
    column = np.full((size, size), -1, np.int64)
    upper = np.triu_indices(size, 1)
    column[upper] = np.arange(len(upper[0]))
    return column


def resampling_units(trace: Trace, seed: int) -> tuple[NDArray[np.int64], int]:
    """[token] the document, or the group of documents dealt together where there are more than 400; and how many."""
    if trace.n_documents <= MOST_UNITS:
        return trace.document.astype(np.int64), trace.n_documents
    dealt = np.random.default_rng(seed).permutation(trace.n_documents) % MOST_UNITS
    return dealt[trace.document].astype(np.int64), MOST_UNITS


def conditional_interval(
    found: PairCounts,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    unit: NDArray[np.int64],
    units: int,
    *,
    pairs: Pairs,
    draws: int,
    seed: int,
) -> tuple[Floats, Floats]:
    """[pair] bounds of the share of `first`'s tokens that also chose `second`, by resampling units; NaN where one unit."""
    if units < 2:
        return np.full(len(first), np.nan), np.full(len(first), np.nan)
    size = found.router.n_experts
    low_id, high_id = np.minimum(first, second), np.maximum(first, second)
    present, where = np.unique(low_id * size + high_id, return_inverse=True)
    column = np.full((size, size), -1, np.int64)
    column[present // size, present % size] = np.arange(len(present))
    together = count_columns(found.router, column, unit, units, pairs)
    cell = (unit * size)[:, None] + found.router.experts
    tokens = np.bincount(cell.ravel(), minlength=units * size).reshape(units, size)
    weights = document_weights(units, draws=draws, seed=seed).astype(np.float32)  # exact: counts stay below 2^24 a draw
    both = (weights @ together.astype(np.float32))[:, where]
    chosen = (weights @ tokens.astype(np.float32))[:, first]
    share = np.divide(both, chosen, out=np.full(both.shape, np.nan, np.float32), where=chosen > 0)
    return _bounds(share)


def _bounds(values: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """2.5 % and 97.5 % quantiles along the first axis, of what is a number."""
    missing = np.isnan(values).any(axis=0)
    low, high = np.quantile(np.where(missing, 0.0, values), (0.025, 0.975), axis=0)
    for place in np.flatnonzero(missing):
        known = values[~np.isnan(values[:, place]), place]
        low[place], high[place] = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return low.astype(np.float64), high.astype(np.float64)


def chosen_routers(trace: Trace, layer: int | None) -> tuple[Router, ...]:
    """The routers of one layer, or all; raises `InputError` for a layer without one."""
    found = tuple(router for router in trace.routers if layer is None or router.layer == layer)
    if not found:
        raise InputError(
            f"run {trace.run.name!r} has no router in layer {layer}",
            expected=f"a layer of {', '.join(dict.fromkeys(str(router.layer) for router in trace.routers))}",
        )
    return found
