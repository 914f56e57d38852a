"""Runs and gaps of every router's experts, as recorded and with tokens shuffled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.routing.consistency.decisions import (
    Longs,
    Parts,
    in_threads,
    shuffle_seeds,
    shuffles_for,
    without_repeats,
)
from moescope.routing.trace import Trace


@dataclass(frozen=True)
class RunsAndGaps:
    """Counts of one ordering of the tokens, rows being documents in parts, or (shuffled) [shuffle, part].

    Attributes:
        runs: [..., router, length] runs of an expert over consecutive tokens that last at least so long.
        missing: [..., router, width] pairs of a window and an expert that no token of it chooses.
        fresh: [..., router, width] choices of an expert that none of the `width` tokens before chose.
    """

    runs: Longs
    missing: Longs
    fresh: Longs


def runs_and_gaps(
    trace: Trace, parts: Parts, *, least: list[int], widths: list[int], times: int, seed: int
) -> tuple[RunsAndGaps, dict[str, RunsAndGaps], tuple[str, ...]]:
    """As recorded, column → shuffled, and notes. Shuffles move all tokens."""
    from moescope.routing.consistency.window_kernels import runs_and_gaps as kernel

    experts, repeats = without_repeats(trace)
    everything = np.ones(len(trace.sequence_ids), np.bool_)
    orders = {
        shuffle.column: [shuffle.order(trace, everything, g) for g in shuffle_seeds(times, seed)]
        for shuffle in shuffles_for(trace, times)
    }
    begins, lengths = trace.starts[:-1], np.diff(trace.starts)
    limits = np.array(least, np.int64), np.array(widths, np.int64)

    def of_router(number: int) -> tuple[Any, dict[str, Any]]:
        size = trace.routers[number].n_experts

        def counted(order: Longs, rows: Longs, n_rows: int) -> Any:
            return kernel(experts[number], order, begins, lengths, rows, n_rows, size, *limits)

        shuffled = {
            column: [counted(order, parts.of_each, len(parts.names)) for order in listed]
            for column, listed in orders.items()
        }
        return counted(np.arange(trace.tokens), parts.row, len(parts.part)), shuffled

    found = in_threads(of_router, range(len(trace.routers)))
    observed = RunsAndGaps(*(np.stack([one[i] for one, _ in found], 1) for i in range(3)))
    shuffled = {
        column: RunsAndGaps(
            *(np.stack([[draw[i] for draw in other[column]] for _, other in found], 2) for i in range(3))
        )
        for column in orders
    }
    return observed, shuffled, repeats


def per_part(values: NDArray[Any], rows: Longs, n_rows: int) -> NDArray[np.float64]:
    """[row, ...] sums of [sequence, ...] values; sequences of row −1 are left out."""
    total = np.zeros((n_rows, *values.shape[1:]))
    np.add.at(total, rows[rows >= 0], values[rows >= 0])
    return total
