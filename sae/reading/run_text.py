"""The tokens of the documents that features are read on, as arrays in the order of documents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.store.run import Run

_TOKENS = """
    SELECT t.token, t.token_id, t.sequence_id, t.position, s.document_id,
        coalesce(t.is_special, false) OR coalesce(t.class = 'special', false) AS special
    FROM tokens t
    JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
    WHERE t.run_id = $run AND t.phase = 'prefill'
    ORDER BY s.document_id, t.token
"""
_LABELS = """
    SELECT document_id, min(label) AS label
    FROM sequences
    WHERE run_id = $run
    GROUP BY document_id
    ORDER BY document_id
"""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RunText:
    """Tokens of some documents of a run, generated ones left out; documents lie one after another, and so do their sequences.

    Attributes:
        token: [token] run-wide numbers.
        token_id, sequence_id, position: [token].
        document: [token] 0-based number among the documents read; ascending.
        label: [document] index into `labels`; −1 for none.
        labels: names, sorted.
        all_documents: documents that the run has.
        special: [token] whether it stands for no text; None for none.
    """

    token: Ints
    token_id: NDArray[np.int32]
    sequence_id: Ints
    position: NDArray[np.int32]
    document: NDArray[np.int32]
    label: NDArray[np.int32]
    labels: tuple[str, ...]
    all_documents: int
    special: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.token)

    @property
    def documents(self) -> int:
        """How many documents are read."""
        return len(self.label)

    def starts(self, of: NDArray[np.integer[Any]]) -> Ints:
        """[group + 1] where each run of equal values begins; the last entry is the number of tokens."""
        change = np.flatnonzero(np.diff(of)) + 1
        return np.concatenate([[0], change, [len(of)]]).astype(np.int64)

    def places(self, tokens: NDArray[np.integer[Any]]) -> Ints:
        """Where run-wide numbers stand here; −1 for tokens of other documents."""
        order = self._order
        at = np.searchsorted(self.token, tokens, sorter=order)
        at = order[np.minimum(at, len(self) - 1)]
        return np.where(self.token[at] == tokens, at, -1)

    @cached_property
    def _order(self) -> Ints:
        found: Ints = np.argsort(self.token, kind="stable")
        return found

    def of_documents(self, kept: NDArray[np.bool_]) -> RunText:
        """The part that belongs to some of its documents ([document], true for those kept)."""
        mine = kept[self.document]
        renumbered = (np.cumsum(kept) - 1).astype(np.int32)
        return RunText(
            self.token[mine], self.token_id[mine], self.sequence_id[mine], self.position[mine],
            renumbered[self.document[mine]], self.label[kept], self.labels, self.all_documents,
            None if self.special is None else self.special[mine],
        )  # fmt: skip


def run_text(run: Run, documents: NDArray[np.integer[Any]] | None = None) -> RunText:
    """Read the tokens of a run.

    Args:
        run: with the table `tokens`.
        documents: `document_id` of those to read; None for all.

    Raises:
        InputError: the run has no tokens, or none of these documents.
    """
    found = run.sql(_TOKENS).to_arrow_table()
    if not found.num_rows:
        raise InputError(f"run {run.name!r} has no tokens", fix="record it with the probe: tokens")
    token, token_id, sequence, position, document, special = (column.to_numpy() for column in found.columns)
    named = run.sql(_LABELS).to_arrow_table().to_pylist()
    if documents is not None:
        wanted = set(map(int, documents))
        named = [row for row in named if int(row["document_id"]) in wanted]
    present = set(np.unique(document).tolist())
    named = [row for row in named if int(row["document_id"]) in present]
    if not named:
        raise InputError(f"run {run.name!r} has none of these documents", expected=f"some of {len(present):,}")
    ids = np.array([row["document_id"] for row in named], np.int64)
    labels = tuple(sorted({row["label"] for row in named if row["label"] is not None}))
    number = {label: i for i, label in enumerate(labels)}
    label = np.array([number.get(row["label"], -1) for row in named], np.int32)
    mine = np.isin(document, ids)
    return RunText(
        token[mine].astype(np.int64), token_id[mine].astype(np.int32), sequence[mine].astype(np.int64),
        position[mine].astype(np.int32), np.searchsorted(ids, document[mine]).astype(np.int32), label, labels, len(present),
        special[mine].astype(bool),
    )  # fmt: skip
