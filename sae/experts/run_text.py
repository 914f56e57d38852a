"""The part of a run's text that an autoencoder may be judged on: not what it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.probes.batches import Batch
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.data.run_batches import Documents, run_batches
from moescope.sae.data.trained_with import TrainedWith
from moescope.store.run import Run

_LENGTHS = """
    SELECT s.document_id, count(t.token) AS tokens
    FROM sequences s
    LEFT JOIN tokens t ON t.run_id = s.run_id AND t.sequence_id = s.sequence_id AND t.phase = 'prefill'
    WHERE s.run_id = $run
    GROUP BY s.document_id
    ORDER BY min(s.sequence_id)
"""
_DRAWN = 0  # the seed by which documents are drawn: the same ones for every question of a run


@dataclass(frozen=True)
class RunText:
    """Documents of a run.

    Attributes:
        run: whose they are.
        side, share, seed: which side of which split they are.
        documents: their ids.
        tokens: unmasked tokens of all of them, prompts only.
    """

    run: Run
    side: Documents
    share: float
    seed: int
    documents: NDArray[np.int64]
    tokens: int

    @property
    def n_documents(self) -> int:
        """How many documents."""
        return len(self.documents)

    @property
    def held_out(self) -> bool:
        """Whether the others were left out because the autoencoder was trained on them."""
        return self.side == "held_out"

    def groups(self, document: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        """The group of each document given: a document each, or several where there are more than `most`."""
        order = np.argsort(self.documents)
        place = order[np.searchsorted(self.documents, document, sorter=order)]
        return place % self.n_groups(most)

    def n_groups(self, most: int) -> int:
        """How many groups there are then."""
        return min(self.n_documents, most)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The sequences as they were fed, in order."""
        return run_batches(
            self.run, documents=self.side, share=self.share, seed=self.seed, batch_size=batch_size, only=self.documents
        )


def run_text(
    run: Run, autoencoder: Autoencoder | None = None, *, documents: Documents = "held_out", tokens: int | None = None
) -> RunText:
    """The documents of a run that an autoencoder may be judged on.

    Args:
        run: with the records of probe `tokens`, of the unedited model.
        autoencoder: whose training documents are left out where training saw these texts; None leaves out none.
        documents: `held_out`, or `all` to take those too.
        tokens: about so many, of documents drawn at random (a corpus may be sorted by label); None for all.

    Raises:
        InputError: a run without tokens, recorded under an intervention, or without held-out documents.
    """
    if run.info["intervention"]:
        raise InputError(
            f"run {run.name!r} was recorded under an intervention", fix="name the run of the unedited model"
        )
    if tokens is not None and tokens < 1:
        raise InputError("a number of tokens is 1 or more", found=str(tokens))
    rows = np.array(run.sql(_LENGTHS).fetchall(), np.int64).reshape(-1, 2)
    if not len(rows) or not rows[:, 1].sum():
        raise InputError(f"run {run.name!r} has no tokens", fix="record it with the probe tokens")
    trained = TrainedWith() if autoencoder is None else TrainedWith.of(autoencoder.row)
    side: Documents = documents if autoencoder is not None and trained.saw(run) else "all"
    if side == "held_out":
        rows = rows[trained.left_out(rows[:, 0])]
        if not rows[:, 1].sum():
            raise InputError(
                f"run {run.name!r} has no document that {autoencoder.name if autoencoder else ''!r} was not trained on",
                fix="name another run, or pass documents='all' (--documents all)",
            )
    if tokens is not None:
        drawn = np.random.default_rng(_DRAWN).permutation(len(rows))
        before = np.cumsum(rows[drawn, 1]) - rows[drawn, 1]
        rows = rows[np.sort(drawn[before < tokens])]
    return RunText(run, side, trained.held_out_share, trained.split_seed, rows[:, 0], int(rows[:, 1].sum()))
