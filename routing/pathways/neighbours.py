"""Prediction from the most similar paths or sequences seen before, on a sample of tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moescope.routing.pathways.held_out import Halves
from moescope.routing.pathways.predictors import best
from moescope.routing.trace import Router, Trace

Hits = NDArray[np.int64]
_STORED = 8_000


def path_neighbours(
    routers: tuple[Router, ...],
    halves: Halves,
    *,
    sample: NDArray[np.int64],
    neighbours: int,
    sizes: list[int],
    generator: np.random.Generator,
    choices: int | None,
) -> list[Hits | None]:
    """Hits at each router of the experts that the tokens with the most similar path up to there chose.

    Similarity is the number of experts two tokens share over all earlier routers. Up to 8,000 tokens of the fitted half are
    compared. The first router has no earlier ones: None.

    Args:
        routers: in the order in which a token meets them.
        halves: what is fitted and what is judged.
        sample: [token] rows of `halves.judged` to predict.
        neighbours: tokens that vote.
        sizes: experts predicted at each router.
        generator: draws the tokens that are compared.
        choices: how many of a token's experts count; None for all.
    """
    stored = halves.fitted
    if len(stored) > _STORED:
        stored = np.sort(generator.choice(stored, _STORED, replace=False))
    asked = halves.judged[sample]
    shared = np.zeros((len(asked), len(stored)), np.float32)
    count = min(neighbours, len(stored))
    found: list[Hits | None] = []
    for number, (router, size) in enumerate(zip(routers, sizes, strict=True)):
        ours = _chosen(router, asked, choices)
        theirs = _chosen(router, stored, choices)
        if number == 0:
            found.append(None)
        else:
            nearest = np.argpartition(-shared, count - 1, axis=1)[:, :count]
            votes = theirs[nearest].sum(1)
            found.append((best(votes, size) & (ours > 0)).sum(1))
        shared += ours @ theirs.T
    return found


def sequence_neighbours(
    trace: Trace,
    routers: tuple[Router, ...],
    halves: Halves,
    *,
    sample: NDArray[np.int64],
    sizes: list[int],
    choices: int | None,
) -> list[Hits]:
    """Hits at each router of the most frequent experts of the stored sequence most like the tokens so far.

    MoE-Infinity's expert activation matrices: counts [router, expert] of a sequence; similarity is the mean over routers of the
    cosine between rows. The matrix of the tokens before the one predicted is compared with those of the fitted half's
    sequences; at the first token of a sequence every sequence is equally like it, and the first is taken.
    """
    asked = halves.judged[sample]
    stored = np.unique(trace.sequence[halves.fitted])
    place = np.searchsorted(stored, trace.sequence[halves.fitted])
    similarity = np.zeros((len(asked), len(stored)), np.float32)
    matrices = []
    for router in routers:
        cells = place[:, None] * router.n_experts + router.experts[halves.fitted, :choices]
        number = np.bincount(cells.ravel(), minlength=len(stored) * router.n_experts)
        counts = number.reshape(len(stored), -1).astype(np.float32)
        so_far = _counts_before(router, trace, asked, choices)
        similarity += _unit(so_far) @ _unit(counts).T
        matrices.append(counts)
    nearest = similarity.argmax(1)
    return [
        (best(counts, size)[nearest] & (_chosen(router, asked, choices) > 0)).sum(1)
        for router, counts, size in zip(routers, matrices, sizes, strict=True)
    ]


def _chosen(router: Router, rows: NDArray[np.int64], choices: int | None) -> NDArray[np.float32]:
    """[row, expert] 1 where it was chosen."""
    chosen = np.zeros((len(rows), router.n_experts), np.float32)
    np.put_along_axis(chosen, router.experts[rows, :choices].astype(np.int64), 1.0, axis=1)
    return chosen


def _counts_before(router: Router, trace: Trace, rows: NDArray[np.int64], choices: int | None) -> NDArray[np.float32]:
    """[row, expert] how often the expert was chosen earlier in the row's sequence."""
    counts = np.zeros((len(rows), router.n_experts), np.float32)
    starts = trace.starts[trace.sequence[rows]]
    for number, (start, stop) in enumerate(zip(starts.tolist(), rows.tolist(), strict=True)):
        before = router.experts[start:stop, :choices]
        counts[number] = np.bincount(before.ravel(), minlength=router.n_experts)
    return counts


def _unit(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    length = np.linalg.norm(counts, axis=1, keepdims=True)
    return (counts / np.where(length > 0, length, 1.0)).astype(np.float32)
