"""Capacity and stragglers: closed forms, and batches replayed decision by decision."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]


def _sets(generator: np.random.Generator, tokens: int, n_experts: int, top_k: int) -> np.ndarray:
    return np.array([generator.permutation(n_experts)[:top_k] for _ in range(tokens)])


def _whole(frame: Any, metric: str, column: str = "value") -> float:
    part = frame[(frame["metric"] == metric) & frame["layer"].isna()]
    return float(part[column].iloc[0])


def test_round_robin_drops_nothing_at_the_fair_share(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[32] * 3, routers=[planted.Router((np.arange(96) % 8)[:, None], 8)])
    frame = analyze(run, "capacity", factor=1.0).df()
    assert (frame[frame["metric"] != "slots provided"]["value"] == 0).all()
    assert frame[frame["metric"] == "slots provided"]["value"].tolist() == [1.0]
    assert _whole(frame, "dropped", "null") > 0.05


def test_constant_routing_keeps_the_capacity_and_drops_the_end(plant: Plant, planted: ModuleType) -> None:
    """40 tokens, all on 2 of 8 experts: C = 1.5 · 40 · 2 / 8 = 15 of 40 stay, the first ones."""
    run = plant(lengths=[40, 40], routers=[planted.Router(np.tile([1, 6], (80, 1)), 8)])
    frame = analyze(run, "capacity", factor=1.5).df()
    assert _whole(frame, "dropped") == pytest.approx(25 / 40)
    assert _whole(frame, "tokens that lose every expert") == pytest.approx(25 / 40)
    tenths = frame[frame["metric"] == "dropped in a tenth of the batch"]
    assert tenths["tenth"].tolist() == list(range(1, 11))
    assert tenths["value"].tolist() == [0, 0, 0, 0.25, 1, 1, 1, 1, 1, 1]
    assert _whole(frame, "dropped", "ci_low") == _whole(frame, "dropped", "ci_high") == pytest.approx(25 / 40)


def test_small_batches_keep_the_minimum(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[6], routers=[planted.Router(np.zeros((6, 1), int), 64)])
    assert _whole(analyze(run, "capacity", factor=1.0).df(), "dropped") == pytest.approx(2 / 6)  # C = 4
    assert _whole(analyze(run, "capacity", factor=1.0, minimum=1).df(), "dropped") == pytest.approx(5 / 6)


def test_capacity_of_a_whole_product_is_not_rounded_up(plant: Plant, planted: ModuleType) -> None:
    """1.1 · 10 is 11.000000000000002 in floating point; C is 11."""
    run = plant(lengths=[20], routers=[planted.Router(np.zeros((20, 1), int), 2)])
    assert _whole(analyze(run, "capacity", factor=1.1, minimum=0).df(), "dropped") == pytest.approx(9 / 20)


def _replayed(
    experts: list[list[int]], weights: list[list[float]], batches: list[range], factor: float, real: int, priority: str,
    minimum: int, ranked: list[list[int]],
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:  # fmt: skip
    """(token, slot) dropped, and of these the ones that find no room at any next choice either."""
    dropped, lost = set(), set()
    k = len(experts[0])
    for batch in batches:
        room = Counter({e: max(minimum, math.ceil(round(factor * len(batch) * k / real, 9))) for e in range(real)})
        order = [(token, slot) for token in batch for slot in range(k)]
        if priority == "slot":
            order.sort(key=lambda d: d[1])
        if priority == "weight":
            order.sort(key=lambda d: -weights[d[0]][d[1]])
        homeless = []
        for token, slot in order:
            expert = experts[token][slot]
            if expert >= real:
                continue
            if room[expert] > 0:
                room[expert] -= 1
            else:
                homeless.append((token, slot))
        taken: dict[int, set[int]] = {token: set(experts[token]) for token in batch}
        for token, slot in homeless:
            dropped.add((token, slot))
            for expert in ranked[token]:
                if expert < real and expert not in taken[token] and room[expert] > 0:
                    room[expert] -= 1
                    taken[token].add(expert)
                    break
            else:
                lost.add((token, slot))
    return dropped, lost


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    shape=st.sampled_from([(1, 1, 0), (4, 1, 0), (4, 2, 0), (6, 3, 2), (256, 2, 0)]),
    batch=st.sampled_from([None, 1, 5, 1000]),
    priority=st.sampled_from(["slot", "token", "weight"]),
    factor=st.sampled_from([0.5, 1.0, 1.25]),
    minimum=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_drops_are_what_replaying_every_decision_gives(
    plant: Plant, planted: ModuleType, lengths: list[int], shape: tuple[int, int, int], batch: int | None, priority: str,
    factor: float, minimum: int, seed: int,
) -> None:  # fmt: skip
    generator = np.random.default_rng(seed)
    real, k, null = shape
    tokens = sum(lengths)
    logits = generator.integers(5, size=(tokens, real + null)).astype(float)  # with ties
    ranked = np.argsort(-logits, axis=1, kind="stable")
    experts = ranked[:, :k]
    weights = generator.integers(1, 4, size=(tokens, k)) / 4
    router = planted.Router(experts, real, n_null=null, weights=weights, logits=logits)
    run = plant(lengths=lengths, routers=[router])
    result = analyze(
        run,
        "capacity",
        factor=factor,
        batch=batch,
        priority=priority,
        minimum=minimum,
        reroute=True,
        draws=2,
        samples=1,
    )
    if batch is None:
        edges = [0, *np.cumsum(lengths).tolist()]
        batches = [range(a, b) for a, b in itertools.pairwise(edges)]
    elif batch > tokens:
        batches = [range(tokens)]
    else:
        batches = [range(a, a + batch) for a in range(0, tokens - batch + 1, batch)]
    dropped, lost = _replayed(
        experts.tolist(), weights.tolist(), batches, factor, real, priority, minimum, ranked.tolist()
    )
    frame = result.df()
    covered = sum(map(len, batches))
    assert result.n == covered * k
    assert _whole(frame, "dropped") == pytest.approx(len(dropped) / (covered * k))
    after = frame[frame["metric"] == "dropped after reroute"]
    assert after["value"].tolist() == pytest.approx([len(lost) / (covered * k)])
    bare = sum(all((token, slot) in dropped for slot in range(k)) for run_ in batches for token in run_)
    assert _whole(frame, "tokens that lose every expert") == pytest.approx(bare / covered)
    tenths: Counter[int] = Counter()
    for part in batches:
        for token, _ in dropped:
            if token in part:
                tenths[(token - part.start) * 10 // len(part) + 1] += 1
    by_tenth = frame[frame["metric"] == "dropped in a tenth of the batch"]
    for row in by_tenth.itertuples():
        assert row.value * row.n == pytest.approx(tenths[int(row.tenth)])


def test_balanced_router_is_at_its_null(plant: Plant, planted: ModuleType) -> None:
    experts = _sets(np.random.default_rng(3), 2048, 16, 2)
    frame = analyze(plant(lengths=[64] * 32, routers=[planted.Router(experts, 16)]), "capacity", factor=1.0).df()
    assert _whole(frame, "dropped") == pytest.approx(_whole(frame, "dropped", "null"), rel=0.06)
    assert _whole(frame, "dropped", "ci_low") < _whole(frame, "dropped", "null") < _whole(frame, "dropped", "ci_high")


def test_slots_first_spares_first_choices(plant: Plant, planted: ModuleType) -> None:
    """First choices of all tokens are placed before any second: with everyone choosing (0, 1) or (1, 0) alike none is lost."""
    experts = np.array([[0, 1], [1, 0]] * 10)
    run = plant(lengths=[20], routers=[planted.Router(experts, 4)])
    slot = analyze(run, "capacity", factor=1.0, priority="slot").df()
    token = analyze(run, "capacity", factor=1.0, priority="token").df()
    assert _whole(slot, "dropped") == _whole(token, "dropped") == 0.5
    assert _whole(slot, "tokens that lose every expert") == 0.0
    assert _whole(token, "tokens that lose every expert") == 0.5


def test_capacity_says_what_it_needs(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[8], routers=[planted.Router(np.zeros((8, 1), int), 2)])
    with pytest.raises(InputError, match=r"--probe router_logits"):
        analyze(run, "capacity", reroute=True)
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="factor"):
            analyze(run, "capacity", factor=factor)
    weightless = plant(lengths=[8], routers=[planted.Router(np.zeros((8, 1), int), 2)])
    weightless.store.connection.execute("UPDATE routing SET weights = NULL WHERE run_id = ?", [weightless.run_id])
    with pytest.raises(InputError, match="no routing weights"):
        analyze(weightless, "capacity", priority="weight")
    assert analyze(weightless, "capacity").n == 8


def _factor(frame: Any, scope: str, metric: str = "straggler factor", column: str = "value") -> float:
    return float(frame[(frame["scope"] == scope) & (frame["metric"] == metric)][column].iloc[0])


def test_stragglers_of_round_robin_and_of_constant_routing(plant: Plant, planted: ModuleType) -> None:
    even = plant(lengths=[32] * 4, routers=[planted.Router((np.arange(128) % 8)[:, None], 8)])
    frame = analyze(even, "stragglers", batch=16, devices=4).df()
    assert (frame["value"] == 1).all()
    assert _factor(frame, "expert", column="null") > 1.5
    constant = plant(lengths=[32] * 4, routers=[planted.Router(np.tile([0, 1], (128, 1)), 8)])
    frame = analyze(constant, "stragglers", batch=16, devices=4).df()
    assert _factor(frame, "expert") == pytest.approx(8 / 2)
    assert _factor(frame, "device") == pytest.approx(4)  # both on the first of four devices
    assert _factor(frame, "expert", column="ci_low") == pytest.approx(4)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    shape=st.sampled_from([(1, 1, 0), (5, 2, 0), (4, 3, 2), (256, 1, 0)]),
    batch=st.integers(1, 20),
    devices=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_stragglers_are_what_counting_gives(
    plant: Plant, planted: ModuleType, lengths: list[int], shape: tuple[int, int, int], batch: int, devices: int,
    seed: int,
) -> None:  # fmt: skip
    real, k, null = shape
    tokens = sum(lengths)
    experts = _sets(np.random.default_rng(seed), tokens, real + null, k)
    run = plant(lengths=lengths, routers=[planted.Router(experts, real, n_null=null)])
    if (experts >= real).all():
        with pytest.raises(InputError, match="expert that computes"):
            analyze(run, "stragglers", batch=batch, devices=devices)
        return
    frame = analyze(run, "stragglers", batch=batch, devices=devices, samples=1, draws=2).df()
    starts = range(0, tokens - batch + 1, batch) if batch <= tokens else [0]
    used = min(devices, real)
    sizes = [real // used + (device < real % used) for device in range(used)]
    home = [device for device, size in enumerate(sizes) for _ in range(size)]
    ratios: dict[str, list[float]] = {"expert": [], "device": []}
    for start in starts:
        load, held = Counter[int](), Counter[int]()
        for row in experts[start : start + batch].tolist():
            for expert in row:
                if expert < real:
                    load[expert] += 1
                    held[home[expert]] += 1
        if load:
            ratios["expert"].append(max(load.values()) * real / load.total())
            ratios["device"].append(max(held.values()) * used / load.total())
    for scope, values in ratios.items():
        assert _factor(frame, scope) == pytest.approx(np.mean(values))
        tail = _factor(frame, scope, "straggler factor, 99th percentile")
        assert tail == pytest.approx(np.quantile(values, 0.99))


def test_random_sets_are_distinct_and_even() -> None:
    from moescope.routing.serving.batch_kernels import random_sets

    drawn = random_sets(20_000, 3, 6, 1)
    assert all(len(set(row)) == 3 for row in drawn[:500].tolist())
    counts = Counter(tuple(sorted(row)) for row in drawn.tolist())
    assert len(counts) == 20
    assert max(counts.values()) < 1.2 * 1000
    assert min(counts.values()) > 0.8 * 1000


@pytest.mark.parametrize("name", ["stragglers", "placement", "replication"])
def test_null_experts_alone_give_devices_nothing_to_do(plant: Plant, planted: ModuleType, name: str) -> None:
    run = plant(lengths=[4, 4], routers=[planted.Router(np.full((8, 1), 2), 2, n_null=1)])
    with pytest.raises(InputError, match="expert that computes"):
        analyze(run, name)
    assert _whole(analyze(run, "capacity").df(), "dropped") == 0.0
