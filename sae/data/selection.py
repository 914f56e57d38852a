"""Which of a site's vectors are trained on, which are held out, and which are left out, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.sae.data.site_rows import Rows, SiteRows
from moescope.sae.data.split import held_out
from moescope.store.run import Run

_TOKENS = """
    SELECT
        t.token,
        t.position::INTEGER AS position,
        s.document_id,
        coalesce(t.is_special, false) OR coalesce(t.class = 'special', false) AS special
    FROM tokens t
    JOIN sequences s USING (run_id, sequence_id)
    WHERE run_id = $run
    ORDER BY t.token
"""
_AT_ONCE = 16_384


@dataclass(frozen=True)
class Filter:
    """Which vectors count.

    Attributes:
        skip_first: so many first tokens of each sequence are left out: their massive activations would drown all others.
        special: take special tokens (beginning and end of text) too.
        max_norm_ratio: leave out vectors of more than so many times the median norm; None keeps them.
        held_out: share of the documents that are kept for judging.
        split_seed: of that split.
    """

    skip_first: int = 1
    special: bool = False
    max_norm_ratio: float | None = None
    held_out: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.skip_first < 0:
            raise InputError("skip_first is a number of tokens", expected="0 or more", found=str(self.skip_first))
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 0:
            raise InputError("max_norm_ratio is a multiple of the median norm", found=str(self.max_norm_ratio))
        if not 0 <= self.held_out < 1:
            raise InputError(
                "the held-out share is a share of the documents", expected="0 ≤ share < 1", found=str(self.held_out)
            )


@dataclass(frozen=True)
class Selection:
    """Rows of a site by what they are for.

    Attributes:
        train, held_out: their numbers, ascending.
        document, position: [row] of every row of the site.
        notes: what was left out and why, one sentence each.
    """

    train: Rows
    held_out: Rows
    document: NDArray[np.int64]
    position: NDArray[np.int32]
    notes: list[str] = field(default_factory=list)


def select(run: Run, rows: SiteRows, asked: Filter) -> Selection:
    """Choose among the rows of a site.

    Raises:
        InputError: vectors of tokens that the run has no record of.
        RunError: with `max_norm_ratio`, vectors that are not finite.
    """
    position, document, special = _facts(run, rows)
    use, notes = np.ones(len(rows), bool), list[str]()

    def leave_out(which: NDArray[np.bool_], why: str) -> None:
        if left := int((which & use).sum()):
            notes.append(f"{left:,} of {len(use):,} vectors were left out: {why}.")
        use[which] = False

    first = "the first token" if asked.skip_first == 1 else f"the first {asked.skip_first} tokens"
    leave_out(position < asked.skip_first, f"{first} of every sequence")
    if not asked.special:
        leave_out(special, "special tokens")
    if asked.max_norm_ratio is not None and use.any():
        norms = _norms(rows)
        limit = asked.max_norm_ratio * float(np.median(norms[use]))
        leave_out(norms > limit, f"norms over {asked.max_norm_ratio:g} times the median ({limit:.4g})")
    away = held_out(document, asked.held_out, asked.split_seed)
    return Selection(np.flatnonzero(use & ~away), np.flatnonzero(use & away), document, position, notes)


def _facts(run: Run, rows: SiteRows) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
    """Position, document, and whether it is special, of each row's token."""
    known = run.sql(_TOKENS).fetchnumpy()
    token = np.asarray(known["token"])
    at = np.minimum(np.searchsorted(token, rows.token), max(len(token) - 1, 0))
    if not len(token) or not (token[at] == rows.token).all():
        raise InputError(
            f"run {run.name!r} has vectors of tokens that it has no record of",
            fix="record it with the probe tokens; do not delete its table",
        )
    columns = (np.asarray(known[name])[at] for name in ("position", "document_id", "special"))
    position, document, special = columns
    return position.astype(np.int32), document.astype(np.int64), special.astype(bool)


def _norms(rows: SiteRows) -> NDArray[np.float32]:
    """Norm of every row, some at a time."""
    found = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _AT_ONCE):
        part = np.arange(start, min(start + _AT_ONCE, len(rows)))
        found[part] = np.linalg.norm(rows.gather(part), axis=1)
    return found
