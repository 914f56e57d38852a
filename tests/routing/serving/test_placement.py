"""Placement and replication: aligned layers, planted partners, exhaustive search."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.pathways.held_out import halve
from moescope.routing.serving.devices import at_random, contiguous, slots
from moescope.routing.serving.integer_program import solve
from moescope.routing.serving.replicas import copies_of_hottest, copies_of_random, spread
from moescope.routing.serving.solvers import aligned, apart, by_load, stays
from moescope.routing.trace import read_trace
from moescope.store.run import Run

Plant = Callable[..., Run]
LATER = 1e12


def _sets(generator: np.random.Generator, tokens: int, n_experts: int, top_k: int) -> np.ndarray:
    return np.array([generator.permutation(n_experts)[:top_k] for _ in range(tokens)])


def _cell(frame: Any, placement: str, metric: str, column: str = "value") -> float:
    return float(frame[(frame["placement"] == placement) & (frame["metric"] == metric)][column].iloc[0])


def _devices(frame: Any, placement: str, layer: int) -> list[int]:
    part = frame[(frame["placement"] == placement) & (frame["metric"] == "device") & (frame["layer"] == layer)]
    return [int(device) for device in part.sort_values("expert")["value"]]


@pytest.mark.parametrize("solver", ["local", "milp"])
def test_permutation_routing_crosses_nowhere_when_aligned(plant: Plant, planted: ModuleType, solver: str) -> None:
    generator = np.random.default_rng(1)
    chosen = generator.integers(8, size=400)
    routers = []
    for layer in range(4):
        routers.append(planted.Router(chosen[:, None], 8, layer=layer))
        chosen = generator.permutation(8)[chosen]
    run = plant(lengths=[20] * 20, routers=routers)
    frame = analyze(run, "placement", devices=4, solver=solver, seconds=20.0).df()
    assert _cell(frame, "affinity", "crossings a token") == 0
    assert _cell(frame, "contiguous", "crossings a token") > 1
    assert _cell(frame, "contiguous", "crossings a token", "null") == pytest.approx(3 * (1 - 1 / 4), abs=0.1)


def test_experts_loaded_together_are_placed_apart(plant: Plant, planted: ModuleType) -> None:
    """Each document keeps to one pair of neighbours; loads are all equal, so only the pairing can tell."""
    pair = np.repeat(np.arange(16) % 4, 32)
    experts = np.stack([2 * pair, 2 * pair + 1], 1)
    run = plant(lengths=[32] * 16, routers=[planted.Router(experts, 8)])
    frame = analyze(run, "placement", devices=2, batch=32).df()
    assert _cell(frame, "contiguous", "busiest ÷ mean device") == 2.0
    assert _cell(frame, "anti-correlation", "busiest ÷ mean device") == 1.0
    assert _cell(frame, "anti-correlation", "busiest ÷ mean device, 99th percentile") == 1.0
    home = _devices(frame, "anti-correlation", 0)
    assert all(home[2 * i] != home[2 * i + 1] for i in range(4))
    assert 1.0 < _cell(frame, "contiguous", "busiest ÷ mean device", "null") < 2.0


def test_unequal_loads_are_evened_out(plant: Plant, planted: ModuleType) -> None:
    """Loads 4, 3, 2, 1: 4 + 1 against 3 + 2."""
    experts = np.tile([0, 0, 0, 0, 1, 1, 1, 2, 2, 3], 40)[:, None]
    run = plant(lengths=[20] * 20, routers=[planted.Router(experts, 4)])
    frame = analyze(run, "placement", devices=2, batch=20).df()
    assert _cell(frame, "load", "busiest ÷ mean device") == 1.0
    assert _cell(frame, "contiguous", "busiest ÷ mean device") == pytest.approx(1.4)
    home = _devices(frame, "load", 0)
    assert home[0] == home[3] != home[1] == home[2]


@given(
    seed=st.integers(0, 99), devices=st.integers(1, 3), pairs=st.sampled_from(["first", "all"]), batch=st.integers(1, 9)
)
def test_measures_are_what_walking_the_held_out_half_gives(
    plant: Plant, planted: ModuleType, seed: int, devices: int, pairs: str, batch: int
) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 9, size=5).tolist()
    shapes = [(4, 2, 0), (3, 1, 0), (6, 3, 0)]
    routers = [
        planted.Router(_sets(generator, sum(lengths), e, k), e - n, n_null=n, layer=i)
        for i, (e, k, n) in enumerate(shapes)
    ]
    run = plant(lengths=lengths, routers=routers)
    frame = analyze(run, "placement", devices=devices, pairs=pairs, batch=batch, seed=seed, draws=2, randoms=2).df()
    judged = halve(read_trace(run), seed).judged.tolist()
    batches = [judged[at : at + batch] for at in range(0, len(judged) - batch + 1, batch)] or [judged]
    for name in ("contiguous", "load", "anti-correlation", "affinity"):
        home = [_devices(frame, name, layer) for layer in range(3)]
        for layer, (experts, _, _) in enumerate(shapes):
            counts = [home[layer].count(device) for device in range(devices)]
            assert sum(counts) == experts
            assert max(counts) - min(counts) <= 1
        crossings = 0.0
        for token in judged:
            for layer in (0, 1):
                here, there = (routers[layer + side].experts[token].tolist() for side in (0, 1))
                if pairs == "first":
                    here, there = here[:1], there[:1]
                apart_ = [home[layer][i] != home[layer + 1][j] for i in here for j in there]
                crossings += sum(apart_) / len(apart_)
        assert _cell(frame, name, "crossings a token") == pytest.approx(crossings / len(judged))
        slow = []
        for part in batches:
            busiest = mean = 0.0
            for layer, router in enumerate(routers):
                held = [0] * devices
                for token in part:
                    for expert in router.experts[token].tolist():
                        held[home[layer][expert]] += 1
                busiest += max(held)
                mean += sum(held) / devices
            slow.append(busiest / mean)
        assert _cell(frame, name, "busiest ÷ mean device") == pytest.approx(np.mean(slow))
        assert _cell(frame, name, "busiest ÷ mean device, 99th percentile") == pytest.approx(np.quantile(slow, 0.99))


def _every_placement(experts: int, devices: int) -> list[tuple[int, ...]]:
    return sorted(set(itertools.permutations(slots(experts, devices).tolist())))


@given(seed=st.integers(0, 999), shape=st.sampled_from([(4, 4), (3, 4), (4, 4, 3), (2, 4, 2)]))
def test_integer_program_finds_the_best_of_all_placements(seed: int, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(seed)
    joints = [generator.integers(6, size=pair).astype(float) for pair in itertools.pairwise(shape)]
    answer = solve(joints, shape, 2, seconds=30.0)
    assert answer is not None
    placements, proved = answer
    assert proved
    best = max(
        stays(joints, [np.array(p) for p in choice])
        for choice in itertools.product(*(_every_placement(size, 2) for size in shape))
    )
    assert stays(joints, placements) == pytest.approx(best)
    local, settled = aligned(joints, shape, 2, starts=4, until=LATER, seed=seed)
    assert settled
    assert stays(joints, local) <= best + 1e-9
    assert stays(joints, local) >= stays(joints, [contiguous(size, 2) for size in shape])


@given(seed=st.integers(0, 999))
def test_local_search_cannot_be_improved_by_a_swap(seed: int) -> None:
    generator = np.random.default_rng(seed)
    joints = [generator.integers(9, size=(6, 6)).astype(float) for _ in range(2)]
    placements, _ = aligned(joints, (6, 6, 6), 3, starts=2, until=LATER, seed=seed)
    value = stays(joints, placements)
    for layer, i, j in itertools.product(range(3), range(6), range(6)):
        swapped = [placement.copy() for placement in placements]
        swapped[layer][[i, j]] = swapped[layer][[j, i]]
        assert stays(joints, swapped) <= value


@given(seed=st.integers(0, 999), experts=st.integers(1, 7), devices=st.integers(1, 3))
def test_swaps_end_where_no_swap_lowers_the_mean_square(seed: int, experts: int, devices: int) -> None:
    devices = min(devices, experts)
    generator = np.random.default_rng(seed)
    loads = generator.integers(9, size=(5, experts)).astype(float)

    def cost(placement: np.ndarray) -> float:
        return sum(sum(row[placement == device].sum() ** 2 for device in range(devices)) for row in loads)

    found = apart(loads, devices, until=LATER)
    assert sorted(found.tolist()) == slots(experts, devices).tolist()
    assert cost(found) <= cost(by_load(loads.mean(0), devices)) + 1e-9
    for i, j in itertools.combinations(range(experts), 2):
        swapped = found.copy()
        swapped[[i, j]] = swapped[[j, i]]
        assert cost(swapped) >= cost(found) - 1e-6


def test_solvers_stop_when_their_time_is_up() -> None:
    generator = np.random.default_rng(0)
    joints = [generator.random((32, 32)) for _ in range(5)]
    placements, settled = aligned(joints, [32] * 6, 4, starts=4, until=time.monotonic() - 1, seed=0)
    assert not settled
    assert [sorted(p.tolist()) for p in placements] == [slots(32, 4).tolist()] * 6
    assert len(apart(generator.random((4, 32)), 4, until=time.monotonic() - 1)) == 32


def test_independent_layers_gain_nothing_from_affinity(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(2)
    routers = [planted.Router(generator.integers(8, size=(1000, 1)), 8, layer=layer) for layer in range(3)]
    frame = analyze(plant(lengths=[25] * 40, routers=routers), "placement", devices=2).df()
    found, null = (_cell(frame, "affinity", "crossings a token", column) for column in ("value", "null"))
    assert found == pytest.approx(null, abs=0.08)
    assert null == pytest.approx(2 * 0.5, abs=0.05)


def test_placement_of_few_experts_one_router_and_one_document(plant: Plant, planted: ModuleType) -> None:
    small = plant(lengths=[4, 4], routers=[planted.Router(np.zeros((8, 1), int), 1)])
    result = analyze(small, "placement")
    assert any("1 experts" in note for note in result.notes)
    assert "crossings a token" not in set(result.df()["metric"])
    assert _cell(result.df(), "load", "busiest ÷ mean device") == 1.0
    for name in ("placement", "replication"):
        with pytest.raises(InputError, match="one document"):
            analyze(plant(lengths=[8], routers=[planted.Router(np.zeros((8, 1), int), 4)]), name)
    with pytest.raises(InputError, match="seconds"):
        analyze(small, "placement", seconds=0.0)


def test_placements_at_random_hold_equally_many() -> None:
    generator = np.random.default_rng(0)
    assert sorted(at_random(10, 4, generator).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert len({tuple(at_random(6, 3, generator).tolist()) for _ in range(50)}) > 20


@given(loads=st.lists(st.integers(0, 50), min_size=1, max_size=6), extra=st.integers(0, 5), devices=st.integers(1, 3))
def test_copies_take_equal_shares_and_go_to_the_hottest(loads: list[int], extra: int, devices: int) -> None:
    copies = copies_of_hottest(np.array(loads, float), extra)
    plain = [1] * len(loads)
    for _ in range(extra):
        per_copy = [load / number for load, number in zip(loads, plain, strict=True)]
        plain[per_copy.index(max(per_copy))] += 1
    assert copies.tolist() == plain
    share = spread(np.array(loads, float), copies, devices)
    assert share.sum(1) == pytest.approx(1)
    assert (np.rint(share * copies[:, None]).sum(0) <= -(-copies.sum() // devices)).all()
    assert share * copies[:, None] == pytest.approx(np.rint(share * copies[:, None]))
    assert copies_of_random(len(loads), extra, np.random.default_rng(0)).sum() == len(loads) + extra


def test_copies_of_one_hot_expert_even_the_devices_out(plant: Plant, planted: ModuleType) -> None:
    """Expert 0 takes half of all tokens, three others a sixth each; four devices, one expert on each.

    Without copies the busiest works 2× the mean. With two extra copies the hot one's load is a sixth too: the six copies lie
    2, 2, 1, 1, so the busiest takes a third of the tokens: 4/3.
    """
    experts = np.tile([0, 1, 0, 2, 0, 3], 40)[:, None]
    run = plant(lengths=[12] * 20, routers=[planted.Router(experts, 4)])
    frame = analyze(run, "replication", devices=4, batch=12, most=2).df()
    mean = frame[frame["metric"] == "busiest ÷ mean device"].set_index("copies")
    assert mean.loc[0, "value"] == mean.loc[0, "null"] == pytest.approx(2.0)
    assert mean.loc[2, "value"] == pytest.approx(4 / 3)
    assert mean.loc[2, "null"] > 4 / 3
    assert frame["copies"].unique().tolist() == [0, 1, 2]


def test_enough_copies_of_a_constant_router_share_it_out(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[16] * 8, routers=[planted.Router(np.zeros((128, 1), int), 2)])
    frame = analyze(run, "replication", devices=2, batch=16, most=6).df()
    mean = frame[frame["metric"] == "busiest ÷ mean device"].set_index("copies")
    assert mean.loc[0, "value"] == 2.0
    assert mean.loc[6, "value"] == pytest.approx(8 / 7)  # seven copies on two devices, four and three


def test_worse_answer_of_the_integer_program_gives_way_to_the_local_search(
    plant: Plant, planted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = np.arange(200) % 4
    routers = [planted.Router(((chosen * 3 + layer) % 4)[:, None], 4, layer=layer) for layer in range(3)]
    run = plant(lengths=[20] * 10, routers=routers)
    crossed = [np.array(home) for home in ([0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1])]
    for answer, words in (((crossed, False), "nothing better"), (None, "found none")):
        monkeypatch.setattr("moescope.routing.serving.integer_program.solve", lambda *_, a=answer, **__: a)
        result = analyze(run, "placement", devices=2, solver="milp")
        assert _cell(result.df(), "affinity", "crossings a token") == 0
        assert any(words in note for note in result.notes)
