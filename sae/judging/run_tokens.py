"""Tokens of a run as arrays: which document, label and class each has, and which part of the run it is judged in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.probes.batches import Batch, Sequence
from moescope.probes.corpus import Document
from moescope.sae.concepts.token_table import TOKENS_SQL
from moescope.sae.data.split import held_out
from moescope.store.run import Run

SPECIAL = "special"  # the class of tokens that stand for no text; training leaves them out
_LETTERS = "SELECT token_id, text FROM vocabulary WHERE run_id = $run"

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RunTokens:
    """Tokens of a run's texts, in their order; generated ones are left out.

    Attributes:
        token: [token] run-wide number.
        sequence, position, token_id, document: [token] ids.
        label, klass: [token] label of the document and class of the token, None where there is none.
    """

    token: Ints
    sequence: Ints
    position: Ints
    token_id: Ints
    document: Ints
    label: NDArray[np.object_]
    klass: NDArray[np.object_]

    def places(self, token: NDArray[np.integer[Any]]) -> Ints:
        """Where tokens of those run-wide numbers stand in the arrays; −1 for those that are not there."""
        at = np.minimum(np.searchsorted(self.token, token), len(self.token) - 1)
        return np.where(self.token[at] == token, at, -1)


@dataclass(frozen=True)
class Split:
    """Which tokens are judged, and which the controls and probes are fitted on.

    Attributes:
        judged, fitted: [token]; the same tokens where nothing is held out.
        held_out: whether they are different documents.
        first: position of the first token in a sequence that counts.
    """

    judged: NDArray[np.bool_]
    fitted: NDArray[np.bool_]
    held_out: bool
    first: int


def run_tokens(run: Run) -> RunTokens:
    """The tokens of a run's texts.

    Raises:
        InputError: the run has none.
    """
    found = run.sql(TOKENS_SQL).to_arrow_table()
    if not found.num_rows:
        raise InputError(f"run {run.name!r} has no tokens", fix="record it with the probe: tokens")
    names = ("token", "sequence_id", "position", "token_id", "document_id")
    token, sequence, position, token_id, document = (found[name].to_numpy().astype(np.int64) for name in names)
    label, klass = (np.array(found[name].to_pylist(), dtype=object) for name in ("label", "class"))
    special = np.array(found["is_special"].to_pylist(), dtype=object) == True  # noqa: E712  null is not special
    klass[special] = SPECIAL
    return RunTokens(token, sequence, position, token_id, document, label, klass)


def split(tokens: RunTokens, *, apart: bool, first: int, share: float, seed: int = 0) -> Split:
    """Part a run into what is judged and what is fitted on.

    Args:
        tokens: of the run.
        apart: judge documents that are held out from training, and fit on the others; else both on all of them.
        first: tokens before this position of their sequence count in neither.
        share, seed: of the documents held out, as in training.

    Raises:
        InputError: fewer than two documents on either side.
    """
    counts = (tokens.position >= first) & (tokens.klass != SPECIAL)
    out = held_out(tokens.document, share=share, seed=seed) if apart else np.ones(len(counts), bool)
    judged, fitted = counts & out, counts & (~out if apart else out)
    sides = [len(np.unique(tokens.document[side])) for side in (judged, fitted)]
    if min(sides) < 2:
        raise InputError(
            "there are too few documents to judge on some and to fit controls on others"
            if apart
            else "there are too few documents",
            expected="two or more on each side",
            found=f"{sides[0]} to judge on, {sides[1]} to fit on, with tokens from position {first} on",
            fix="give more texts, or judge on all of them (held_out=False, --documents all)",
        )
    return Split(judged, fitted, apart, first)


def some_sequences(tokens: RunTokens, eligible: NDArray[np.bool_], *, limit: int, seed: int) -> Ints:
    """Sequences drawn at random until they have `limit` eligible tokens, in order; those of one token are left out."""
    names, first, counts = np.unique(tokens.sequence, return_index=True, return_counts=True)
    wanted = np.add.reduceat(eligible.astype(np.int64), first)
    possible = np.random.default_rng(seed).permutation(np.flatnonzero((wanted > 0) & (counts > 1)))
    enough = int(np.searchsorted(np.cumsum(wanted[possible]), limit)) + 1
    found: Ints = np.sort(names[possible[:enough]])
    return found


def batches_of(run: Run, tokens: RunTokens, sequences: Ints) -> Iterator[Batch]:
    """Sequences of a run as batches of its own size, in their order."""
    size = int(run.info["settings"].get("batch_size") or 8)
    first = np.searchsorted(tokens.sequence, sequences)
    last = np.searchsorted(tokens.sequence, sequences, side="right")
    rows = [
        Sequence(
            int(sequence_id),
            int(tokens.document[start]),
            Document("", tokens.label[start], token_ids=tuple(tokens.token_id[start:end].tolist())),
            0,
            "",
            tokens.token_id[start:end],
        )
        for sequence_id, start, end in zip(sequences, first, last, strict=True)
    ]
    done = 0
    for number, start in enumerate(range(0, len(rows), size)):
        batch = tuple(rows[start : start + size])
        done += sum(len(row.token_ids) for row in batch)
        yield Batch(number, batch, done)


def first_letters(run: Run) -> dict[int, str]:
    """Token id → first letter of what it spells, a to z, without case and leading space; ids that begin otherwise are left out."""
    found = {int(token_id): str(text or "").lstrip().lower()[:1] for token_id, text in run.sql(_LETTERS).fetchall()}
    return {token_id: letter for token_id, letter in found.items() if letter.isascii() and letter.isalpha()}
