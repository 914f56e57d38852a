"""Documents for training a probe and documents for testing it: never tokens of one document in both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.sae.concepts.token_table import TokenTable
from moescope.sae.data.trained_with import TrainedWith
from moescope.store.vector_sampling import token_hash

if TYPE_CHECKING:
    from moescope.sae.autoencoder import Autoencoder
    from moescope.store.run import Run


def documents_tested(
    tokens: TokenTable, *, train_share: float, seed: int, only: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """`document_id`s of the test part: of each label (and of those without) the share left over, by hash of the document.

    Args:
        tokens: with the documents and their labels.
        train_share: share of documents that train.
        seed: of the hash.
        only: documents that may be tested on; None for all.

    Raises:
        InputError: a share that leaves no document on one side.
    """
    if not 0 < train_share < 1:
        raise InputError(f"train_share cannot be {train_share!r}", expected="over 0 and under 1")
    documents, first = np.unique(tokens.document, return_index=True)
    if only is not None:
        found = np.intersect1d(documents, only)
        _check(found, documents)
        return found
    labels = np.array([f"={label}" if label is not None else "" for label in tokens.label[first]])
    hashes = token_hash(seed, documents, 0)
    chosen: list[NDArray[np.int64]] = []
    for label in np.unique(labels):
        members = documents[labels == label]
        order = np.argsort(hashes[labels == label], kind="stable")
        chosen.append(members[order][round(train_share * len(members)) :])
    found = np.sort(np.concatenate(chosen))
    _check(found, documents)
    return found


def _check(found: NDArray[np.int64], documents: NDArray[np.int64]) -> None:
    if not 0 < len(found) < len(documents):
        raise InputError(
            "the documents cannot be split into a training and a test part",
            expected="documents on both sides",
            found=f"{len(documents)} documents, {len(found)} of them to test on",
            fix="record more documents, or another train_share",
        )


def untrained(run: Run, sae: Autoencoder | None, tokens: TokenTable) -> NDArray[np.int64] | None:
    """Documents that an autoencoder was not trained on, where training saw these texts; None where all are."""
    if sae is None or not (trained := TrainedWith.of(sae.row)).saw(run):
        return None
    documents = np.unique(tokens.document)
    found = documents[trained.left_out(documents)]
    if not len(found):
        raise InputError(
            f"run {run.name!r} has no document that {sae.name!r} was not trained on",
            fix="name another run, or train with documents held out (--held-out)",
        )
    return found
