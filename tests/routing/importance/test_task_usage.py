"""Use in and out of task: labels with experts of their own, labels that route alike, and a brute force."""

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


def test_labels_with_experts_of_their_own_reach_the_closed_form(plant: Plant, planted: ModuleType) -> None:
    """Label a uses experts 0 and 1 alike, b uses 2 and 3: at m = 1 to 4 a's order serves ½, 1, 1, 1 of a and 0, 0, ½, 1 of b."""
    of = np.repeat(np.arange(24), 10)
    chosen = (2 * (of % 2) + np.arange(240) % 2)[:, None]
    run = plant(lengths=[10] * 24, labels=["a", "b"] * 12, routers=[planted.Router(chosen, 4)])
    frame = analyze(run, "task_usage").df()
    for row in frame.itertuples():
        assert row.value == row.ci_low == row.ci_high == (0.5 + 1 + 0.5 + 0) / 4
        assert row.null < 0.3
        assert row.p == pytest.approx(1 / 51)


def test_labels_that_route_alike_lie_at_the_null(plant: Plant, planted: ModuleType) -> None:
    chosen = np.random.default_rng(1).integers(0, 6, (20 * 40, 1))
    run = plant(lengths=[40] * 20, labels=["a", "b"] * 10, routers=[planted.Router(chosen, 6)])
    frame = analyze(run, "task_usage").df()
    assert frame["value"].abs().max() < 0.05
    assert (frame["p"] > 0.02).all()


@given(size=st.sampled_from([1, 2, 5, 256]), k=st.integers(1, 2), seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_area_of_two_documents_agrees_with_counting(
    plant: Plant, planted: ModuleType, size: int, k: int, seed: int
) -> None:
    """With two documents of label a, each is the other's half, whichever way they are dealt out."""
    generator = np.random.default_rng(seed)
    lengths, k = [3, 1, 4], min(k, size)
    chosen = np.stack([generator.permutation(size)[:k] for _ in range(8)])
    run = plant(lengths=lengths, labels=["a", "a", "b"], routers=[planted.Router(chosen, size)])
    result = analyze(run, "task_usage", draws=3, permutations=2)
    parts = [chosen[:3].ravel().tolist(), chosen[3:4].ravel().tolist(), chosen[4:].ravel().tolist()]
    differences = []
    for ranked, judged in ((0, 1), (1, 0)):
        order = sorted(range(size), key=lambda e, ids=parts[ranked]: (-ids.count(e), e))
        for m in range(1, size + 1):
            kept = set(order[:m])
            inside = sum(e in kept for e in parts[judged]) / len(parts[judged])
            outside = sum(e in kept for e in parts[2]) / len(parts[2])
            differences.append(inside - outside)
    frame = result.df()
    assert frame["label"].tolist() == ["a"]
    assert frame["value"].item() == pytest.approx(np.mean(differences))
    assert any("not judged: 'b'" in note for note in result.notes)


def test_labels_that_cannot_be_told_apart_are_refused(plant: Plant, planted: ModuleType) -> None:
    router = planted.Router(np.zeros((2, 1), int), 2)
    with pytest.raises(InputError, match="has no labels"):
        analyze(plant(lengths=[1, 1], routers=[router]), "task_usage")
    with pytest.raises(InputError, match="cannot tell use on one label"):
        analyze(plant(lengths=[1, 1], labels=["a", "a"], routers=[router]), "task_usage")
    with pytest.raises(InputError, match="'a': 1, 'b': 1"):
        analyze(plant(lengths=[1, 1], labels=["a", "b"], routers=[router]), "task_usage")
