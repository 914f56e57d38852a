"""Caches as dictionaries and lists, one size at a time, written to be read: the truth the compiled replays must meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

NEVER = 10**9


def hits(sequence: Sequence[Sequence[int]], policy: str, size: int, *, experts: int, horizon: int = 16,
         in_tokens: bool = True, step: Sequence[int] | None = None) -> tuple[int, int]:  # fmt: skip
    """Hits from an empty cache, and uses that filled a free place, over one sequence of tokens.

    Args:
        sequence: experts of each token, in slot order; ids from `experts` on need no place.
        step: columns at which a token is cut into groups tested together; None for the whole token.
    """
    cache: list[int] = []  # in order of arrival
    last: dict[int, int] = {}
    count: dict[int, int] = {}
    found = free = clock = 0
    seen: set[int] = set()

    def badness(e: int, t: int, slot: int) -> Any:
        """The expert with the most is given up."""
        if policy == "lru":
            return -last[e]
        if policy == "lfu":
            return -count[e], -last[e]
        if policy == "fifo":
            return -cache.index(e)
        if policy == "lifo":
            return cache.index(e)
        if policy == "look_ahead":
            return -_ahead(sequence, e, t, slot, horizon), -last[e]
        return _next_use(sequence, e, t, slot, in_tokens), e

    for t, token in enumerate(sequence):
        edges = step or [0, len(token)]
        for begin, end in pairwise(edges):
            found += sum(expert in cache for expert in token[begin:end])
            for slot in range(begin, end):
                expert = token[slot]
                if expert >= experts:
                    continue
                clock += 1
                if expert not in seen:
                    free += len(seen) < size
                    seen.add(expert)
                if expert not in cache:
                    if len(cache) == size:
                        cache.remove(max(cache, key=lambda e, t=t, slot=slot: badness(e, t, slot)))
                    cache.append(expert)
                last[expert] = clock
                count[expert] = count.get(expert, 0) + 1
    return found, free


def _ahead(sequence: Sequence[Sequence[int]], expert: int, t: int, slot: int, horizon: int) -> int:
    """Uses of the expert that are still to come among the next `horizon` tokens, token t included."""
    window = [list(sequence[t])[slot + 1 :], *map(list, sequence[t + 1 : t + horizon])]
    return sum(token.count(expert) for token in window)


def _next_use(sequence: Sequence[Sequence[int]], expert: int, t: int, slot: int, in_tokens: bool) -> tuple[int, int]:
    """Token (and slot) of the next use after slot `slot` of token t."""
    for later in range(t, len(sequence)):
        for column, other in enumerate(sequence[later]):
            if other == expert and (later, column) > (t, slot):
                return later, 0 if in_tokens else column
    return NEVER, 0
