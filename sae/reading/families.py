"""Families of latents: a dense one that fires wherever sparser ones do, found in a tree of what fires together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.sae.reading.activations import Activations
from moescope.sae.reading.pairs import Together, counts_together, measured, overlap, phi
from moescope.sae.reading.run_text import Ints

FEWEST_TOKENS, FEWEST_TOGETHER = 20, 5


@dataclass(frozen=True)
class PairGraph:
    """Pairs that fire together.

    Attributes:
        first, second: [edge] latents with an overlap over the threshold, first < second.
        overlap: [edge] N_ij ÷ min(N_i, N_j).
        partner_first, partner_second: [pair] pairs of the largest phi of every latent, first < second.
    """

    first: Ints
    second: Ints
    overlap: NDArray[np.floating[Any]]
    partner_first: Ints
    partner_second: Ints


def pair_graph(acts: Activations, *, threshold: float, dense: float, partners: int) -> PairGraph:
    """Go through all pairs of latents once.

    Args:
        acts: activations.
        threshold: overlap from which a pair is an edge.
        dense: latents on more than this share of the tokens have no edges: they would be everyone's parent.
        partners: pairs of largest phi kept for each latent.
    """
    counts, tokens = acts.counts, acts.tokens
    enough = counts >= FEWEST_TOKENS
    usual = enough & (counts <= dense * tokens)
    edges: list[tuple[NDArray[np.int64], ...]] = []
    pairs: list[Ints] = []
    for start, both in counts_together(acts):
        mine = np.arange(start, start + len(both))
        share = both / np.maximum(np.minimum(counts[mine, None], counts[None, :]), 1)
        later = np.arange(acts.latents)[None, :] > mine[:, None]
        kept = later & (share >= threshold) & (both >= FEWEST_TOGETHER) & usual[mine, None] & usual[None, :]
        i, j = np.nonzero(kept)
        edges.append((mine[i], j, share[i, j].astype(np.float32)))
        strength = phi(both.astype(np.float64), counts[mine, None], counts[None, :], float(tokens))
        strength[~(np.isfinite(strength) & (both >= FEWEST_TOGETHER) & enough[None, :] & enough[mine, None])] = -np.inf
        strength[np.arange(len(mine)), mine] = -np.inf
        best = np.argpartition(-strength, min(partners, strength.shape[1] - 1), axis=1)[:, :partners]
        found = np.take_along_axis(strength, best, 1) > 0
        first = np.broadcast_to(mine[:, None], best.shape)[found]
        pairs.append(np.stack([np.minimum(first, best[found]), np.maximum(first, best[found])], 1))
    first, second, share = (np.concatenate(column) for column in zip(*edges, strict=True))
    unique = np.unique(np.concatenate(pairs), axis=0)
    return PairGraph(first, second, share, unique[:, 0], unique[:, 1])


def families(graph: PairGraph, counts: Ints, *, rounds: int = 3) -> list[tuple[int, list[int]]]:
    """Parents with their members.

    Disentangling Dense Embeddings with Sparse Autoencoders (arXiv 2408.00657): of the pairs over the threshold the maximum
    spanning tree is taken, every edge of it points from the denser latent to the sparser one (of equals, to the higher
    number), and a latent to which none points is the parent of all that can be reached from it. Parents are then removed
    and the rest is gone through again, so that a member may be a parent in a later round. There the weight of a pair is
    N_ij ÷ N_i, which differs by direction; a tree without directions needs one number, here the larger, N_ij ÷ min(N_i, N_j).

    Args:
        graph: pairs over the threshold.
        counts: [latent] tokens on which each fires.
        rounds: how often.

    Example:
        >>> edges = np.array([0, 0, 1]), np.array([1, 2, 2]), np.array([0.9, 0.8, 0.3], np.float32)
        >>> families(PairGraph(*edges, np.zeros(0, int), np.zeros(0, int)), np.array([100, 40, 30]))
        [(0, [1, 2]), (1, [2])]
    """
    alive = np.ones(len(counts), bool)
    found: list[tuple[int, list[int]]] = []
    for _ in range(rounds):
        mine = alive[graph.first] & alive[graph.second]
        if not mine.any():
            break
        parents, children = _tree(graph, mine, counts)
        below: dict[int, list[int]] = {}
        for parent, child in zip(parents.tolist(), children.tolist(), strict=True):
            below.setdefault(parent, []).append(child)
        roots = sorted(set(below) - set(children.tolist()))
        found += [(root, _reached(root, below)) for root in roots]
        alive[roots] = False
    return found


def _tree(graph: PairGraph, mine: NDArray[np.bool_], counts: Ints) -> tuple[Ints, Ints]:
    """Edges of the maximum spanning tree, from the denser latent to the sparser one."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    # The largest overlap has the smallest weight, and none is 0, which would be no edge.
    weight = 2.0 - graph.overlap[mine].astype(np.float64)
    shape = len(counts), len(counts)
    tree = minimum_spanning_tree(csr_array((weight, (graph.first[mine], graph.second[mine])), shape=shape)).tocoo()
    first, second = tree.row.astype(np.int64), tree.col.astype(np.int64)
    low, high = np.minimum(first, second), np.maximum(first, second)
    swapped = counts[high] > counts[low]
    return np.where(swapped, high, low), np.where(swapped, low, high)


def _reached(root: int, below: dict[int, list[int]]) -> list[int]:
    seen, waiting = {root}, [root]
    while waiting:
        for child in below.get(waiting.pop(), ()):
            if child not in seen:
                seen.add(child)
                waiting.append(child)
    return sorted(seen - {root})


def family_pairs(acts: Activations, found: list[tuple[int, list[int]]], *, draws: int, seed: int) -> Together:
    """Parent and member of every family, with the share of the member's tokens on which the parent fires too."""
    pairs = np.array([(parent, member) for parent, members in found for member in members], np.int64).reshape(-1, 2)
    return measured(acts, pairs[:, 0], pairs[:, 1], overlap, draws=draws, seed=seed)
