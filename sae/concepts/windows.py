"""Windows of text round a unit's activity, and windows without any: what describers are shown and judges are asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.sae.concepts.activity import Activity
from moescope.store.run import Run

OPEN, CLOSE = "⟦", "⟧"
_BEFORE = 2 / 3

_VOCABULARY_SQL = """
    SELECT token_id, bytes
    FROM vocabulary
    WHERE run_id = $run
"""


@dataclass(frozen=True)
class Window:
    """Some tokens of one sequence.

    Attributes:
        document, sequence: where it is from.
        first: position of its first token in the sequence.
        ids: its tokens.
        active: [token] whether the unit is active.
        value: the unit's largest activity in it, 0 for none.
    """

    document: int
    sequence: int
    first: int
    ids: NDArray[np.int64]
    active: NDArray[np.bool_]
    value: float

    def marked(self, active: NDArray[np.bool_]) -> Window:
        """The same with other tokens marked."""
        return replace(self, active=active)


class Words:
    """Text of tokens, from the run's vocabulary."""

    def __init__(self, run: Run) -> None:
        self._bytes: Mapping[int, bytes] = dict(run.sql(_VOCABULARY_SQL).fetchall())

    def text(self, window: Window, *, marks: bool) -> str:
        """The window as text on one line, with active tokens between marks if they shall be told.

        Marks that the text itself holds become plain brackets, so that only ours are there.
        """
        parts: list[bytes] = []
        for at, token in enumerate(window.ids.tolist()):
            raw = self._bytes.get(token, f" t{token}".encode())
            piece = raw.decode("utf-8", "surrogateescape").replace(OPEN, "[").replace(CLOSE, "]")
            on = marks and bool(window.active[at])
            before = marks and at > 0 and bool(window.active[at - 1])
            parts.append((CLOSE if before and not on else "").encode() + (OPEN if on and not before else "").encode())
            parts.append(piece.encode("utf-8", "surrogateescape"))
        if marks and len(window.active) and window.active[-1]:
            parts.append(CLOSE.encode())
        return b"".join(parts).decode("utf-8", "replace").replace("\r", " ").replace("\n", "↵")


def active_windows(
    activity: Activity,
    unit: int,
    *,
    count: int,
    width: int,
    top: int,
    random: np.random.Generator,
    without: frozenset[int] = frozenset(),
) -> list[Window]:
    """Windows in which a unit is active, one a document: first those of largest activity, then random ones.

    Args:
        activity: of the unit.
        unit: which.
        count: windows at most.
        width: tokens of each at most.
        top: how many of them are the documents of largest activity; the others are random documents, at a random token on
            which the unit is active, so that weak activity has its share.
        random: draws them.
        without: documents left out.
    """
    places, values = activity.places[unit], activity.values[unit]
    document = activity.tokens.document[places]
    keep = ~np.isin(document, list(without)) if without else np.ones(len(places), bool)
    places, values, document = places[keep], values[keep], document[keep]
    strongest = np.lexsort((places, -values))
    _, first = np.unique(document[strongest], return_index=True)
    leaders = strongest[np.sort(first)]
    chosen = leaders[: min(top, count)].tolist()
    rest = random.permutation(len(places))
    _, first = np.unique(document[rest], return_index=True)
    taken = set(document[chosen].tolist())
    drawn = [int(i) for i in rest[np.sort(first)] if int(document[i]) not in taken]
    chosen += drawn[: count - len(chosen)]
    return [_window(activity, unit, int(places[i]), width) for i in chosen]


def idle_windows(
    activity: Activity,
    unit: int,
    *,
    count: int,
    width: int,
    random: np.random.Generator,
    without: frozenset[int] = frozenset(),
) -> list[Window]:
    """Windows at random in which the unit is not active, its activity being known on half of their tokens or more; one a document
    as long as there are documents enough.
    """
    tokens = activity.tokens
    active = np.zeros(len(tokens), bool)
    active[activity.places[unit]] = True
    found: list[Window] = []
    places = random.permutation(len(tokens))[: 400 * count]
    seen: set[int] = set()
    for strict in (True, False):
        for place in places:
            document = int(tokens.document[place])
            if len(found) >= count:
                return found
            if document in without or (strict and document in seen):
                continue
            span = _span(activity, int(place), width)
            known = activity.known[span]
            if active[span].any() or known.mean() < 0.5 or any(_same(one, activity, span) for one in found):
                continue
            found.append(_cut(activity, span, active, 0.0))
            seen.add(document)
    return found


def stored_windows(rows: list[Mapping[str, Any]], activity: Activity) -> list[Window]:
    """Windows of rows of `feature_contexts`, of documents that were read; tokens without a known activation count as silent."""
    tokens = activity.tokens
    starts = np.flatnonzero(np.append(True, tokens.sequence[1:] != tokens.sequence[:-1]))
    begin = dict(zip(tokens.sequence[starts].tolist(), starts.tolist(), strict=True))
    found = []
    for row in rows:
        start = begin.get(int(row["sequence_id"]))
        if start is None:
            continue
        span = slice(start + int(row["first_position"]), start + int(row["first_position"]) + len(row["activations"]))
        acts = np.array([value or 0.0 for value in row["activations"]])
        if (tokens.sequence[span] == row["sequence_id"]).sum() == len(acts):
            window = _cut(activity, span, np.zeros(len(tokens), bool), float(row["value"]))
            found.append(window.marked(acts > 0))
    return found


def _window(activity: Activity, unit: int, place: int, width: int) -> Window:
    active = np.zeros(len(activity.tokens), bool)
    active[activity.places[unit]] = True
    span = _span(activity, place, width)
    inside = (activity.places[unit] >= span.start) & (activity.places[unit] < span.stop)
    return _cut(activity, span, active, float(activity.values[unit][inside].max()))


def _span(activity: Activity, place: int, width: int) -> slice:
    """Tokens of the place's sequence round it, two thirds of them before."""
    sequence = activity.tokens.sequence
    first, last = np.searchsorted(sequence, [sequence[place], sequence[place] + 1])
    start = max(int(first), min(place - round(_BEFORE * width), int(last) - width))
    return slice(start, min(start + width, int(last)))


def _cut(activity: Activity, span: slice, active: NDArray[np.bool_], value: float) -> Window:
    t = activity.tokens
    return Window(
        int(t.document[span.start]), int(t.sequence[span.start]), int(t.position[span.start]), t.token_id[span],
        active[span].copy(), value,
    )  # fmt: skip


def _same(window: Window, activity: Activity, span: slice) -> bool:
    """Whether a window shares tokens with a span."""
    t = activity.tokens
    first, last = int(t.position[span.start]), int(t.position[span.start]) + span.stop - span.start
    return window.sequence == t.sequence[span.start] and window.first < last and first < window.first + len(window.ids)
