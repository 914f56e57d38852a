"""The parts of reading against other libraries and plain loops: trees, cosines, the null of labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moescope.sae.reading.activations import Activations
from moescope.sae.reading.contexts import contexts
from moescope.sae.reading.families import PairGraph, families, pair_graph
from moescope.sae.reading.labels import lifts
from moescope.sae.reading.pairs import moved_within_documents
from moescope.sae.reading.predictability import moved_along
from moescope.sae.reading.run_text import RunText

DOCUMENTS, LENGTH = 30, 20


def text(labels: Any = None) -> RunText:
    """Documents of equal length with labels 0, 1, 2 in turn."""
    n = DOCUMENTS * LENGTH
    document = np.repeat(np.arange(DOCUMENTS, dtype=np.int32), LENGTH)
    label = (np.arange(DOCUMENTS) % 3 if labels is None else labels).astype(np.int32)
    position = np.tile(np.arange(LENGTH, dtype=np.int32), DOCUMENTS)
    return RunText(
        np.arange(n),
        np.zeros(n, np.int32),
        document.astype(np.int64),
        position,
        document,
        label,
        ("a", "b", "c"),
        DOCUMENTS,
    )


def activations_of(dense: Any, *, encoded: Any = None, labels: Any = None) -> Activations:
    """Triples of a [token, latent] matrix."""
    latent, place = np.nonzero(dense.T > 0)
    starts = np.searchsorted(latent, np.arange(dense.shape[1] + 1))
    encoded = np.ones(len(dense), bool) if encoded is None else encoded
    return Activations(text(labels), encoded, starts, place.astype(np.int32), dense.T[latent, place].astype(np.float32))


def random_dense(latents: int, share: float = 0.05, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    fires = random.random((DOCUMENTS * LENGTH, latents)) < share
    return np.where(fires, random.uniform(0.5, 2, fires.shape), 0).astype(np.float32)


def test_families_are_reached_along_the_maximum_spanning_tree_of_networkx() -> None:
    import networkx as nx

    random = np.random.default_rng(3)
    size = 40
    first, second = (x.astype(np.int64) for x in np.nonzero(np.triu(random.random((size, size)) < 0.15, 1)))
    weight = random.permutation(len(first)).astype(np.float64) / len(first) * 0.8 + 0.1  # no two alike: one tree
    counts = random.permutation(size) + 20
    found = families(PairGraph(first, second, weight, first[:0], first[:0]), counts, rounds=2)
    alive, expected = set(range(size)), []
    for _ in range(2):
        graph = nx.Graph()
        graph.add_weighted_edges_from(
            (i, j, w) for i, j, w in zip(first, second, weight, strict=True) if {int(i), int(j)} <= alive
        )
        tree = nx.DiGraph()
        for i, j in nx.maximum_spanning_tree(graph).edges:
            tree.add_edge(*((i, j) if counts[i] > counts[j] else (j, i)))
        roots = sorted(int(n) for n in tree if tree.in_degree(n) == 0 and tree.out_degree(n))
        expected += [(root, sorted(int(n) for n in nx.descendants(tree, root))) for root in roots]
        alive -= set(roots)
    assert found == expected
    assert len(found) > 3


def test_pairs_over_the_threshold_are_those_of_a_dense_product() -> None:
    dense = random_dense(30, 0.15)
    dense[:, 1] = np.where(dense[:, 0] > 0, dense[:, 1] + 1, 0)
    acts = activations_of(dense)
    graph = pair_graph(acts, threshold=0.2, dense=0.16, partners=2)
    fires = (dense > 0).astype(int)
    both, counts = fires.T @ fires, fires.sum(0)
    usual = [i for i in range(30) if 20 <= counts[i] <= 0.16 * len(dense)]
    expected = {
        (i, j)
        for i in usual
        for j in usual
        if i < j and both[i, j] >= 5 and both[i, j] / min(counts[i], counts[j]) >= 0.2
    }
    assert set(zip(graph.first.tolist(), graph.second.tolist(), strict=True)) == expected
    assert 0 < len(expected) < len(usual) ** 2 / 2


def test_labels_given_out_at_random_are_seldom_found() -> None:
    random = np.random.default_rng(5)
    rates = (
        random.random((DOCUMENTS, 60)) < 0.5
    )  # a latent is on half the documents, often there: not independent tokens
    dense = random_dense(60, 0.5) * np.repeat(rates, LENGTH, axis=0)
    found = lifts(
        activations_of(dense, labels=random.permutation(np.arange(DOCUMENTS) % 3)), draws=50, permutations=200
    )
    assert found is not None
    assert (found.p < 0.05).mean() < 0.05
    assert (found.q < 0.05).mean() < 0.02
    # Tokens taken for independent would find them: the same counts in a test that knows of no documents.
    from scipy.stats import fisher_exact

    naive = [
        fisher_exact([[a, t - a], [s - a, len(dense) - t - s + a]]).pvalue
        for row, s in zip(found.active, (dense > 0).sum(0), strict=True)
        for a, t in zip(row, found.tokens, strict=True)
    ]
    assert np.mean(np.array(naive) < 0.05) > 0.2


@pytest.mark.parametrize("move", ["along", "within"])
def test_moved_activations_keep_their_number_and_values(move: str) -> None:
    encoded = np.random.default_rng(0).random(DOCUMENTS * LENGTH) < 0.8
    dense = random_dense(8) * encoded[:, None]
    acts = activations_of(dense, encoded=encoded)
    if move == "along":
        moved = moved_along(acts, np.flatnonzero(encoded), np.random.default_rng(1))
    else:
        moved = moved_within_documents(acts, 1)
        assert np.array_equal(moved.by_document(slice(0, 8)), acts.by_document(slice(0, 8)))
    assert encoded[moved.place].all()
    for latent in range(8):
        place, value = moved.of(latent)
        assert (np.diff(place) > 0).all()
        assert sorted(value) == sorted(acts.of(latent)[1])
    assert not np.array_equal(moved.place, acts.place)


def test_examples_stay_in_their_sequence_at_its_ends() -> None:
    dense = np.zeros((DOCUMENTS * LENGTH, 2), np.float32)
    dense[[0, LENGTH - 1, LENGTH, 2 * LENGTH - 1], 0] = [1, 2, 3, 4]
    found = contexts(activations_of(dense), top=5, strata=1, per_stratum=1, window=12, seed=0)
    largest = found.stratum == 0
    assert found.first[largest].tolist() == [2 * LENGTH - 12, LENGTH - 12]
    assert found.length.tolist() == [12] * len(found.length)
    assert set(found.latent) == {0}


def test_neighbours_are_the_largest_cosines(components: Any) -> None:
    import torch

    from moescope.sae.reading.cosines import neighbours, splits

    decoder = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    mine = components(40, decoder=decoder)
    unit = (decoder / decoder.norm(dim=1, keepdim=True)).numpy()
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    found = neighbours(mine, mine, top=3)
    assert found.first.tolist() == np.repeat(np.arange(40), 3).tolist()
    assert found.second.tolist() == np.argsort(-cosine, 1)[:, :3].ravel().tolist()
    assert np.allclose(found.value, np.sort(cosine, 1)[:, ::-1][:, :3].ravel(), atol=1e-6)
    # A larger dictionary in which two rows split the first of the smaller one, and one row is the second.
    small = components(2, decoder=torch.eye(2, 3))
    large = components(4, decoder=torch.tensor([[1, 0.1, 0.5], [1, 0.1, -0.5], [0, 3, 0], [0, 0.1, 1.0]]))
    split = splits(small, large)
    assert list(zip(split.first.tolist(), split.second.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 2)]
    assert split.value[2] == 1
