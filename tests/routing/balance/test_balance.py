"""Balance: closed-form truths, a count written to be read, chance levels, groups and refusals."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.balance.measures import chance_levels, chance_loads, load_measures
from moescope.store.run import Run

Plant = Callable[..., Run]


def _of(frame: pd.DataFrame, metric: str, column: str = "value", **where: Any) -> float:
    part = frame[frame["metric"] == metric]
    for name, value in where.items():
        part = part[part[name] == value]
    assert len(part) == 1
    return float(part[column].iloc[0])


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (4, 1), (256, 8)])
def test_constant_routing_gives_the_largest_unevenness(
    plant: Plant, planted: ModuleType, experts: int, top_k: int
) -> None:
    run = plant(lengths=[20], routers=[planted.Router(np.tile(np.arange(top_k), (20, 1)), experts)])
    frame = analyze(run, "balance").df()
    assert _of(frame, "MaxVio") == pytest.approx(experts / top_k - 1)
    assert _of(frame, "max ÷ mean") == pytest.approx(experts / top_k)
    assert _of(frame, "CV") == pytest.approx(math.sqrt(experts / top_k - 1))
    assert _of(frame, "normalised entropy") == pytest.approx(math.log(top_k) / math.log(experts))
    assert _of(frame, "effective experts") == pytest.approx(top_k)
    assert _of(frame, "Jain's index") == pytest.approx(top_k / experts)
    assert _of(frame, "experts used") == pytest.approx(top_k / experts)
    assert _of(frame, "dead experts") == pytest.approx(1 - top_k / experts)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (256, 4), (6, 1)])
def test_round_robin_is_perfectly_even(plant: Plant, planted: ModuleType, experts: int, top_k: int) -> None:
    chosen = (np.arange(experts * top_k) % experts).reshape(experts, top_k)
    result = analyze(plant(lengths=[experts], routers=[planted.Router(chosen, experts)]), "balance")
    frame = result.df()
    assert _of(frame, "CV") == 0
    assert _of(frame, "MaxVio") == 0
    assert _of(frame, "normalised entropy") == pytest.approx(1)
    assert _of(frame, "Jain's index") == pytest.approx(1)
    assert "Routing is balanced" in result.title


def test_one_expert_or_all_experts_cannot_be_uneven(plant: Plant, planted: ModuleType) -> None:
    routers = [
        planted.Router(np.zeros((6, 1), int), 1),
        planted.Router(np.tile([1, 0], (6, 1)), 2, layer=1),
    ]
    frame = analyze(plant(lengths=[1] * 6, routers=routers), "balance").df()
    for layer in (0, 1):
        assert _of(frame, "CV", layer=layer) == 0
        assert _of(frame, "CV", "null", layer=layer) == 0
        assert _of(frame, "normalised entropy", layer=layer) == pytest.approx(1)


def _measured_by_hand(loads: list[int], starved: float) -> dict[str, float]:
    size, total = len(loads), sum(loads)
    mean = total / size
    shares = [load / total for load in loads]
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return {
        "CV": math.sqrt(sum((load - mean) ** 2 for load in loads) / size) / mean,
        "max ÷ mean": max(loads) / mean,
        "MaxVio": max(loads) / mean - 1,
        "normalised entropy": entropy / math.log(size) if size > 1 else 1.0,
        "effective experts": math.exp(entropy),
        "Jain's index": total**2 / (size * sum(load**2 for load in loads)),
        "experts used": sum(load > 0 for load in loads) / size,
        "dead experts": sum(load == 0 for load in loads) / size,
        "starved experts": sum(load < starved * mean for load in loads) / size,
    }


@given(data=st.data())
def test_measures_of_every_group_equal_a_count(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tokens = sum(lengths)
    labels = data.draw(st.lists(st.sampled_from(["a", "b", None]), min_size=len(lengths), max_size=len(lengths)))
    decode = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    routers = []
    for layer, block in ((0, "mlp"), (0, "attn"), (3, "mlp")):
        size = data.draw(st.sampled_from([1, 2, 5, 256]))
        top_k = data.draw(st.integers(1, min(size, 3)))
        chosen = np.stack([generator.permutation(size)[:top_k] for _ in range(tokens)])
        routers.append(planted.Router(chosen, size, layer=layer, block=block))
    run = plant(lengths=lengths, labels=labels, decode=decode, routers=routers)
    by = data.draw(st.sampled_from(["layer", "phase", "position", "label"]))
    if by == "label" and not any(labels):
        with pytest.raises(InputError, match="no labels"):
            analyze(run, "balance", by=by, null_draws=3, draws=3)
        return
    found = analyze(run, "balance", by=by, bins=3, null_draws=3, draws=3, starved=0.5).df()
    names = {0: "0–33.3 %", 1: "33.3–66.7 %", 2: "66.7–100 %"}
    groups: defaultdict[str, list[int]] = defaultdict(list)
    token = 0
    for length, label in zip(lengths, labels, strict=True):
        for position in range(length):
            place = {
                "layer": "all",
                "label": label,
                "phase": "decode" if decode[token] else "prefill",
                "position": names[position * 3 // length],
            }[by]
            if place is not None:
                groups[place].append(token)
            token += 1
    for router in routers:
        here = found[(found["layer"] == router.layer) & (found["block"] == router.block)]
        here = here[here["metric"] != "MaxVio of a batch"]
        assert by == "layer" or set(here[by]) == set(groups)
        for place, members in groups.items():
            part = here if by == "layer" else here[here[by] == place]
            count = Counter(int(expert) for member in members for expert in router.experts[member])
            expected = _measured_by_hand([count[expert] for expert in range(router.n_experts)], 0.5)
            for metric, value in expected.items():
                assert _of(part, metric) == pytest.approx(value, abs=1e-9)
            assert set(part["n"]) == {len(members)}


def test_chance_loads_have_the_exact_distribution_of_a_random_router() -> None:
    """Two tokens, each with one of the three pairs of three experts: nine equally likely outcomes."""
    pairs = list(itertools.combinations(range(3), 2))
    exact: Counter[tuple[int, ...]] = Counter()
    for one, two in itertools.product(pairs, pairs):
        exact[tuple((one + two).count(expert) for expert in range(3))] += 1 / 9
    loads = chance_loads(2, 3, 2, draws=40_000, seed=1)
    drawn = Counter(map(tuple, loads.tolist()))
    assert set(drawn) == set(exact)
    for outcome, probability in exact.items():
        assert drawn[outcome] / 40_000 == pytest.approx(probability, abs=0.012)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(50, 8, 2), (1000, 64, 8), (7, 4, 1), (30, 5, 5)])
def test_squared_cv_by_chance_has_its_closed_form(tokens: int, experts: int, top_k: int) -> None:
    loads = chance_loads(tokens, experts, top_k, draws=4000, seed=0)
    assert (loads.sum(1) == tokens * top_k).all()
    assert (loads <= tokens).all()
    squared = (load_measures(loads)["CV"] ** 2).mean()
    assert squared == pytest.approx((experts - top_k) / (top_k * tokens), rel=0.06)


def test_uniform_random_routing_lies_within_chance(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(5)
    routers = [
        planted.Router(np.argsort(generator.random((1200, 16)), axis=1)[:, :4], 16, layer=layer) for layer in range(8)
    ]
    result = analyze(plant(lengths=[100] * 12, routers=routers), "balance")
    frame = result.df()
    cv = frame[frame["metric"] == "CV"]
    inside = (cv["value"] >= cv["null_low"]) & (cv["value"] <= cv["null_high"])
    assert inside.sum() >= 6
    assert cv["null"].iloc[0] == pytest.approx(math.sqrt(12 / 4 / 1200), rel=0.05)


def test_planted_preference_is_found_and_named(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(5)
    even = np.argsort(generator.random((600, 16)), axis=1)[:, :2]
    skewed = even.copy()
    skewed[:, 0] = 3
    skewed[:, 1] = 4 + skewed[:, 1] % 8
    run = plant(lengths=[50] * 12, routers=[planted.Router(even, 16), planted.Router(skewed, 16, layer=7)])
    result = analyze(run, "balance")
    cv = result.df().query("metric == 'CV' and layer == 7").iloc[0]
    assert cv["value"] > cv["null_high"]
    assert cv["ci_low"] > cv["null_high"]
    assert "in L7" in result.title


@given(seed=st.integers(0, 50), tokens=st.integers(1, 30), batch=st.integers(1, 40))
def test_maxvio_of_batches_is_the_mean_over_whole_batches(
    seed: int, tokens: int, batch: int, plant: Plant, planted: ModuleType
) -> None:
    chosen = np.argsort(np.random.default_rng(seed).random((tokens, 5)), axis=1)[:, :2]
    frame = analyze(
        plant(lengths=[tokens], routers=[planted.Router(chosen, 5)]), "balance", batch=batch, null_draws=2
    ).df()
    size = min(batch, tokens)
    found = []
    for start in range(0, tokens - size + 1, size):
        count = Counter(int(e) for token in range(start, start + size) for e in chosen[token])
        found.append(max(count.values()) / (size * 2 / 5) - 1)
    assert _of(frame, "MaxVio of a batch") == pytest.approx(sum(found) / len(found), abs=1e-9)


def test_interval_shrinks_with_documents_and_is_missing_for_one(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(2)
    width = {}
    for documents in (5, 80):
        chosen = generator.choice(8, size=(documents * 20, 1), p=[0.3] + [0.1] * 7)
        run = plant(lengths=[20] * documents, routers=[planted.Router(chosen, 8)])
        row = analyze(run, "balance").df().query("metric == 'CV'").iloc[0]
        assert row["ci_low"] <= row["ci_high"]
        width[documents] = row["ci_high"] - row["ci_low"]
    assert width[80] < width[5]
    alone = plant(lengths=[20, 20], documents=[0, 0], routers=[planted.Router(generator.integers(8, size=(40, 1)), 8)])
    assert analyze(alone, "balance").df()[["ci_low", "ci_high"]].isna().all(axis=None)


def test_more_documents_than_bundles_still_give_intervals(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[1] * 1300, routers=[planted.Router(np.arange(1300)[:, None] % 4, 4)])
    result = analyze(run, "balance", draws=20)
    assert "bundles" in str(result.interval)
    assert result.df().query("metric == 'CV'")["ci_high"].notna().all()


def test_null_experts_count_as_experts(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[8], routers=[planted.Router(np.full((8, 1), 7), 4, n_null=4)])
    assert _of(analyze(run, "balance").df(), "MaxVio") == pytest.approx(7)


@pytest.mark.parametrize("by", ["label", "class", "phase", "position"])
def test_groups_are_drawn(plant: Plant, planted: ModuleType, by: str) -> None:
    routers = [planted.Router(np.arange(24)[:, None] % 4, 4, layer=layer) for layer in range(2)]
    run = plant(lengths=[6] * 4, labels=["<b>x</b>", "y"] * 2, classes=["word", "digit"] * 12, routers=routers)
    result = analyze(run, "balance", by=by)
    assert result.figure().data
    assert "<b>x" not in result.figure().to_json()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"starved": 2.0}, "starved"),
        ({"by": "label"}, "no labels"),
        ({"by": "nothing"}, "'layer' or 'label'"),
        ({"bins": 0}, "bins"),
    ],
)
def test_senseless_questions_are_refused(
    plant: Plant, planted: ModuleType, parameters: dict[str, Any], message: str
) -> None:
    run = plant(lengths=[4], routers=[planted.Router(np.zeros((4, 1), int), 4)])
    with pytest.raises(InputError, match=message):
        analyze(run, "balance", **parameters)


def test_chance_levels_bracket_their_mean() -> None:
    for mean, low, high in chance_levels(100, 8, 2, starved=0.1, draws=50, seed=0).values():
        assert low <= mean <= high


REAL = Path("/work/shared/data/deepseek_v2_lite_routing/law.parquet")


@pytest.mark.skipif(not REAL.exists(), reason="the trace is not here")
def test_real_trace_agrees_with_a_count_of_its_file(store: Any) -> None:
    run = store.import_trace(REAL, name="law", n_experts=64)
    frame = analyze(run, "balance", draws=20, null_draws=20).df()
    rows = pd.read_parquet(REAL)
    for layer in (1, 26):
        count = Counter(int(e) for experts in rows[rows["layer"] == layer]["experts"] for e in experts)
        expected = _measured_by_hand([count[expert] for expert in range(64)], 0.1)
        for metric, value in expected.items():
            assert _of(frame, metric, layer=layer) == pytest.approx(value)
