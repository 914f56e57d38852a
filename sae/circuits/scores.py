"""Scores of heads from their codes: how many stand for positive prompts alone, against prompts whose sides are shuffled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import benjamini_hochberg, permutation_p

Floats = NDArray[np.float64]
_PIECE = 50


@dataclass(frozen=True)
class CodeScores:
    """Scores of heads.

    Attributes:
        count: [head] distinct codes seen on positives only, |C⁺∖C⁻|.
        score: [head] softmax over heads of count ÷ positive prompts.
        null: [head] mean count with the prompts' sides shuffled.
        p, q: [head] share of shuffles that reach the count; the false-discovery rate at which the head would be called.
    """

    count: NDArray[np.int64]
    score: Floats
    null: Floats
    p: Floats
    q: Floats


def code_scores(
    codes: NDArray[np.int64], positive: NDArray[np.bool_], *, shuffles: int = 1000, seed: int = 0
) -> CodeScores:
    """Count each head's codes that only positive prompts have.

    Args:
        codes: [prompt, head].
        positive: [prompt] its side.
        shuffles: how often sides are shuffled.
        seed: of shuffling.

    Example:
        >>> codes = np.array([[3, 0], [4, 1], [5, 0], [5, 1]])
        >>> code_scores(codes, np.array([True, True, False, False])).count.tolist()
        [2, 0]
    """
    seen, owner = _seen(codes)
    count = _only(seen, owner, positive[None].astype(np.float32), codes.shape[1])[0]
    random = np.random.default_rng(seed)
    sides = np.stack([random.permutation(positive) for _ in range(shuffles)]).astype(np.float32)
    shuffled = _only(seen, owner, sides, codes.shape[1])
    p: Floats = permutation_p(count.astype(np.float64), shuffled.astype(np.float64)).astype(np.float64)
    share = np.exp(count.astype(np.float64) / positive.sum())
    expected = shuffled.mean(0, dtype=np.float64)
    return CodeScores(count, share / share.sum(), expected, p, benjamini_hochberg(p).astype(np.float64))


def _seen(codes: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """[prompt, (head, code)] whether a head has a code on a prompt, for pairs that occur; [pair] the head."""
    width = int(codes.max()) + 2
    pair = np.arange(codes.shape[1]) * width + codes + 1
    names, place = np.unique(pair, return_inverse=True)
    seen = np.zeros((len(codes), len(names)), np.float32)
    seen[np.repeat(np.arange(len(codes)), codes.shape[1]), place.ravel()] = 1
    return seen, names // width


def _only(
    seen: NDArray[np.float32], owner: NDArray[np.int64], sides: NDArray[np.float32], heads: int
) -> NDArray[np.int64]:
    """[shuffle, head] codes of which every prompt is on the side marked 1."""
    whole = seen.sum(0)
    found = np.zeros((len(sides), heads), np.int64)
    for start in range(0, len(sides), _PIECE):
        alone = sides[start : start + _PIECE] @ seen == whole
        for row, marks in enumerate(alone, start=start):
            found[row] = np.bincount(owner[marks], minlength=heads)
    return found
