"""Which documents are held out: trained on by nothing, so that what is reported was never seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.store.vector_sampling import sampled

_OF_DOCUMENTS = 0x646F63  # keeps the hash of a document apart from those of its tokens


def held_out(document_ids: NDArray[np.integer] | list[int], share: float = 0.1, seed: int = 0) -> NDArray[np.bool_]:
    """Whether each document is held out: where hash(seed, document) is under `share` of its range.

    A document alone decides, whatever others there are and in whatever order; a smaller share is a part of a larger one. All
    tokens of a text fall on one side, since fragments of one text are not independent.

    Args:
        document_ids: numbers of documents, any shape, repeated at will (one for each token, say).
        share: of the documents, 0 ≤ share < 1.
        seed: another seed holds out others.

    Returns:
        True for each that is held out.

    Raises:
        InputError: a share that is none.

    Example:
        >>> held_out([0, 1, 2, 3, 4, 5, 6, 7], share=0.25).tolist() == held_out([0, 1, 2, 3, 4, 5, 6, 7], share=0.25).tolist()
        True
        >>> round(float(held_out(np.arange(100_000)).mean()), 2)
        0.1
    """
    if not 0 <= share < 1:
        raise InputError("the held-out share is a share of the documents", expected="0 ≤ share < 1", found=str(share))
    return sampled(share, seed, np.asarray(document_ids, dtype=np.int64), _OF_DOCUMENTS)
