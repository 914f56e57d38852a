"""Whether two concepts come up together: log-odds of co-activation between two sets of latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import document_weights
from moescope.sae.reading.activations import Activations
from moescope.sae.reading.labels import Lifts
from moescope.sae.reading.run_text import Ints

_TAILS = (0.025, 0.975)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Association:
    """Two sets of latents.

    Attributes:
        a, b: names; latents_a, latents_b: the sets.
        value, low, high: log-odds ratio in nats and its bounds over documents, NaN where documents are too few.
        null, null_low, null_high: mean, 2.5 % and 97.5 % of the same with b's windows moved along the corpus.
        windows: how many.
    """

    a: str
    b: str
    latents_a: tuple[int, ...]
    latents_b: tuple[int, ...]
    value: float
    low: float
    high: float
    null: float
    null_low: float
    null_high: float
    windows: int


def sets_of_labels(
    lifts: Lifts, labels: Sequence[str], *, size: int = 10, q: float = 0.05
) -> dict[str, tuple[int, ...]]:
    """Label → the latents of largest lift whose lift over 1 is found at a false-discovery rate under `q`.

    A latent found for several labels belongs to none of the sets.
    """
    found = (lifts.lift > 1) & (lifts.q < q)
    alone = found & (found.sum(1, keepdims=True) == 1)
    sets = {}
    for number, label in enumerate(labels):
        mine = np.flatnonzero(alone[:, number])
        best = mine[np.argsort(-lifts.lift[mine, number], kind="stable")][:size]
        if len(best):
            sets[label] = tuple(int(latent) for latent in np.sort(lifts.latents[best]))
    return sets


def associations(
    acts: Activations,
    sets: Mapping[str, Sequence[int]],
    *,
    window: int = 32,
    draws: int = 1000,
    shifts: int = 200,
    seed: int = 0,
) -> list[Association]:
    """Log-odds ratio of two sets of latents firing in the same window of text, for every pair of sets.

    A window counts for a set if any of its latents is over 0 on any of its tokens. With n11 windows of both, n10 and n01 of one,
    and n00 of none, the value is ln[(n11 + ½)(n00 + ½) ÷ (n10 + ½)(n01 + ½)] (the association between concept families of GPT
    and Prejudice, as log-odds of co-activation; ½ after Haldane and Anscombe). The interval resamples documents. The null moves
    the windows of the second set along the corpus, around its end, by random numbers: what they have by chance and by their
    frequency stays.

    Args:
        acts: activations.
        sets: name → latents.
        window: tokens of a window; windows do not cross sequences.
        draws: bootstrap resamples; shifts: random moves.
        seed: of both.
    """
    which, document = _windows(acts, window)
    fires = {name: _fires(acts, latents, which, len(document)) for name, latents in sets.items()}
    weights = document_weights(acts.text.documents, draws=draws, seed=seed).astype(np.float64)
    random = np.random.default_rng(seed)
    moves = random.integers(1, max(len(document), 2), shifts)
    found = []
    for a, b in combinations(fires, 2):
        cells = _cells(fires[a], fires[b])
        by_document = np.stack([np.bincount(document, cell, acts.text.documents) for cell in cells])
        value = float(_log_odds(by_document.sum(1)))
        low = high = float("nan")
        if (np.bincount(document, minlength=acts.text.documents) > 0).sum() > 1:
            low, high = (float(x) for x in np.quantile(_log_odds(by_document @ weights.T), _TAILS))
        moved = np.array(
            [_log_odds(np.array([c.sum() for c in _cells(fires[a], np.roll(fires[b], s))])) for s in moves]
        )
        bounds = np.quantile(moved, _TAILS)
        found.append(
            Association(
                a, b, tuple(sets[a]), tuple(sets[b]), value, low, high, float(moved.mean()), float(bounds[0]), float(bounds[1]),
                len(document),
            )
        )  # fmt: skip
    return found


def _windows(acts: Activations, window: int) -> tuple[Ints, NDArray[np.int32]]:
    """[token] the window it is in, and [window] its document; windows without an encoded token are left out (−1)."""
    text = acts.text
    starts = text.starts(text.sequence_id)
    inside = np.arange(len(text)) - np.repeat(starts[:-1], np.diff(starts))
    new = inside % window == 0
    number = np.cumsum(new) - 1
    kept = np.unique(number[acts.encoded])
    renumbered = np.full(int(number[-1]) + 1, -1)
    renumbered[kept] = np.arange(len(kept))
    return renumbered[number], text.document[np.flatnonzero(new)][kept]


def _fires(acts: Activations, latents: Sequence[int], which: Ints, windows: int) -> NDArray[np.bool_]:
    found = np.zeros(windows, bool)
    for latent in latents:
        found[which[acts.of(int(latent))[0]]] = True
    return found


def _cells(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], ...]:
    return a & b, ~a & ~b, a & ~b, ~a & b


def _log_odds(cells: Floats) -> Floats:
    """[…] of [4, …] counts: both, none, the first alone, the second alone."""
    both, none, first, second = cells + 0.5
    found: Floats = np.log(both * none / (first * second))
    return found
