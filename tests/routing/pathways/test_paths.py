"""Paths, their power law, and combinations: counted by hand and against closed forms."""

from __future__ import annotations

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
from moescope.routing.pathways.path_codes import path_codes
from moescope.routing.pathways.power_law import fit_power_law
from moescope.store.run import Run

Plant = Callable[..., Run]


def _scalar(frame: Any, metric: str, column: str = "value") -> float:
    return float(frame[frame["metric"] == metric][column].iloc[0])


def _sets(generator: np.random.Generator, tokens: int, n_experts: int, top_k: int) -> np.ndarray:
    return np.array([generator.permutation(n_experts)[:top_k] for _ in range(tokens)])


@given(
    layers=st.lists(st.integers(1, 300), min_size=1, max_size=20), tokens=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_codes_are_equal_exactly_where_paths_are(layers: list[int], tokens: int, seed: int) -> None:
    """Also where the product of sizes is far beyond 64 bits."""
    generator = np.random.default_rng(seed)
    kinds = generator.integers(3, size=tokens)
    columns = [generator.integers(size, size=3)[kinds].astype(np.uint16) for size in layers]
    codes = path_codes(columns, layers)
    tuples = list(zip(*(column.tolist() for column in columns), strict=True))
    for a in range(tokens):
        for b in range(tokens):
            assert (codes[a] == codes[b]) == (tuples[a] == tuples[b])


@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=40).filter(lambda c: len(set(c)) > 1),
    x_min=st.integers(1, 3),
)
def test_exponent_and_distance_are_what_their_formulas_give(counts: list[int], x_min: int) -> None:
    fit = fit_power_law(np.array(counts), x_min)
    kept = [x for x in counts if x >= x_min]
    if len(set(kept)) < 2:
        assert fit is None
        return
    assert fit is not None
    exponent = 1 + len(kept) / sum(math.log(x / (x_min - 0.5)) for x in kept)
    assert fit.exponent == pytest.approx(exponent)
    assert (fit.n, fit.x_min) == (len(kept), x_min)

    # Σ over a long stretch, and the integral beyond it
    def tail(start: int) -> float:
        stop = start + 20_000
        return sum(x**-exponent for x in range(start, stop)) + (stop - 0.5) ** (1 - exponent) / (exponent - 1)

    scale = tail(x_min)
    widest = 0.0
    for x in range(x_min, max(kept) + 1):
        model = 1 - tail(x + 1) / scale
        widest = max(widest, abs(sum(k <= x for k in kept) / len(kept) - model))
    assert fit.distance == pytest.approx(widest, abs=1e-6)


def test_zeta_counts_give_back_their_exponent() -> None:
    counts = np.random.default_rng(1).zipf(2.5, size=40_000)
    fit = fit_power_law(counts)
    assert fit is not None
    assert fit.exponent == pytest.approx(2.5, abs=0.1)
    assert fit.distance < 0.02
    even = fit_power_law(np.random.default_rng(1).poisson(50, size=4000), 20)
    assert even is not None
    assert even.distance > 0.3


def test_equal_counts_have_no_exponent() -> None:
    assert fit_power_law(np.ones(50, np.int64)) is None
    assert fit_power_law(np.array([7])) is None


@given(seed=st.integers(0, 99), tokens=st.integers(1, 40), length=st.sampled_from([None, 1, 2, 5]))
def test_ranks_are_what_counting_gives(
    plant: Plant, planted: ModuleType, seed: int, tokens: int, length: int | None
) -> None:
    generator = np.random.default_rng(seed)
    shapes = [(3, 2), (2, 1), (4, 3)]
    routers = [planted.Router(_sets(generator, tokens, e, k), e, layer=i + 2) for i, (e, k) in enumerate(shapes)]
    frame = analyze(plant(lengths=[1] * tokens, routers=routers), "paths", length=length, top=1000, samples=1).df()
    width = min(length or 3, 3)
    counts: Counter[tuple[int, str]] = Counter()
    for start in range(3 - width + 1):
        for token in range(tokens):
            ids = [f"E{router.experts[token, 0]}" for router in routers[start : start + width]]
            counts[start + 2, " → ".join(ids)] += 1
    total = counts.total()
    ranked = frame[frame["metric"] == "share of paths taken"]
    assert ranked["n"].tolist() == sorted(counts.values(), reverse=True)
    assert ranked["rank"].tolist() == list(range(1, len(counts) + 1))
    for row in ranked.itertuples():
        assert counts[int(row.layer), row.path] == row.n
        assert row.value == pytest.approx(row.n / total)
    assert _scalar(frame, "distinct paths") == len(counts)
    assert _scalar(frame, "paths taken once") == pytest.approx(sum(n == 1 for n in counts.values()) / len(counts))
    entropy = -sum(n / total * math.log2(n / total) for n in counts.values())
    assert _scalar(frame, "path entropy") == pytest.approx(entropy, abs=1e-9)


