"""Two runs laid beside each other: the same tokens in the same order, and the routers that both have."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

Align = Literal["auto", "content", "sequence"]
_HASHES = """
    SELECT sequence_id, content_hash
    FROM sequences
    WHERE run_id = $run
    ORDER BY sequence_id
"""


@dataclass(frozen=True)
class Aligned:
    """The tokens that two runs share.

    Attributes:
        first, second: the traces.
        left, right: [token] rows of each trace, pair by pair.
        routers: pairs of the same layer, block and number of experts.
        notes: what is left out on either side.
    """

    first: Trace
    second: Trace
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    routers: tuple[tuple[Router, Router], ...]
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """How many tokens both have."""
        return len(self.left)

    def decisions(
        self, pair: tuple[Router, Router], right: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """Experts [token, k] of both; `right` takes other rows of the second run."""
        return pair[0].experts[self.left], pair[1].experts[self.right if right is None else right]


def align(run: Run, other: Run, how: Align) -> Aligned:
    """Lay two runs beside each other.

    Args:
        run, other: two runs of a corpus.
        how: which sequences belong together: those of equal token ids (`content`), of equal number (`sequence`), or equal
            token ids with the number where a run has none stored (`auto`). Within them, tokens of equal position and id.

    Raises:
        InputError: nothing aligns, or no router is in both; the message says what differs.
    """
    first, second = read_trace(run), read_trace(other)
    pairs = _sequences(first, second, how)
    left, right, differing = _tokens(first, second, pairs)
    if not len(left):
        raise _nothing(first, second, len(pairs), differing, how)
    routers, notes = _routers(first, second)
    if len(left) < first.tokens or len(left) < second.tokens:
        notes = (
            f"{len(left):,} tokens align, of {first.tokens:,} in {run.name!r} and {second.tokens:,} in {other.name!r}"
            + (f"; {differing:,} at the same place differ in token id" if differing else "")
            + ".",
            *notes,
        )
    if (first.token_id[left] < 0).all() or (second.token_id[right] < 0).all():
        notes = ("A run has no token ids, so tokens are matched by sequence and position alone.", *notes)
    return Aligned(first, second, left, right, routers, (*first.notes, *second.notes, *notes))


def _sequences(first: Trace, second: Trace, how: Align) -> list[tuple[int, int]]:
    """Indices of sequences that belong together."""
    hashes = [_hashes(trace) for trace in (first, second)]
    by_number = {int(number): place for place, number in enumerate(second.sequence_ids)}
    if how == "sequence":
        return [(place, by_number[int(n)]) for place, n in enumerate(first.sequence_ids) if int(n) in by_number]
    by_content = {key: place for place, key in enumerate(_keys(hashes[1])) if key is not None}
    pairs = []
    for place, key in enumerate(_keys(hashes[0])):
        number = int(first.sequence_ids[place])
        if key is not None and key in by_content:
            pairs.append((place, by_content[key]))
        elif how == "auto" and number in by_number and (key is None or hashes[1][by_number[number]] is None):
            pairs.append((place, by_number[number]))
    first_of = {there: here for here, there in reversed(pairs)}
    return [(here, there) for here, there in pairs if first_of[there] == here]


def _hashes(trace: Trace) -> list[str | None]:
    found = dict(trace.run.sql(_HASHES).fetchall())
    return [found.get(int(number)) for number in trace.sequence_ids]


def _keys(hashes: list[str | None]) -> list[tuple[str, int] | None]:
    """A sequence's content with how many of the same came before, so that two equal texts stay two."""
    seen: Counter[str] = Counter()
    keys: list[tuple[str, int] | None] = []
    for text in hashes:
        keys.append(None if text is None else (text, seen[text]))
        if text is not None:
            seen[text] += 1
    return keys


def _tokens(
    first: Trace, second: Trace, pairs: list[tuple[int, int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Rows of tokens at equal places with equal ids, and how many at equal places differ in id."""
    numbers = [np.full(len(trace.sequence_ids), -1, np.int64) for trace in (first, second)]
    for place, (a, b) in enumerate(pairs):
        numbers[0][a] = numbers[1][b] = place
    keys, rows = [], []
    for trace, number in zip((first, second), numbers, strict=True):
        own = number[trace.sequence]
        inside = np.flatnonzero(own >= 0)
        keys.append((own[inside] << 32) + trace.position[inside])
        rows.append(inside)
    if len(keys[0]) == len(keys[1]) and bool((keys[0] == keys[1]).all()):
        left, right = rows
    else:
        _, at, there = np.intersect1d(keys[0], keys[1], return_indices=True)
        left, right = rows[0][at], rows[1][there]
    ids, others = first.token_id[left], second.token_id[right]
    same = (ids == others) | (ids < 0) | (others < 0)
    return left[same], right[same], int((~same).sum())


def _routers(first: Trace, second: Trace) -> tuple[tuple[tuple[Router, Router], ...], tuple[str, ...]]:
    other = {(router.layer, router.block): router for router in second.routers}
    pairs = [(r, other[r.layer, r.block]) for r in first.routers if (r.layer, r.block) in other]
    alike = tuple((a, b) for a, b in pairs if a.n_experts == b.n_experts)
    names = [", ".join(f"{r.name} of {r.n_experts}" for r in trace.routers) for trace in (first, second)]
    if not alike:
        raise InputError(
            "the two runs have no router of the same layer and number of experts",
            expected=f"routers as in {first.run.name!r}: {names[0]}",
            found=f"in {second.run.name!r}: {names[1]}",
        )
    notes = []
    left_out = len(first.routers) + len(second.routers) - 2 * len(alike)
    if left_out:
        notes.append(f"{left_out} routers are left out: not in both runs with the same number of experts.")
    if differing := [a.name for a, b in alike if a.top_k != b.top_k]:
        notes.append(f"The runs choose different numbers of experts in {', '.join(differing)}.")
    return alike, tuple(notes)


def _nothing(first: Trace, second: Trace, pairs: int, differing: int, how: Align) -> InputError:
    if not pairs:
        problem = "no sequence of one run is in the other"
        fix = 'record both on the same corpus, or pair sequences by number (align="sequence")'
        if how == "sequence":
            fix = "record both on the same corpus"
    else:
        problem = f"the {pairs:,} sequences that belong together have no token in common"
        fix = "record both with the same tokenizer"
    places = f"; {differing:,} tokens at equal places have different ids" if differing else ""
    sizes = [
        f"{trace.run.name!r}: {len(trace.sequence_ids):,} sequences, {trace.tokens:,} tokens, corpus "
        f"{str(trace.run.info['corpus_fingerprint'])[:12]}"
        for trace in (first, second)
    ]
    return InputError(problem, found="; ".join(sizes) + places, fix=fix)
