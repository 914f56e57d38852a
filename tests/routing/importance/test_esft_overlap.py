"""Overlap of relevant experts between labels: planted difference, none, and a brute force."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]


@given(size=st.sampled_from([1, 3, 8]), p=st.sampled_from([0.2, 0.6, 1.0]), seed=st.integers(0, 10**6))
@settings(max_examples=12)
def test_overlap_agrees_with_sets_label_by_label(
    plant: Plant, planted: ModuleType, size: int, p: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    labels = ["a", "b", "c", "a", "b", None]
    lengths = [3] * 6
    of = np.repeat(np.arange(6), 3)
    layers = [generator.integers(0, size, (18, 1)), generator.integers(0, size + 2, (18, 1))]
    routers = [planted.Router(e, size + 2 * layer, layer=layer) for layer, e in enumerate(layers)]
    run = plant(lengths=lengths, labels=labels, routers=routers)
    frame = analyze(run, "esft_overlap", p=p, draws=3, permutations=2).df()
    assert list(zip(frame["label"], frame["other"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    for row in frame.itertuples():
        overlaps = []
        for router in routers:
            sets = []
            for label in (row.label, row.other):
                ids = [int(router.experts[t, 0]) for t in range(18) if labels[of[t]] == label]
                order = sorted(range(router.n_experts), key=lambda e, ids=ids: (-ids.count(e), e))
                m = next(
                    m for m in range(1, len(order) + 1) if sum(ids.count(e) for e in order[:m]) >= p * len(ids) - 1e-9
                )
                sets.append(set(order[:m]))
            overlaps.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        assert row.value == pytest.approx(np.mean(overlaps))


def _two_labels(plant: Plant, planted: ModuleType, apart: bool) -> Run:
    generator = np.random.default_rng(0)
    chosen = generator.integers(0, 8, (20 * 40, 1))
    if apart:
        chosen = chosen // 2 + 4 * ((np.arange(800) // 40) % 2)[:, None]
    return plant(lengths=[40] * 20, labels=["a", "b"] * 10, routers=[planted.Router(chosen, 8)])


def test_labels_with_experts_of_their_own_share_none(plant: Plant, planted: ModuleType) -> None:
    row = analyze(_two_labels(plant, planted, apart=True), "esft_overlap", p=0.9).df().iloc[0]
    assert row["value"] == row["ci_low"] == row["ci_high"] == 0
    assert row["null"] > 0.5
    assert row["floor"] == pytest.approx(
        np.mean([i / (8 - i) * w for i, w in zip(range(5), (1, 16, 36, 16, 1), strict=True)]) * 5 / 70
    )
    assert row["p"] == pytest.approx(1 / 51)


def test_labels_that_route_alike_lie_at_the_null(plant: Plant, planted: ModuleType) -> None:
    row = analyze(_two_labels(plant, planted, apart=False), "esft_overlap", p=0.5).df().iloc[0]
    assert row["p"] > 0.05


def test_fewer_than_two_labels_are_refused(plant: Plant, planted: ModuleType) -> None:
    router = planted.Router(np.zeros((2, 1), int), 2)
    with pytest.raises(InputError, match="has no labels"):
        analyze(plant(lengths=[2], routers=[router]), "esft_overlap")
    with pytest.raises(InputError, match="one label only"):
        analyze(plant(lengths=[2], labels=["a"], routers=[router]), "esft_overlap")
