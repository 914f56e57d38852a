"""Classes of keys: what attention goes to, told from the tokens alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moescope.probes.pieces import CLASSES as TOKEN_CLASSES
from moescope.probes.pieces import Pieces

# A key belongs to the first of these that fits, so that the shares sum to 1.
KEY_CLASSES = ("first", "special", "punctuation", "self", "local", "other")
LOCAL = 16
PLAIN, SPECIAL, PUNCTUATION = 0, 1, 2


def key_codes(pieces: Pieces, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whether each token is plain (0), special (1) or punctuation (2); all are plain without a tokenizer.

    Args:
        pieces: of the model's tokenizer.
        ids: token ids, of any shape.

    Example:
        >>> import moescope as ms
        >>> tokenizer = ms.load("demo").tokenizer
        >>> ids = tokenizer("Well, yes.")["input_ids"]
        >>> codes = key_codes(Pieces(tokenizer), np.array(ids)).tolist()
        >>> [tokenizer.decode([i]) for i, code in zip(ids, codes) if code == PUNCTUATION]
        [',', '.']
    """
    special, classes = pieces.describe(ids.ravel())
    codes = np.zeros(ids.size, np.int64)
    if classes.null_count < len(classes):
        named = classes.indices.to_numpy(zero_copy_only=False)
        codes[named == TOKEN_CLASSES.index("punctuation")] = PUNCTUATION
    codes[special] = SPECIAL
    return codes.reshape(ids.shape)
