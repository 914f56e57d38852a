"""Usage sweeps: closed forms, a reading brute force, and an order of use that is not judged by itself."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, comb
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]


def test_round_robin_is_even_use(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[8] * 4, routers=[planted.Router((np.arange(32) % 8)[:, None], 8)])
    frame = analyze(run, "usage_sweep").df()
    served = frame[frame["metric"] == "decisions served"]
    assert served["value"].tolist() == pytest.approx([m / 8 for m in range(1, 9)])
    assert served["null"].tolist() == pytest.approx(served["value"].tolist())
    needed = frame[frame["metric"] == "experts for 90%"].iloc[0]
    assert needed["value"] == needed["null"] == needed["ci_low"] == needed["ci_high"] == 8


def test_constant_routing_needs_its_k_experts_only(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[5] * 4, routers=[planted.Router(np.tile([3, 1], (20, 1)), 6)])
    frame = analyze(run, "usage_sweep").df()
    assert frame.loc[frame["metric"] == "experts for 90%", "value"].item() == 2
    assert frame.loc[frame["metric"] == "decisions served", "value"].tolist() == [0.5, 1, 1, 1, 1, 1]
    whole = frame[frame["metric"] == "tokens served whole"]
    assert whole["value"].tolist() == [0, 1, 1, 1, 1, 1]
    assert whole["null"].tolist() == pytest.approx([comb(m, 2) / comb(6, 2) for m in range(1, 7)])


@given(
    size=st.sampled_from([1, 2, 5, 256]),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    target=st.sampled_from([0.3, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=12)
def test_share_served_agrees_with_counting(
    plant: Plant, planted: ModuleType, size: int, lengths: list[int], target: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    k = min(2, size)
    chosen = np.stack([generator.permutation(size)[:k] for _ in range(sum(lengths))])
    weights = np.sort(generator.uniform(0.1, 1, chosen.shape), axis=1)[:, ::-1].astype(np.float32)
    run = plant(lengths=lengths, routers=[planted.Router(chosen, size, weights=weights)])
    frame = analyze(run, "usage_sweep", held_out=False, target=target, draws=3).df()
    use = [int((chosen == e).sum()) for e in range(size)]
    order = sorted(range(size), key=lambda e: (-use[e], e))
    needed = None
    expected: dict[str, list[float]] = {"decisions served": [], "weight served": [], "tokens served whole": []}
    for m in range(1, size + 1):
        kept = set(order[:m])
        decisions = sum(use[e] for e in kept) / chosen.size
        expected["decisions served"].append(decisions)
        given_to = sum(
            float(w) for row, ws in zip(chosen, weights, strict=True) for e, w in zip(row, ws, strict=True) if e in kept
        )
        expected["weight served"].append(given_to / float(weights.sum()))
        expected["tokens served whole"].append(sum(set(row) <= kept for row in chosen.tolist()) / len(chosen))
        if needed is None and decisions >= target - 1e-9:
            needed = m
    for metric, values in expected.items():
        assert frame.loc[frame["metric"] == metric, "value"].tolist() == pytest.approx(values, abs=1e-6)
    row = frame[frame["metric"] == f"experts for {target:.0%}"].iloc[0]
    assert row["value"] == needed
    assert row["null"] == ceil(round(target * size, 9))


def test_order_of_use_comes_from_other_documents(plant: Plant, planted: ModuleType) -> None:
    """Two documents with experts of their own: what one uses most, the other never does."""
    run = plant(lengths=[6, 6], routers=[planted.Router(np.repeat([[0], [1]], 6, axis=0), 2)])
    served = analyze(run, "usage_sweep").df().query("metric == 'decisions served'")["value"].tolist()
    assert served == [0, 1]
    inside = analyze(run, "usage_sweep", held_out=False).df().query("metric == 'decisions served'")["value"].tolist()
    assert inside == [0.5, 1]


def test_one_document_is_ranked_by_itself_and_it_is_said(plant: Plant, planted: ModuleType) -> None:
    result = analyze(plant(lengths=[4], routers=[planted.Router(np.zeros((4, 1), int), 2)]), "usage_sweep")
    assert any("one document only" in note for note in result.notes)
    assert result.df()["ci_low"].isna().all()


@pytest.mark.parametrize("target", [0, -1, 1.1, float("nan")])
def test_senseless_targets_are_refused(plant: Plant, planted: ModuleType, target: float) -> None:
    run = plant(lengths=[2], routers=[planted.Router(np.array([[0], [1]]), 2)])
    with pytest.raises(InputError, match="'target' cannot be"):
        analyze(run, "usage_sweep", target=target)
