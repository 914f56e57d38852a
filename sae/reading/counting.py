"""How often, in how many documents and how strongly each latent fires."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.sae.reading.activations import Activations
from moescope.sae.reading.run_text import Ints

_NARROW = 2.0  # the histogram of equal activations spans this factor


@dataclass(frozen=True)
class Counts:
    """Of every latent; zeros and NaN where it never fires.

    Attributes:
        active, documents: [latent] tokens and documents with an activation over 0.
        mean, maximum: [latent] of the activations over 0.
        edges: [latent, bin + 1] of the histogram, at equal ratios from the smallest to the largest activation.
        bins: [latent, bin] tokens.
    """

    active: Ints
    documents: Ints
    mean: NDArray[np.float64]
    maximum: NDArray[np.float64]
    edges: NDArray[np.float32]
    bins: Ints


def counted(acts: Activations, *, bins: int) -> Counts:
    """Count, with a histogram of `bins` bins; a bin holds its lower edge, the last one its upper edge too."""
    active = acts.counts
    alive = np.flatnonzero(active)
    mean, maximum, minimum = (np.full(acts.latents, np.nan) for _ in range(3))
    if len(alive):
        first = acts.starts[:-1][alive]
        mean[alive] = np.add.reduceat(acts.value, first, dtype=np.float64) / active[alive]
        maximum[alive] = np.maximum.reduceat(acts.value, first)
        minimum[alive] = np.minimum.reduceat(acts.value, first)
    documents = np.bincount(acts.segments.latent, minlength=acts.latents).astype(np.int64)
    low = np.where(minimum < maximum, minimum, maximum / _NARROW)
    with np.errstate(invalid="ignore"):
        edges = (low[:, None] * (maximum / low)[:, None] ** (np.arange(bins + 1) / bins)).astype(np.float32)
        edges[:, 0], edges[:, -1] = low, maximum
    return Counts(active, documents, mean, maximum, edges, _histograms(acts, edges, low, maximum, bins))


def _histograms(
    acts: Activations, edges: NDArray[np.float32], low: NDArray[np.float64], high: NDArray[np.float64], bins: int
) -> Ints:
    """[latent, bin] tokens, by the logarithm and then corrected by the edges as they are stored."""
    found = np.zeros(acts.latents * bins, np.int64)
    for start in range(0, acts.latents, 512):
        stop = min(start + 512, acts.latents)
        mine = slice(int(acts.starts[start]), int(acts.starts[stop]))
        latent, value = acts.latent[mine], acts.value[mine]
        if not len(value):
            continue
        ratio = np.log(value.astype(np.float64) / low[latent]) / np.log(high[latent] / low[latent])
        number = np.clip((ratio * bins).astype(np.int64), 0, bins - 1)
        number -= value < edges[latent, number]
        number += (value >= edges[latent, number + 1]) & (number < bins - 1)
        cell = (latent.astype(np.int64) - start) * bins + number
        found[start * bins : stop * bins] = np.bincount(cell, minlength=(stop - start) * bins)
    return found.reshape(acts.latents, bins)
