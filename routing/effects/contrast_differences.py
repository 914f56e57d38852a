"""Differences of activation between two sets of prompts, with shuffles and resamples of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import benjamini_hochberg, document_weights
from moescope.routing.effects.contrast_sides import Array, Sides

Measure = Literal["risk_difference", "prompt_mean", "resonance"]

_TAILS = (0.025, 0.975)
_BLOCK = 1024  # cells at once: shuffles of all of a large model's would not fit into memory
_CHUNK = 64  # shuffles at once: [shuffle, prompt] @ [prompt, expert] stays small beside the records
_SAME = 1e-12  # sums of the same numbers in another order differ by less


@dataclass(frozen=True)
class Difference:
    """A measure of two sets, cell by cell; a cell is an expert of a router.

    Attributes:
        a, b: [cell] the measure of either set.
        low, high: [cell] bootstrap bounds of a − b; NaN where a set has one prompt.
        null: [cell] mean of |a − b| over shuffles.
        null_low, null_high: [cell] 2.5 % and 97.5 % of a − b over shuffles.
        p, q: [cell] two-sided probability under shuffles, and the false-discovery rate over all cells that anyone chose.
    """

    a: Array
    b: Array
    low: Array
    high: Array
    null: Array
    null_low: Array
    null_high: Array
    p: Array
    q: Array

    @property
    def value(self) -> Array:
        """[cell] a − b."""
        return self.a - self.b


def difference(sides: Sides, measure: Measure, *, permutations: int, draws: int, seed: int) -> Difference:
    """The measure of both sets and how sure their difference is.

    Args:
        sides: the prompts.
        measure: `risk_difference`, sums over the set's tokens; `prompt_mean`, mean over prompts of a prompt's share of
            tokens; `resonance`, mean over prompts of a prompt's sum.
        permutations: shuffles of the sets over prompts.
        draws: bootstrap resamples of prompts, each set by itself.
        seed: of both.
    """
    blocks = [
        _of_block(sides, measure, slice(start, start + _BLOCK), permutations, draws, seed)
        for start in range(0, sides.sums.shape[1], _BLOCK)
    ]
    a, b, low, high, null, null_low, null_high, p = (np.concatenate(column) for column in zip(*blocks, strict=True))
    used = sides.sums.any(0)
    q = np.ones_like(p)
    q[used] = benjamini_hochberg(p[used])
    return Difference(a, b, low, high, null, null_low, null_high, p, q)


def _of_block(
    sides: Sides, measure: Measure, cells: slice, permutations: int, draws: int, seed: int
) -> tuple[Array, ...]:
    """Some of the cells: both sets, bounds, what shuffles give, and p. Every block sees the same shuffles."""
    numerator, denominator = _parts(sides, measure, cells)
    a, b = _means(sides.first[None].astype(np.float64), numerator, denominator)
    low, high = _interval(sides.first, numerator, denominator, draws, seed)
    shuffled = _shuffled(sides.first, numerator, denominator, permutations, seed)
    drawn = np.concatenate([x - y for x, y in shuffled])
    observed = np.abs(a - b)[0]
    at_least = (np.abs(drawn) >= observed * (1 - _SAME) - _SAME).sum(0)
    null_low, null_high = np.quantile(drawn, _TAILS, axis=0)
    return a[0], b[0], low, high, np.abs(drawn).mean(0), null_low, null_high, (1.0 + at_least) / (1.0 + permutations)


def _parts(sides: Sides, measure: Measure, cells: slice) -> tuple[Array, Array]:
    """[prompt, cell] and [prompt]: the measure of a set is the ratio of their sums over its prompts."""
    sums = sides.sums[:, cells].astype(np.float64)
    if measure == "risk_difference":
        return sums, sides.tokens
    ones = np.ones_like(sides.tokens)
    return (sums / sides.tokens[:, None] if measure == "prompt_mean" else sums), ones


def _means(member: Array, numerator: Array, denominator: Array) -> tuple[Array, Array]:
    """[draw, cell] of the prompts in a set and of those outside; `member` is [draw, prompt]."""
    outside = 1.0 - member
    return (
        (member @ numerator) / (member @ denominator)[:, None],
        (outside @ numerator) / (outside @ denominator)[:, None],
    )


def _shuffled(
    first: NDArray[np.bool_], numerator: Array, denominator: Array, permutations: int, seed: int
) -> Iterator[tuple[Array, Array]]:
    generator = np.random.default_rng(seed)
    for start in range(0, permutations, _CHUNK):
        size = min(_CHUNK, permutations - start)
        member = generator.permuted(np.tile(first.astype(np.float64), (size, 1)), axis=1)
        yield _means(member, numerator, denominator)


def _interval(
    first: NDArray[np.bool_], numerator: Array, denominator: Array, draws: int, seed: int
) -> tuple[Array, Array]:
    """[cell] percentile bounds of the difference, prompts drawn anew within each set."""
    if min(int(first.sum()), int((~first).sum())) < 2:
        return np.full(numerator.shape[1], np.nan), np.full(numerator.shape[1], np.nan)
    resampled: Any = 0.0
    for number, mine in enumerate((first, ~first)):
        weights = document_weights(int(mine.sum()), draws=draws, seed=seed + number).astype(np.float64)
        side = (weights @ numerator[mine]) / (weights @ denominator[mine])[:, None]
        resampled = side - resampled if number == 0 else resampled - side
    low, high = np.quantile(resampled, _TAILS, axis=0)
    return low, high
