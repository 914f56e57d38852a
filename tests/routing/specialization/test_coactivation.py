"""Co-activation: pairs counted by hand, row sums, the real trace, the chance level by enumeration, the released variant."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.specialization.chance_pairs import chance_pairs
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]
REAL = Path("/work/shared/data/deepseek_v2_lite_routing/law.parquet")


def _keyed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_index(["layer", "block", "expert", "other"])


def _random(generator: np.random.Generator, tokens: int, size: int, k: int) -> np.ndarray:
    weight = generator.gamma(1.0, size=size) + 0.05
    return np.stack([generator.choice(size, size=k, replace=False, p=weight / weight.sum()) for _ in range(tokens)])


@given(data=st.data())
def test_values_equal_pairs_counted_by_hand(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    adjacent = data.draw(st.booleans())
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    shapes = data.draw(st.sampled_from([((4, 1),), ((5, 2), (7, 4)), ((3, 3),), ((6, 5), (2, 1))]))
    total = sum(lengths)
    routers = [
        planted.Router(_random(generator, total, e, k), e, layer=layer, block="attn" if layer else "mlp")
        for layer, (e, k) in enumerate(shapes)
    ]
    run = plant(lengths=lengths, routers=routers)
    frame = analyze(run, "coactivation", pairs="adjacent" if adjacent else "all", draws=10).df()
    assert len(frame) == sum(e * (e - 1) for e, _ in shapes)
    keyed = _keyed(frame)
    for router in routers:
        for i in range(router.n_experts):
            n_i = sum(i in row for row in router.experts.tolist())
            for j in range(router.n_experts):
                if i == j:
                    continue
                n_j = sum(j in row for row in router.experts.tolist())
                n_ij = 0
                for row in router.experts.tolist():
                    if i in row and j in row and (not adjacent or abs(row.index(i) - row.index(j)) == 1):
                        n_ij += 1
                found = keyed.loc[(router.layer, router.block, i, j)]
                assert (found["together"], found["n"]) == (n_ij, n_i)
                if n_i:
                    assert found["value"] == pytest.approx(n_ij / n_i)
                    assert len(lengths) == 1 or found["ci_low"] <= found["value"] + 1e-6
                else:
                    assert np.isnan(found["value"])
                if n_i and n_j:
                    assert found["lift"] == pytest.approx(n_ij * total / (n_i * n_j))


@pytest.mark.parametrize(("size", "k"), [(2, 1), (8, 2), (64, 6), (256, 8)])
def test_rows_of_all_pairs_sum_to_k_minus_1(plant: Plant, planted: ModuleType, size: int, k: int) -> None:
    experts = _random(np.random.default_rng(size), 120, size, k)
    run = plant(lengths=[40, 80], routers=[planted.Router(experts, size)])
    frame = analyze(run, "coactivation", draws=5, top=size * size).df()
    for metric in ("value", "null"):
        sums = frame[frame["n"] > 0].groupby("expert")[metric].sum()
        assert sums.to_numpy() == pytest.approx(np.full(len(sums), k - 1.0), abs=1e-5)


def test_adjacent_rows_sum_to_less_than_the_definition(plant: Plant, planted: ModuleType) -> None:
    experts = _random(np.random.default_rng(1), 300, 12, 6)
    run = plant(lengths=[300], routers=[planted.Router(experts, 12)])
    frame = analyze(run, "coactivation", pairs="adjacent").df()
    loads = frame.drop_duplicates("expert")["n"].sum()
    assert frame["together"].sum() / loads == pytest.approx(2 * 5 / 6)  # 1.67 instead of 5
    assert (frame["null"] * frame["n"]).sum() / loads == pytest.approx(2 * 5 / 6)


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> Run:
    if not REAL.exists():
        pytest.skip("the real trace is not here")
    store = Store(tmp_path_factory.mktemp("law") / "law.duckdb")
    return store.import_trace(REAL, name="law", n_experts=64)


def test_real_trace_has_row_sum_5(law: Run) -> None:
    result = analyze(law, "coactivation", layer=13)
    sums = result.df().groupby("expert")["value"].sum()
    assert sums.to_numpy() == pytest.approx(np.full(len(sums), 5.0))
    adjacent = analyze(law, "coactivation", layer=13, pairs="adjacent").df()
    loads = adjacent.drop_duplicates("expert")["n"].sum()
    assert round(adjacent["together"].sum() / loads, 2) == 1.67


def test_long_tables_keep_the_pairs_farthest_over_chance(law: Run) -> None:
    result = analyze(law, "coactivation", draws=5)
    frame = result.df()
    assert 90_000 < len(frame) <= 100_000
    assert any("of 104,832 pairs" in note for note in result.notes)
    whole = analyze(law, "coactivation", layer=5, draws=5).df()
    kept = frame[frame["layer"] == 5]
    common = whole[whole["together"] >= 30]
    dropped = common[~common.set_index(["expert", "other"]).index.isin(kept.set_index(["expert", "other"]).index)]
    assert dropped.empty or dropped["over_chance"].max() <= kept["over_chance"].max()
    top = analyze(law, "coactivation", layer=5, top=6, draws=5).df()
    assert len(top) == 6
    assert sorted(top["over_chance"].round(9)) == sorted(common["over_chance"].nlargest(6).round(9))
    pairs = set(zip(top["expert"], top["other"], strict=True))
    assert {(b, a) for a, b in pairs} == pairs


@given(weights=st.lists(st.floats(0.05, 4.0), min_size=2, max_size=7), data=st.data())
def test_chance_level_is_k_different_draws_with_these_loads(weights: list[float], data: st.DataObject) -> None:
    """Every subset of k has probability in proportion to the product of its weights; loads and pairs are summed."""
    k = data.draw(st.integers(1, len(weights)))
    subsets = list(combinations(range(len(weights)), k))
    mass = np.array([np.prod([weights[e] for e in subset]) for subset in subsets])
    mass /= mass.sum()
    load, pairs = np.zeros(len(weights)), np.zeros((len(weights), len(weights)))
    for subset, probability in zip(subsets, mass, strict=True):
        for i in subset:
            load[i] += probability
            for j in subset:
                pairs[i, j] += probability * (i != j)
    assert chance_pairs(load, k) == pytest.approx(pairs, abs=1e-6)


def test_chance_level_of_equal_loads_always_and_never_chosen() -> None:
    assert chance_pairs(np.full(64, 8 / 64), 8)[0, 1] == pytest.approx(8 * 7 / (64 * 63))
    found = chance_pairs(np.array([1.0, 0.5, 0.5, 0.0]), 2)
    expected = np.array([[0, 0.5, 0.5, 0], [0.5, 0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0]])
    assert found == pytest.approx(expected)


def test_unrelated_experts_lie_at_chance_though_their_lift_is_below_1(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(7)
    experts = np.stack([generator.permutation(8)[:2] for _ in range(4000)])
    run = plant(lengths=[100] * 40, routers=[planted.Router(experts, 8)])
    frame = analyze(run, "coactivation").df()
    assert frame["lift"].mean() == pytest.approx(4 / 7, abs=0.02)
    assert frame["over_chance"].mean() == pytest.approx(1.0, abs=0.02)
    inside = ((frame["ci_low"] <= frame["null"]) & (frame["null"] <= frame["ci_high"])).mean()
    assert inside > 0.8


def test_planted_pair_is_found(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(8)
    experts = np.stack([generator.permutation(12)[:2] for _ in range(3000)])
    experts[::10] = [2, 5]
    run = plant(lengths=[150] * 20, routers=[planted.Router(experts, 12, layer=3)])
    result = analyze(run, "coactivation")
    best = result.df().sort_values("over_chance", ascending=False).iloc[0]
    assert {best["expert"], best["other"]} == {2, 5}
    assert best["ci_low"] > best["null"]
    assert result.title.startswith(("L3·E2 brings E5", "L3·E5 brings E2"))


def test_routers_of_one_expert_bring_nobody_along(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[3, 1], routers=[planted.Router(np.array([[0], [1], [0], [1]]), 2)])
    result = analyze(run, "coactivation")
    assert "none are chosen together" in result.title
    assert result.df()["value"].tolist() == [0.0, 0.0]
    assert result.df()["null"].tolist() == [0.0, 0.0]


def test_more_documents_than_groups_are_dealt_and_said(plant: Plant, planted: ModuleType) -> None:
    experts = _random(np.random.default_rng(2), 500, 4, 2)
    result = analyze(plant(lengths=[1] * 500, routers=[planted.Router(experts, 4)]), "coactivation")
    assert result.interval is not None
    assert "dealt into 400 groups" in result.interval
    frame = result.df()
    assert ((frame["ci_low"] < frame["value"]) & (frame["value"] < frame["ci_high"])).all()


def test_missing_layer_is_refused_with_those_there_are(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[2], routers=[planted.Router(np.array([[0, 1], [1, 2]]), 3, layer=4)])
    for name in ("coactivation", "expert_communities"):
        with pytest.raises(InputError, match=r"no router in layer 0.*a layer of 4"):
            analyze(run, name, layer=0)
