"""Segment routing best performance in plain NumPy: window counts by doubling, nothing compiled.

For tests and for timing beside `moescope.routing.consistency`; it imports nothing of moescope.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]


def window_histograms(experts: Ints, n_experts: int, starts: Ints, segments: Sequence[int]) -> dict[int, Ints]:
    """[sequence, m + 1] (window, expert) pairs of one router, by how often the window chooses the expert.

    Args:
        experts: [token, k] distinct ids; starts: [sequence + 1] first token of each sequence.
        segments: window lengths m, powers of two.
    """
    lengths = np.diff(starts)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    left = np.repeat(starts[1:], lengths) - np.arange(len(experts))
    counts = np.zeros((len(experts), n_experts), np.int16)
    np.put_along_axis(counts, experts.astype(np.int64), 1, axis=1)
    found, width = {}, 1
    for segment in sorted(segments):
        while width < segment:
            # A window of 2w tokens is one of w tokens and the one that follows it.
            counts[:-width] += counts[width:]
            width *= 2
        whole = left >= segment
        keys = sequence[whole, None] * (segment + 1) + counts[whole]
        size = len(lengths) * (segment + 1)
        found[segment] = np.bincount(keys.ravel(), minlength=size).reshape(len(lengths), segment + 1)
    return found


def best_f1(histogram: Ints) -> float:
    """max over θ of 2·TP ÷ (P + A) from [m + 1] pairs."""
    segment = len(histogram) - 1
    at_least = histogram[::-1].cumsum()[::-1]
    hits = (histogram * np.arange(segment + 1))[::-1].cumsum()[::-1]
    return float(np.max(2 * hits / np.maximum(segment * at_least + hits[0], 1)))


def srp(routers: Sequence[tuple[Ints, int]], starts: Ints, segments: Sequence[int]) -> dict[int, float]:
    """SRP of a model at each length, counts summed over routers; `routers` are pairs of ids [token, k] and E."""
    totals: dict[int, Ints] = {}
    for experts, n_experts in routers:
        for segment, histogram in window_histograms(experts, n_experts, starts, segments).items():
            totals[segment] = totals.get(segment, 0) + histogram.sum(0)
    return {segment: best_f1(total) for segment, total in totals.items()}


def bootstrap(histograms: Ints, *, draws: int, seed: int) -> tuple[float, float]:
    """Basic bootstrap interval from [sequence, m + 1] pairs, a sequence being a document."""
    generator = np.random.default_rng(seed)
    number = len(histograms)
    values = np.sort([best_f1(histograms[generator.integers(number, size=number)].sum(0)) for _ in range(draws)])
    tail = round(draws * 0.025)
    middle = 2 * best_f1(histograms.sum(0))
    return middle - float(values[draws - tail]), middle - float(values[tail])
