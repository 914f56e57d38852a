"""Examples of every latent: where it fires most, and some drawn at random from each quantile of its activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.sae.reading.activations import Activations
from moescope.sae.reading.run_text import Ints

_BEFORE = 2 / 3  # share of a window that lies before the peak: what comes after has no part in it
_DRAWN = 8  # candidates a stratum for each example, of which one a document is taken


@dataclass(frozen=True)
class Contexts:
    """Examples, by latent, stratum and rank.

    Attributes:
        latent, stratum, rank: [example]; stratum 0 holds the largest activations.
        triple: [example] which activation it is of.
        first, length: [example] where its window begins in the text, and its tokens.
        activations: [window token], example after example; NaN where the token was not encoded.
    """

    latent: NDArray[np.int32]
    stratum: Ints
    rank: Ints
    triple: Ints
    first: Ints
    length: Ints
    activations: NDArray[np.float32]

    def table(self, acts: Activations) -> dict[str, pa.Array]:
        """Columns of `feature_contexts`."""
        text = acts.text
        ends = np.concatenate([[0], np.cumsum(self.length)]).astype(np.int32)
        values = pa.array(self.activations, pa.float32(), mask=np.isnan(self.activations))
        place = acts.place[self.triple]
        return {
            "feature": pa.array(self.latent, pa.int32()),
            "stratum": pa.array(self.stratum, pa.int32()),
            "rank": pa.array(self.rank, pa.int32()),
            "sequence_id": pa.array(text.sequence_id[place], pa.int64()),
            "position": pa.array(text.position[place], pa.int32()),
            "value": pa.array(acts.value[self.triple].astype(np.float64)),
            "first_position": pa.array(text.position[self.first], pa.int32()),
            "activations": pa.ListArray.from_arrays(pa.array(ends), values),
        }


def contexts(acts: Activations, *, top: int, strata: int, per_stratum: int, window: int, seed: int) -> Contexts:
    """Pick examples.

    Stratum 0 has the largest activation of each of the `top` documents where the latent fires most. The activations over 0 are
    then ranked and cut into `strata` equal parts, the largest being stratum 1; from each, tokens are drawn at random, one a
    document.

    Args:
        acts: activations.
        top, strata, per_stratum: how many examples.
        window: tokens around each, two thirds of them before it.
        seed: of the draws.
    """
    largest = _largest(acts, top)
    drawn, part = _drawn(acts, strata, per_stratum, np.random.default_rng(seed))
    triple = np.concatenate([largest, drawn])
    stratum = np.concatenate([np.zeros(len(largest), np.int64), part])
    latent = acts.latent[triple]
    order = np.lexsort((-acts.value[triple], stratum, latent))
    latent, stratum, triple = latent[order], stratum[order], triple[order]
    rank = _place_in_group(latent.astype(np.int64) * (strata + 1) + stratum)
    first, length = _windows(acts, acts.place[triple], window)
    return Contexts(latent, stratum, rank, triple, first, length, _seen(acts, latent, first, length))


def _largest(acts: Activations, top: int) -> Ints:
    """Triples: the largest of each document, and of each latent the `top` largest of these."""
    s = acts.segments
    if not len(s):
        return np.zeros(0, np.int64)
    most = np.maximum.reduceat(acts.value, s.starts[:-1])
    reached = np.flatnonzero(acts.value == np.repeat(most, s.counts))
    of = np.searchsorted(s.starts, reached, side="right") - 1
    best = reached[np.unique(of, return_index=True)[1]]  # the first of equals
    order = np.lexsort((-most, s.latent))
    kept = order[_place_in_group(s.latent[order]) < top]
    return best[kept]


def _drawn(acts: Activations, strata: int, per_stratum: int, random: np.random.Generator) -> tuple[Ints, Ints]:
    """Triples drawn, and the stratum of each, 1, 2, …."""
    order = np.lexsort((-acts.value, acts.latent))
    latent = acts.latent[order].astype(np.int64)
    place = np.arange(len(order)) - acts.starts[:-1][latent]
    part = place * strata // acts.counts[latent]
    group = latent * strata + part
    shuffled = np.lexsort((random.random(len(order)), group))
    few = shuffled[_place_in_group(group[shuffled]) < _DRAWN * per_stratum]
    triple, group = order[few], group[few]
    document = acts.text.document[acts.place[triple]].astype(np.int64)
    alone = np.sort(np.unique(group * acts.text.documents + document, return_index=True)[1])
    kept = alone[_place_in_group(group[alone]) < per_stratum]
    return triple[kept], 1 + group[kept] % strata


def _place_in_group(group: NDArray[np.integer[Any]]) -> Ints:
    """[row] 0, 1, 2, … within each run of equal values."""
    if not len(group):
        return np.zeros(0, np.int64)
    new = np.concatenate([[True], group[1:] != group[:-1]])
    start = np.flatnonzero(new)
    found: Ints = np.arange(len(group)) - start[np.cumsum(new) - 1]
    return found


def _windows(acts: Activations, place: NDArray[np.integer[Any]], window: int) -> tuple[Ints, Ints]:
    """Where the window of each token begins and how long it is; windows stay in their sequence."""
    bounds = acts.text.starts(acts.text.sequence_id)
    sequence = np.searchsorted(bounds, place, side="right") - 1
    start, end = bounds[sequence], bounds[sequence + 1]
    length = np.minimum(window, end - start)
    first = np.clip(place - int(window * _BEFORE), start, end - length)
    return first, length


def _seen(acts: Activations, latent: NDArray[np.int32], first: Ints, length: Ints) -> NDArray[np.float32]:
    """[window token] the latent's activation on every token of every window."""
    ends = np.cumsum(length)
    total = int(ends[-1]) if len(ends) else 0
    token = np.arange(total) - np.repeat(ends - length, length) + np.repeat(first, length)
    found = np.where(acts.encoded[token], np.float32(0), np.float32("nan"))
    begins = np.searchsorted(latent, np.arange(acts.latents + 1))
    offset = np.concatenate([[0], ends]).astype(np.int64)
    for number in np.unique(latent):
        mine = slice(int(offset[begins[number]]), int(offset[begins[number + 1]]))
        place, value = acts.of(int(number))
        at = np.minimum(np.searchsorted(place, token[mine]), len(place) - 1)
        hit = place[at] == token[mine]
        found[mine][hit] = value[at[hit]]
    return found
