"""ESFT against the published counts, a brute force, and both traps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]
DATA = Path("/work/shared/data/deepseek_v2_lite_routing")


@pytest.mark.parametrize(("task", "mean", "total"), [("law", 5.88, 153), ("summary", 4.92, 128)])
def test_published_counts_of_relevant_experts(store: Store, task: str, mean: float, total: int) -> None:
    if not DATA.exists():
        pytest.skip("the real trace is not here")
    run = store.import_trace(DATA / f"{task}.parquet", name=f"esft {task}", n_experts=64)
    counts = analyze(run, "esft", draws=20).df().query("metric == 'relevant experts'")
    assert len(counts) == 26
    assert round(counts["value"].mean(), 2) == mean
    assert counts["value"].sum() == total
    assert (counts["ci_low"] <= counts["value"]).mean() > 0.9
    assert set(counts["null"]) == {13}
    released = analyze(run, "esft", divide="released", draws=20).df().query("metric == 'relevant experts'")
    assert released["value"].sum() != total, "dividing over layers gives other sets"


def _brute(router: Any, tokens: list[int], score: str, p: float) -> tuple[list[float], set[int]]:
    scores = [0.0] * router.n_experts
    for token in tokens:
        for slot in range(router.top_k):
            amount = 1 / router.top_k if score == "token" else float(router.given[token, slot])
            scores[router.experts[token, slot]] += amount / len(tokens)
    total = sum(scores)
    relevant: set[int] = set()
    reached = 0.0
    for expert in sorted(range(router.n_experts), key=lambda e: (-scores[e], e)):
        if reached >= p - 1e-9:
            break
        relevant.add(expert)
        reached += scores[expert] / total
    return scores, relevant


@given(
    size=st.sampled_from([1, 3, 8, 256]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    score=st.sampled_from(["token", "gate"]),
    p=st.sampled_from([0.05, 0.2, 0.75, 1.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=12)
def test_scores_and_sets_agree_with_adding_up(
    plant: Plant, planted: ModuleType, size: int, lengths: list[int], score: str, p: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    total, k = sum(lengths), min(2, size)
    routers = []
    for layer, experts in enumerate((size, size + 2)):
        chosen = np.stack([generator.permutation(experts)[:k] for _ in range(total)])
        weights = np.sort(generator.uniform(0.1, 1, chosen.shape), axis=1)[:, ::-1].astype(np.float32)
        routers.append(planted.Router(chosen, experts, layer=layer, weights=weights))
    labels = [["a", "b", None][number % 3] for number in range(len(lengths))]
    of = np.repeat(np.arange(len(lengths)), lengths)
    run = plant(lengths=lengths, labels=labels, routers=routers)
    frame = analyze(run, "esft", score=score, p=p, draws=3).df()
    assert set(frame["label"]) == {"all", *(label for label in labels if label)}
    for router in routers:
        for label in set(frame["label"]):
            tokens = [t for t in range(total) if label == "all" or labels[of[t]] == label]
            scores, relevant = _brute(router, tokens, score, p)
            part = frame[(frame["layer"] == router.layer) & (frame["label"] == label)]
            experts = part[part["metric"] == f"{score} score"].sort_values("expert")
            assert experts["value"].tolist() == pytest.approx(scores)
            assert set(experts.loc[experts["relevant"].astype(bool), "expert"]) == relevant
            assert part.loc[part["metric"] == "relevant experts", "value"].item() == len(relevant)


def test_sequences_may_count_alike_however_long(plant: Plant, planted: ModuleType) -> None:
    router = planted.Router(np.array([[0], [1], [1], [1]]), 2)
    run = plant(lengths=[1, 3], routers=[router])

    def scores(average: str) -> list[float]:
        return analyze(run, "esft", average=average).df().query("metric == 'token score'")["value"].tolist()

    assert scores("token") == [0.25, 0.75]
    assert scores("sequence") == [0.5, 0.5]


def test_released_division_is_by_expert_id_over_layers(plant: Plant, planted: ModuleType) -> None:
    """Expert 0 takes 3/4 in one layer and 1/4 in the other: over layers its shares are 3/4 and 1/4, as are those of 1."""
    first = np.array([[0], [0], [0], [1]])
    routers = [planted.Router(first, 3), planted.Router(1 - first, 3, layer=1)]
    run = plant(lengths=[4], routers=routers)
    frame = analyze(run, "esft", divide="released", p=0.76).df().query("relevant == True")
    assert list(zip(frame["layer"], frame["expert"], strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    frame = analyze(run, "esft", divide="released", p=0.75).df().query("relevant == True")
    assert list(zip(frame["layer"], frame["expert"], strict=True)) == [(0, 0), (1, 1)]


@pytest.mark.parametrize("p", [0, -0.1, 1.5, float("nan")])
def test_senseless_shares_are_refused(plant: Plant, planted: ModuleType, p: float) -> None:
    run = plant(lengths=[2], routers=[planted.Router(np.array([[0], [1]]), 2)])
    with pytest.raises(InputError, match="'p' cannot be"):
        analyze(run, "esft", p=p)


def test_gate_score_without_weights_says_what_to_do(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[2], routers=[planted.Router(np.array([[0], [1]]), 2)])
    run.store.connection.execute("UPDATE routing SET weights = NULL WHERE run_id = ?", [run.run_id])
    with pytest.raises(InputError, match="no routing weights"):
        analyze(run, "esft", score="gate")
    assert analyze(run, "esft").n == 2
