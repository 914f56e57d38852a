"""Pairs of latents that fire together: how many tokens, latent by latent, and what documents alone would give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import document_weights
from moescope.sae.reading.activations import Activations
from moescope.sae.reading.run_text import Ints

_BLOCK = 256
_TAILS = (0.025, 0.975)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Together:
    """Some pairs of latents.

    Attributes:
        first, second: [pair] latents.
        tokens: [pair] tokens on which both fire.
        expected: [pair] tokens on which both would, were they independent within every document at the rates they have there.
        value, low, high, null: [pair] the measure, its bounds over documents, and the measure of `expected`.
    """

    first: Ints
    second: Ints
    tokens: Ints
    expected: Floats
    value: Floats
    low: Floats
    high: Floats
    null: Floats

    def __len__(self) -> int:
        return len(self.first)


def counts_together(acts: Activations) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """First latent of each block, and [latent of the block, latent] tokens on which both fire."""
    from scipy.sparse import csr_array

    ones = np.ones(len(acts), np.float32)
    whole = csr_array((ones, acts.place, acts.starts), shape=(acts.latents, len(acts.text)))
    turned = whole.T.tocsr()
    for start in range(0, acts.latents, _BLOCK):
        yield start, (whole[start : start + _BLOCK] @ turned).toarray()


def phi(both: Any, first: Any, second: Any, tokens: Any) -> Floats:
    """Correlation of two events from how often both, the one and the other happen; NaN where one never or always does.

    Example:
        >>> phi(np.array([2.0]), np.array([2.0]), np.array([2.0]), 8.0).item()
        1.0
    """
    spread = first * second * (tokens - first) * (tokens - second)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = np.where(spread > 0, (tokens * both - first * second) / np.sqrt(np.maximum(spread, 0)), np.nan)
    return found


def overlap(both: Any, first: Any, second: Any, tokens: Any) -> Floats:
    """Share of the rarer one's tokens on which the other fires too: N_ij ÷ min(N_i, N_j)."""
    del tokens
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = np.asarray(both / np.minimum(first, second), np.float64)
    return found


def measured(acts: Activations, first: Ints, second: Ints, measure: Any, *, draws: int, seed: int) -> Together:
    """A measure of given pairs, with a percentile bootstrap interval over documents and its value under independence.

    Args:
        acts: activations.
        first, second: [pair] latents; pairs in the order of `first` are fastest.
        measure: `phi` or `overlap`.
        draws, seed: of the resamples.
    """
    tokens = acts.tokens_by_document.astype(np.float64)
    weights = document_weights(len(tokens), draws=draws, seed=seed).astype(np.float32)
    all_tokens = (weights @ tokens.astype(np.float32)).astype(np.float64)[:, None]
    parts = []
    for start in range(0, len(first), _BLOCK * 4):
        i, j = first[start : start + _BLOCK * 4], second[start : start + _BLOCK * 4]
        both, one, other = _by_document(acts, i, j)
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = np.where(tokens > 0, one.astype(np.float64) * other / tokens, 0.0).sum(1)
        totals = [part.sum(1, dtype=np.float64) for part in (both, one, other)]
        value = measure(*totals, tokens.sum())
        low = high = np.full(len(i), np.nan)
        if (tokens > 0).sum() > 1:
            drawn = measure(*((weights @ part.T).astype(np.float64) for part in (both, one, other)), all_tokens)
            low, high = np.quantile(np.where(np.isfinite(drawn), drawn, value), _TAILS, axis=0)
        null = measure(expected, totals[1], totals[2], tokens.sum())
        parts.append((totals[0].astype(np.int64), expected, value, low, high, null))
    if not parts:
        empty = np.zeros(0)
        return Together(first, second, first, empty, empty, empty, empty, empty)
    return Together(first, second, *(np.concatenate(column) for column in zip(*parts, strict=True)))


def _by_document(
    acts: Activations, first: Ints, second: Ints
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """[pair, document] tokens on which both, the first and the second fire."""
    documents = acts.text.documents
    both, one, other = (np.zeros((len(first), documents), np.float32) for _ in range(3))
    on = np.zeros(len(acts.text), bool)
    last = -1
    for row, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        if i != last:
            if last >= 0:
                on[acts.of(last)[0]] = False
            place = acts.of(i)[0]
            on[place] = True
            of_first = np.bincount(acts.text.document[place], minlength=documents)
            last = i
        place = acts.of(j)[0]
        one[row] = of_first
        other[row] = np.bincount(acts.text.document[place], minlength=documents)
        both[row] = np.bincount(acts.text.document[place[on[place]]], minlength=documents)
    return both, one, other


def moved_within_documents(acts: Activations, seed: int) -> Activations:
    """Activations moved along each document, around its end to its start, by a random number for each latent and document."""
    s, random = acts.segments, np.random.default_rng(seed)
    encoded = np.flatnonzero(acts.encoded)
    number = np.zeros(len(acts.text), np.int64)
    number[encoded] = np.arange(len(encoded))
    size = acts.tokens_by_document
    begin = np.concatenate([[0], np.cumsum(size)])[:-1]
    shift = np.repeat(random.integers(0, size[s.document]), s.counts)
    document = acts.text.document[acts.place]
    turned = (number[acts.place] - begin[document] + shift) % size[document] + begin[document]
    return acts.moved(encoded[turned])