def test_permutations_between_layers_leave_one_path_for_each_expert(plant: Plant, planted: ModuleType) -> None:
    first = np.tile(np.arange(8), 16)
    routers = [planted.Router(((first + 3 * layer) % 8)[:, None], 8, layer=layer) for layer in range(5)]
    frame = analyze(plant(lengths=[32] * 4, routers=routers), "paths", length=None).df()
    assert _scalar(frame, "distinct paths") == 8
    assert _scalar(frame, "path entropy") == pytest.approx(3)
    assert _scalar(frame, "distinct paths", "null") > 100  # 128 tokens on 32,768 independent paths
    top = frame[frame["rank"] == 1].iloc[0]
    assert top["value"] == top["ci_low"] == top["ci_high"] == 1 / 8


def test_independent_layers_are_at_their_null(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(3)
    routers = [planted.Router(generator.integers(6, size=(600, 1)), 6, layer=layer) for layer in range(3)]
    frame = analyze(plant(lengths=[60] * 10, routers=routers), "paths", length=None, samples=10).df()
    for metric in ("distinct paths", "path entropy"):
        assert _scalar(frame, metric) == pytest.approx(_scalar(frame, metric, "null"), rel=0.03)


@pytest.mark.parametrize("name", ["paths", "combinations"])
def test_one_router_one_expert_is_one_path(plant: Plant, planted: ModuleType, name: str) -> None:
    run = plant(lengths=[1, 1], routers=[planted.Router(np.zeros((2, 1), int), 1)])
    frame = analyze(run, name).df()
    assert _scalar(frame, "distinct paths" if name == "paths" else "distinct sets") == 1
    with pytest.raises(InputError, match="block"):
        analyze(run, name, block="attn")


@given(
    seed=st.integers(0, 99),
    tokens=st.integers(1, 40),
    shape=st.sampled_from([(1, 1), (4, 1), (4, 2), (5, 5), (256, 3)]),
)
def test_combinations_are_what_counting_gives(
    plant: Plant, planted: ModuleType, seed: int, tokens: int, shape: tuple[int, int]
) -> None:
    experts = _sets(np.random.default_rng(seed), tokens, *shape)
    frame = analyze(plant(lengths=[1] * tokens, routers=[planted.Router(experts, shape[0])]), "combinations").df()
    counts = Counter(frozenset(row) for row in experts.tolist())
    possible = math.comb(*shape)
    assert _scalar(frame, "distinct sets") == len(counts)
    entropy = -sum(n / tokens * math.log2(n / tokens) for n in counts.values())
    assert _scalar(frame, "entropy of sets") == pytest.approx(entropy, abs=1e-9)
    if possible > 1:
        share = math.log(len(counts)) / math.log(possible)
        assert _scalar(frame, "share of possible sets, logarithms") == pytest.approx(share)
    uniform = possible * (1 - (1 - 1 / possible) ** tokens)
    assert _scalar(frame, "distinct sets", "uniform") == pytest.approx(uniform, rel=1e-6)


@given(seed=st.integers(0, 99), tokens=st.integers(1, 60), shape=st.sampled_from([(3, 2), (8, 4), (6, 6), (64, 8)]))
def test_dealing_keeps_loads_and_leaves_no_repeats(seed: int, tokens: int, shape: tuple[int, int]) -> None:
    from moescope.routing.pathways.dealing_kernel import part_repeats

    generator = np.random.default_rng(seed)
    experts = _sets(generator, tokens, *shape)
    dealt = generator.permutation(experts.ravel()).reshape(experts.shape)
    part_repeats(dealt, seed)
    assert Counter(dealt.ravel().tolist()) == Counter(experts.ravel().tolist())
    if shape == (64, 8):  # where a swap exists: a token can be stuck where nearly all experts are chosen by all
        assert all(len(set(row)) == len(row) for row in dealt.tolist())


def test_two_exclusive_sets_are_far_below_independence(plant: Plant, planted: ModuleType) -> None:
    experts = np.tile([[0, 1, 2], [3, 4, 5]], (100, 1))
    frame = analyze(plant(lengths=[200], routers=[planted.Router(experts, 8)]), "combinations", samples=3).df()
    assert _scalar(frame, "distinct sets") == 2
    assert _scalar(frame, "entropy of sets") == pytest.approx(1)
    assert 15 <= _scalar(frame, "distinct sets", "null") <= 20  # C(6, 3) = 20 sets of the six experts in use
