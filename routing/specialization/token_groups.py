"""Tokens sorted into groups by what they are: their id, the next one, their position, their class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.trace import Trace

Ints = NDArray[np.integer[Any]]

_CLASSES = """
    SELECT token, class
    FROM tokens
    WHERE run_id = $run AND class IS NOT NULL
    ORDER BY token
"""


@dataclass(frozen=True)
class TokenGroups:
    """Tokens in groups.

    Attributes:
        key: [group] what its tokens have in common, ascending.
        order: tokens of the trace, group after group.
        starts: [group + 1] where each group begins in `order`.
        pool: tokens that have a key at all, also those of groups too small to be kept.
    """

    key: Ints
    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    pool: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[group] tokens."""
        return np.diff(self.starts)

    def shuffled(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """An `order` in which the keys lie on tokens at random; the sizes of groups stay."""
        return generator.permutation(self.pool)[: self.starts[-1]]

    def at_least(self, tokens: int) -> TokenGroups:
        """Only the groups of that size or more."""
        kept = self.sizes >= tokens
        inside = np.repeat(kept, self.sizes)
        starts = np.concatenate([[0], np.cumsum(self.sizes[kept])]).astype(np.int64)
        return TokenGroups(self.key[kept], self.order[inside], starts, self.pool)


def group_tokens(key: Ints) -> TokenGroups:
    """Tokens of equal key in a group; those with a key below 0 in none.

    Example:
        >>> groups = group_tokens(np.array([7, -1, 3, 7]))
        >>> groups.key.tolist(), groups.order.tolist(), groups.starts.tolist()
        ([3, 7], [2, 0, 3], [0, 1, 3])
    """
    pool = np.flatnonzero(key >= 0)
    order = pool[np.argsort(key[pool], kind="stable")]
    present, first = np.unique(key[order], return_index=True)
    starts = np.concatenate([first, [len(order)]]).astype(np.int64)
    return TokenGroups(present, order.astype(np.int64), starts, pool.astype(np.int64))


def next_id(trace: Trace) -> NDArray[np.int32]:
    """[token] id of the token after it in its sequence; −1 for none."""
    return np.where(_followed(trace), np.append(trace.token_id[1:], -1), -1).astype(np.int32)


def previous_id(trace: Trace) -> NDArray[np.int32]:
    """[token] id of the token before it in its sequence; −1 for none."""
    follows = np.append(False, _followed(trace)[:-1])
    return np.where(follows, np.append(-1, trace.token_id[:-1]), -1).astype(np.int32)


def _followed(trace: Trace) -> NDArray[np.bool_]:
    """[token] whether the trace's next token is the next one of the same sequence."""
    same = (trace.sequence[1:] == trace.sequence[:-1]) & (trace.position[1:] == trace.position[:-1] + 1)
    return np.append(same, False)


def token_classes(trace: Trace) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """[token] index into the names that follow; −1 for none."""
    found = trace.run.sql(_CLASSES).fetchnumpy()
    names, code = np.unique(np.asarray(found["class"], dtype=object).astype(str), return_inverse=True)
    kept = np.isin(trace.token, found["token"])
    codes = np.full(trace.tokens, -1, np.int32)
    codes[kept] = code[np.searchsorted(found["token"], trace.token[kept])]
    return codes, tuple(map(str, names))


def require_token_ids(trace: Trace) -> None:
    """Raise `InputError` where no token has an id, as in some imported traces."""
    if not (trace.token_id >= 0).any():
        raise InputError(
            f"run {trace.run.name!r} has no token ids",
            found="decisions without token ids, as imported",
            fix="import a trace that has a column token_id, or record from a live model",
        )


def log2_table(largest: int) -> NDArray[np.float64]:
    """log2 of 1, 2, … `largest` at those places; 0 at place 0."""
    return np.log2(np.maximum(np.arange(largest + 1), 1).astype(np.float64))
