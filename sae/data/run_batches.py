"""The texts of a recorded run as batches again, to run its model over them once more."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.probes.batches import Batch, Sequence
from moescope.probes.corpus import Document
from moescope.sae.data.split import held_out
from moescope.store.run import Run

Documents = Literal["all", "held_out", "trained"]

_SEQUENCES = """
    SELECT sequence_id, document_id, part, label, source
    FROM sequences
    WHERE run_id = $run
    ORDER BY sequence_id
"""
_IDS = """
    SELECT sequence_id, token_id
    FROM tokens
    WHERE run_id = $run AND phase = 'prefill' AND sequence_id BETWEEN $first AND $last
    ORDER BY token
"""
_AT_ONCE = 512  # sequences a query


def run_batches(
    run: Run,
    *,
    documents: Documents = "all",
    share: float = 0.1,
    seed: int = 0,
    batch_size: int | None = None,
    only: NDArray[np.integer[Any]] | None = None,
) -> Iterator[Batch]:
    """The sequences of a run in their order, with the token ids that were fed then; generated tokens are left out.

    Each `Sequence` has its number in the run, its document's number and label, and its part; texts are not read.

    Args:
        run: with the records of probe `tokens`.
        documents: all; those that `held_out(…, share, seed)` holds out; or the others.
        share, seed: of that split.
        batch_size: sequences a batch; None for the run's own.
        only: these documents of that side alone; None for all of them.

    Raises:
        InputError: a run without tokens, or without a document of that side.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["One text.", "Another."], store, name="r", probes=[], progress=False)
        ...     [[s.document_id for s in batch.sequences] for batch in run_batches(run, batch_size=1)]
        [[0], [1]]
    """
    rows = run.sql(_SEQUENCES).fetchall()
    if not rows or not run.rows("tokens"):
        raise InputError(f"run {run.name!r} has no tokens", fix="record it with the probe tokens")
    numbers = np.array([row[:2] for row in rows], np.int64)
    chosen = _chosen(run, numbers[:, 1], documents, share, seed)
    if only is not None:
        chosen &= np.isin(numbers[:, 1], only)
    size = batch_size or int(run.info["settings"].get("batch_size") or 8)
    return _batches(_sequences(run, [row for row, take in zip(rows, chosen, strict=True) if take]), size)


def _chosen(run: Run, document: NDArray[np.int64], which: Documents, share: float, seed: int) -> NDArray[np.bool_]:
    if which == "all":
        return np.ones(len(document), bool)
    out = held_out(document, share, seed)
    chosen = out if which == "held_out" else ~out
    if not chosen.any():
        raise InputError(
            f"run {run.name!r} has no {which.replace('_', '-')} documents",
            found=f"{len(np.unique(document))} documents, of which a share of {share} is held out",
            fix="record more documents, or another share",
        )
    return chosen


def _sequences(run: Run, rows: list[tuple[int, int, int, str | None, str | None]]) -> Iterator[Sequence]:
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        found = run.sql(_IDS, {"first": part[0][0], "last": part[-1][0]}).fetchnumpy()
        sequence, ids = (np.asarray(found[name], np.int64) for name in ("sequence_id", "token_id"))
        for number, document, piece, label, source in part:
            begin, end = np.searchsorted(sequence, (number, number + 1))
            if begin == end:
                continue  # a shard that lacks its records
            yield Sequence(number, document, Document("", label, source), piece, "", ids[begin:end])


def _batches(sequences: Iterator[Sequence], size: int) -> Iterator[Batch]:
    number = done = 0
    while rows := tuple(islice(sequences, size)):
        done += sum(len(s.token_ids) for s in rows)
        yield Batch(number, rows, done)
        number += 1
