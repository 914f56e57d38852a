"""Documents halved: what is learned from one half is judged on the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.trace import Trace


@dataclass(frozen=True)
class Halves:
    """Tokens of a run, by the half their document fell into.

    Attributes:
        fitted, judged: [row] rows of the trace, ascending.
        document: [row of `judged`] index of the judged document, 0-based and dense.
        documents: how many documents are judged.
    """

    fitted: NDArray[np.int64]
    judged: NDArray[np.int64]
    document: NDArray[np.int64]
    documents: int


def halve(trace: Trace, seed: int) -> Halves:
    """Draw half of the documents to learn from; the others are judged.

    Raises:
        InputError: there is only one document.
    """
    count = trace.n_documents
    if count < 2:
        raise InputError(
            f"run {trace.run.name!r} has one document, and what is learned from some documents is judged on others",
            expected="at least two documents",
            found=f"{count}",
            fix="record a corpus of several documents",
        )
    learned = np.zeros(count, np.bool_)
    learned[np.random.default_rng(seed).permutation(count)[: count // 2]] = True
    side = learned[trace.document]
    judged = np.flatnonzero(~side)
    present, document = np.unique(trace.document[judged], return_inverse=True)
    return Halves(np.flatnonzero(side), judged, document.astype(np.int64), len(present))
