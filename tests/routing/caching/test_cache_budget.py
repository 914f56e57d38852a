"""The analysis `cache_budget`: the dynamic programme against all splits, and what it gains on documents not seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.caching.cache_budget import equal_shares, shared_out
from moescope.store.run import Run

Plant = Callable[..., Run]


@given(data=st.data())
def test_no_split_of_the_budget_misses_less(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 4))
    curves = [
        np.array(data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=5)), dtype=float) for _ in range(layers)
    ]
    least = np.array([data.draw(st.integers(1, len(curve))) for curve in curves])
    budget = data.draw(st.integers(int(least.sum()), sum(map(len, curves))))
    found = shared_out(curves, least, budget)
    splits = [
        split
        for split in itertools.product(*[range(low, len(curve) + 1) for low, curve in zip(least, curves, strict=True)])
        if sum(split) <= budget
    ]
    cost = {split: sum(curve[size - 1] for curve, size in zip(curves, split, strict=True)) for split in splits}
    assert tuple(found.tolist()) in cost
    assert cost[tuple(found.tolist())] == min(cost.values())


def test_equal_shares_stay_within_what_each_layer_holds() -> None:
    assert equal_shares(np.array([8, 8, 8]), np.array([1, 1, 1]), 14).tolist() == [5, 5, 4]
    assert equal_shares(np.array([2, 8, 8]), np.array([1, 1, 1]), 14).tolist() == [2, 6, 6]
    assert equal_shares(np.array([8, 8]), np.array([5, 1]), 8).tolist() == [5, 3]


def _spread(planted: ModuleType, tokens: int) -> list[Any]:
    """Layer 0 stays with its two experts within a document; layer 1 wanders over all sixteen."""
    generator = np.random.default_rng(0)
    narrow = np.repeat(np.argsort(generator.random((tokens // 50, 16)), axis=1)[:, :2], 50, axis=0)
    wide = np.argsort(generator.random((tokens, 16)), axis=1)[:, :2]
    return [planted.Router(narrow, 16, layer=0), planted.Router(wide, 16, layer=1)]


def test_wandering_layer_gets_the_places_and_misses_fall(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[50] * 20, routers=_spread(planted, 1000))
    result = analyze(run, "cache_budget", budget=18, least=2)
    frame = result.df()
    places = frame[(frame["metric"] == "cached experts") & frame["layer"].notna()].set_index("layer")
    assert places["value"].tolist() == [2, 16]
    assert places["null"].tolist() == [9, 9]
    rates = frame[(frame["metric"] == "hit rate") & frame["layer"].notna()].set_index("layer")
    assert rates["value"][1] > rates["null"][1] + 0.2
    saved = frame[frame["metric"] == "misses avoided"].iloc[0]
    assert saved["ci_low"] > 0
    # Layer 0 misses 2 a document whatever its size; layer 1 its first 16 against those and 7 ÷ 16 of the others.
    assert saved["value"] == pytest.approx(1 - 18 / (2 + 16 + (100 - 16) * 7 / 16), abs=0.1)
    assert "less than equal shares" in result.title
    assert "L1 gets 16, L0 2" in result.title


def test_alike_layers_gain_nothing(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(1)
    routers = [planted.Router(np.argsort(generator.random((600, 8)), axis=1)[:, :2], 8, layer=i) for i in range(3)]
    frame = analyze(plant(lengths=[30] * 20, routers=routers), "cache_budget").df()
    saved = frame[frame["metric"] == "misses avoided"].iloc[0]
    assert abs(saved["value"]) < 0.03
    assert frame[frame["metric"] == "cached experts"]["value"].iloc[-1] == 18


def test_one_document_is_measured_on_itself_and_says_so(plant: Plant, planted: ModuleType) -> None:
    result = analyze(plant(lengths=[50], routers=_spread(planted, 50)), "cache_budget", policy="belady")
    assert any("one document" in note for note in result.notes)
    assert result.df()["ci_low"].isna().all()


@pytest.mark.parametrize("budget", [3, 33])
def test_budget_that_cannot_be_kept_is_refused(plant: Plant, planted: ModuleType, budget: int) -> None:
    run = plant(lengths=[50] * 2, routers=_spread(planted, 100))
    with pytest.raises(InputError, match=r"budget of .* does not fit.*from 8 .* to 32"):
        analyze(run, "cache_budget", budget=budget)
