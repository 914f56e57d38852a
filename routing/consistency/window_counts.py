"""How often experts are chosen within windows: the histograms from which local consistency follows, at every level."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from moescope.routing.consistency.decisions import (
    Parts,
    Shuffle,
    chance,
    in_threads,
    shuffle_seeds,
)
from moescope.routing.consistency.segment_performance import binomial_histogram
from moescope.routing.trace import Router, Trace

T = TypeVar("T")
Longs = NDArray[np.int64]
Level = Literal["model", "layer", "expert", "label"]
# Histograms of single experts are made for so many experts at a time that they fit in about this many numbers.
_HELD = 16_000_000


@dataclass(frozen=True)
class Block:
    """Groups that are reported apart, with everything that is known of their windows.

    Attributes:
        names: layer, block, expert, label → a value for each group, those that apply.
        observed: [document, group, m + 1] (window, expert) pairs by how often the window chooses the expert.
        shuffled: column → [shuffle, group, m + 1], the same where tokens change places.
        null: [group, m + 1] what independent balanced choices give, of any scale.
        windows: how many windows each group has.
    """

    names: Mapping[str, list[Any]]
    observed: Longs
    shuffled: Mapping[str, Longs]
    null: NDArray[np.float64]
    windows: int


@dataclass(frozen=True)
class WindowCounts:
    """Window counts of a trace at one segment length; see `each_block`.

    `parts` holds only sequences that have a window: see `window_counts`.
    """

    trace: Trace
    experts: list[NDArray[np.uint16]]
    parts: Parts
    segment: int
    shuffles: tuple[Shuffle, ...]
    times: int
    seed: int

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[sequence] whether it has a window and belongs to a part."""
        return self.parts.row >= 0

    @property
    def windows(self) -> Longs:
        """[part] windows in it."""
        each = np.diff(self.trace.starts)[self.kept] - self.segment + 1
        return np.bincount(self.parts.of_each[self.kept], each, len(self.parts.names)).astype(np.int64)

    def each_block(self, level: Level, work: Callable[[Block], T]) -> list[T]:
        """`work` of every block of the level asked for: one for all that is pooled, or those of single experts."""
        orders = self._orders()
        if level != "expert":
            return [work(block) for block in self._pooled(level, orders)]
        routers = range(len(self.trace.routers))
        done = in_threads(lambda number: [work(block) for block in self._of_experts(number, orders)], routers)
        return [one for listed in done for one in listed]

    def _pooled(self, level: Level, orders: Mapping[str, list[Longs]]) -> Iterator[Block]:
        counted = in_threads(partial(self._count, orders=orders), range(len(self.trace.routers)))
        observed = np.concatenate([one for one, _ in counted], 1)
        shuffled = {c: np.concatenate([other[c] for _, other in counted], 2) for c in orders}
        null = np.stack([_null(router, self.segment) * router.n_experts for router in self.trace.routers])
        if level == "layer":
            routers = self.trace.routers
            names: dict[str, list[Any]] = {"layer": [r.layer for r in routers], "block": [r.block for r in routers]}
            flat = {column: values[:, 0] for column, values in shuffled.items()}
            yield Block(names, observed, flat, null, int(self.windows.sum()))
            return
        observed, null = observed.sum(1, keepdims=True), null.sum(0, keepdims=True)
        for number, name in enumerate(self.parts.names):
            if windows := int(self.windows[number]):
                summed = {column: values[:, number].sum(1, keepdims=True) for column, values in shuffled.items()}
                names = {"label": [name]} if level == "label" else {}
                yield Block(names, observed[self.parts.part == number], summed, null, windows)

    def _of_experts(self, number: int, orders: Mapping[str, list[Longs]]) -> Iterator[Block]:
        router = self.trace.routers[number]
        step = max(1, _HELD // (len(self.parts.part) * (self.segment + 1)))
        for first in range(0, router.n_experts, step):
            chosen = range(first, min(first + step, router.n_experts))
            observed, shuffled = self._count(number, orders, chosen)
            size = len(chosen)
            names: dict[str, list[Any]] = {
                "layer": [router.layer] * size,
                "block": [router.block] * size,
                "expert": list(chosen),
            }
            flat = {column: values[:, 0] for column, values in shuffled.items()}
            null = np.tile(_null(router, self.segment), (size, 1))
            yield Block(names, observed, flat, null, int(self.windows.sum()))

    def _count(
        self, number: int, orders: Mapping[str, list[Longs]], chosen: range | None = None
    ) -> tuple[Longs, dict[str, Longs]]:
        """One router's histograms: [row, column, m + 1] as recorded, and [shuffle, part, column, m + 1] shuffled.

        Without `chosen` its experts are summed into one column.
        """
        from moescope.routing.consistency.window_kernels import window_histogram

        size = self.trace.routers[number].n_experts
        columns = np.full(size + 1, -1, np.int64)
        columns[:size] = 0
        if chosen is not None:
            columns[:] = -1
            columns[chosen.start : chosen.stop] = np.arange(len(chosen))
        kept, parts = self.kept, self.parts
        begins, lengths = self.trace.starts[:-1][kept], np.diff(self.trace.starts)[kept]

        def histogram(order: Longs, rows: Longs, n_rows: int) -> Longs:
            n_columns = 1 if chosen is None else len(chosen)
            found: Longs = window_histogram(
                self.experts[number], order, begins, lengths, rows[kept], n_rows, columns, n_columns, self.segment
            )
            return found

        observed = histogram(np.arange(self.trace.tokens), parts.row, len(parts.part))
        shuffled = {
            column: np.stack([histogram(order, parts.of_each, len(parts.names)) for order in listed])
            for column, listed in orders.items()
        }
        return observed, shuffled

    def _orders(self) -> dict[str, list[Longs]]:
        """A column's shuffled orders of the tokens of those sequences that have a window."""
        return {
            shuffle.column: [
                shuffle.order(self.trace, self.kept, generator)
                for generator in shuffle_seeds(self.times, self.seed, self.segment)
            ]
            for shuffle in self.shuffles
        }


def window_counts(
    trace: Trace,
    experts: list[NDArray[np.uint16]],
    parts: Parts,
    segment: int,
    *,
    shuffles: tuple[Shuffle, ...],
    times: int,
    seed: int,
) -> WindowCounts:
    """Window counts over the sequences of `parts` that have at least `segment` tokens.

    Args:
        experts: decisions of each router, repeats marked.
        shuffles, times: controls and how often each is drawn.
    """
    long_enough = np.diff(trace.starts) >= segment
    return WindowCounts(trace, experts, parts.of_sequences(long_enough), segment, shuffles, times, seed)


def _null(router: Router, segment: int) -> NDArray[np.float64]:
    return binomial_histogram(segment, chance(router))
