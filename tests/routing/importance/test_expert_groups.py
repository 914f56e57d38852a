"""Router similarity and behavioural clusters: brute forces, planted groups, no groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.importance.expert_clusters import silhouettes
from moescope.store.run import Run

Plant = Callable[..., Run]


def _with_logits(plant: Plant, planted: ModuleType, logits: np.ndarray, lengths: list[int]) -> Run:
    chosen = logits.argmax(axis=1)[:, None]
    return plant(lengths=lengths, routers=[planted.Router(chosen, logits.shape[1], logits=logits)])


@given(size=st.sampled_from([1, 2, 4, 9]), tokens=st.integers(1, 8), centred=st.booleans(), seed=st.integers(0, 10**6))
@settings(max_examples=12)
def test_similarity_is_the_cosine_of_columns(
    plant: Plant, planted: ModuleType, size: int, tokens: int, centred: bool, seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(1, 1, (tokens, size)).astype(np.float32).astype(float)
    frame = analyze(
        _with_logits(plant, planted, logits, [1] * tokens), "router_similarity", centred=centred, draws=3
    ).df()
    columns = [[row[e] - (sum(row) / size if centred else 0) for row in logits.tolist()] for e in range(size)]

    def alike(i: int, j: int) -> float:
        product = sum(a * b for a, b in zip(columns[i], columns[j], strict=True))
        lengths = math.hypot(*columns[i]) * math.hypot(*columns[j])
        return (product / lengths + 1) / 2

    if size == 1:
        assert frame["value"].isna().all()
        return
    for expert in range(size):
        row = frame[frame["expert"] == expert].iloc[0]
        assert row["value"] == pytest.approx(max(alike(expert, o) for o in range(size) if o != expert), abs=1e-5)
        assert alike(expert, row["other"]) == pytest.approx(row["value"], abs=1e-5)
    pairs = [alike(i, j) for i in range(size) for j in range(i)]
    mean = frame[frame["metric"] == "mean similarity"].iloc[0]
    assert mean["value"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_independent_columns_lie_at_their_null_and_copies_above(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(2, 1, (400, 4))
    frame = analyze(_with_logits(plant, planted, logits, [50] * 8), "router_similarity").df()
    mean = frame[frame["metric"] == "mean similarity"].iloc[0]
    assert mean["value"] == pytest.approx(mean["null"], abs=0.02)
    assert mean["null"] == pytest.approx((4 / 5 + 1) / 2, abs=0.02), "cos of two columns of mean 2 and spread 1 is 4/5"
    logits[:, 3] = logits[:, 0] + generator.normal(0, 0.1, 400)
    row = analyze(_with_logits(plant, planted, logits, [50] * 8), "router_similarity").df().iloc[0]
    assert row["other"] == 3
    assert row["ci_low"] > row["null"] + 0.05


def test_similarity_without_logits_names_the_probe(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[2], routers=[planted.Router(np.array([[0], [1]]), 2)])
    with pytest.raises(InputError, match="router_logits"):
        analyze(run, "router_similarity")
    with pytest.raises(InputError, match="--probe router_logits"):
        analyze(
            plant(lengths=[1] * 3, routers=[planted.Router(np.zeros((3, 1), int), 4)]),
            "expert_clusters",
            basis="logits",
        )


@given(items=st.integers(2, 12), kinds=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_silhouettes_agree_with_their_definition(items: int, kinds: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(items, 2))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    _, number = np.unique(generator.integers(0, kinds, items), return_inverse=True)
    ours = silhouettes(distance, number)
    for item in range(items):
        own = [distance[item, o] for o in range(items) if number[o] == number[item] and o != item]
        others = [
            np.mean([distance[item, o] for o in range(items) if number[o] == c])
            for c in set(number.tolist()) - {number[item]}
        ]
        if not own or not others:
            assert ours[item] == 0
            continue
        a, b = float(np.mean(own)), float(min(others))
        assert ours[item] == pytest.approx((b - a) / max(a, b))


def _grouped(plant: Plant, planted: ModuleType, strength: float) -> Run:
    """Nine experts in three groups; a document uses one group with `strength`, and any expert otherwise."""
    generator = np.random.default_rng(0)
    lengths = [60] * 30
    chosen = np.empty((1800, 1), int)
    for token in range(1800):
        group = (token // 60) % 3
        inside = generator.random() < strength
        chosen[token] = group * 3 + generator.integers(3) if inside else generator.integers(9)
    return plant(lengths=lengths, routers=[planted.Router(chosen, 9)])


def test_planted_groups_are_found_with_their_number(plant: Plant, planted: ModuleType) -> None:
    frame = analyze(_grouped(plant, planted, 0.8), "expert_clusters").df()
    numbers = frame[frame["metric"] == "cluster"].sort_values("expert")["value"].tolist()
    assert (
        [numbers[3 * g] for g in range(3)]
        == [numbers[3 * g + 1] for g in range(3)]
        == [numbers[3 * g + 2] for g in range(3)]
    )
    assert len(set(numbers)) == 3
    mean = frame[frame["metric"] == "mean silhouette"].iloc[0]
    assert mean["value"] > 0.5
    assert mean["value"] > mean["null"] + 0.3
    assert mean["p"] == pytest.approx(1 / 11)


def test_no_groups_lie_at_the_null(plant: Plant, planted: ModuleType) -> None:
    mean = analyze(_grouped(plant, planted, 0.0), "expert_clusters").df().query("metric == 'mean silhouette'").iloc[0]
    assert abs(mean["value"] - mean["null"]) < 0.15
    assert mean["p"] > 1 / 11


def test_asked_for_clusters_are_cut(plant: Plant, planted: ModuleType) -> None:
    frame = analyze(_grouped(plant, planted, 0.8), "expert_clusters", clusters=5).df()
    assert frame.loc[frame["metric"] == "cluster", "value"].nunique() == 5


def test_experts_that_never_vary_are_in_no_cluster(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[4] * 4, routers=[planted.Router((np.arange(16) % 2)[:, None], 4)])
    result = analyze(run, "expert_clusters")
    assert result.df().query("metric == 'cluster'")["value"].isna().all()
    assert any("4 experts are in no cluster" in note for note in result.notes)


def test_too_few_documents_are_refused(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[4, 4], routers=[planted.Router((np.arange(8) % 4)[:, None], 4)])
    with pytest.raises(InputError, match="three documents"):
        analyze(run, "expert_clusters")


def test_a_column_of_nothing_has_no_nearest_expert(plant: Plant, planted: ModuleType) -> None:
    logits = np.random.default_rng(0).normal(size=(12, 3))
    logits[:, 1] = 0
    frame = analyze(_with_logits(plant, planted, logits, [4] * 3), "router_similarity").df()
    assert frame.loc[frame["expert"] == 1, ["value", "other", "null"]].isna().to_numpy().all()
    mean = frame[frame["metric"] == "mean similarity"].iloc[0]
    assert mean["value"] == pytest.approx(frame[frame["expert"] == 0]["value"].item()), "one pair is left"
