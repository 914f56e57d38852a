"""Flips against margin: planted dependence, none, and the area under the curve counted pair by pair."""

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


def _runs(plant: Plant, planted: ModuleType, margin: np.ndarray, flips: np.ndarray, lengths: list[int]) -> list[Run]:
    first = planted.Router(np.zeros((len(margin), 1), int), 3, margin=margin)
    second = planted.Router(flips.astype(int)[:, None], 3, margin=margin)
    return [plant(lengths=lengths, routers=[router]) for router in (first, second)]


@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    kinds=st.integers(1, 6),
    bins=st.sampled_from([1, 3, 10]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=15)
def test_rates_and_area_agree_with_counting(
    plant: Plant, planted: ModuleType, lengths: list[int], kinds: int, bins: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    tokens = sum(lengths)
    margin = generator.integers(0, kinds, tokens) / 4
    flips = generator.random(tokens) < 0.4
    frame = analyze(_runs(plant, planted, margin, flips, lengths), "routing_flips", bins=bins, draws=3).df()
    rates = frame[frame["metric"] == "flip rate"]
    assert rates["n"].sum() == tokens
    assert np.average(rates["value"], weights=rates["n"]) == pytest.approx(flips.mean())
    for number, row in enumerate(rates.itertuples()):
        last = number == len(rates) - 1
        inside = (margin >= row.margin_low) & ((margin <= row.margin_high) if last else (margin < row.margin_high))
        assert row.n == inside.sum()
        assert row.value == pytest.approx(flips[inside].mean())
        assert row.null == pytest.approx(flips.mean())
    wins = [
        1.0 if margin[i] < margin[j] else 0.5 if margin[i] == margin[j] else 0.0
        for i in range(tokens)
        for j in range(tokens)
        if flips[i] and not flips[j]
    ]
    area = frame.loc[frame["metric"] == "area under the curve", "value"].item()
    assert area == pytest.approx(np.mean(wins)) if wins else np.isnan(area)


def test_flips_at_small_margins_are_told_apart(plant: Plant, planted: ModuleType) -> None:
    margin = np.tile(np.arange(20.0), 10)
    frame = analyze(_runs(plant, planted, margin, margin < 4, [20] * 10), "routing_flips").df()
    rates = frame[frame["metric"] == "flip rate"]
    assert rates["value"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    area = frame[frame["metric"] == "area under the curve"].iloc[0]
    assert area["value"] == area["ci_low"] == area["ci_high"] == 1


def test_flips_by_chance_stay_at_one_half(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(2)
    margin, flips = generator.random(2000), generator.random(2000) < 0.3
    area = analyze(_runs(plant, planted, margin, flips, [100] * 20), "routing_flips").df().iloc[-1]
    assert area["ci_low"] < 0.5 < area["ci_high"]
    assert area["ci_high"] - area["ci_low"] < 0.2


def test_a_larger_choice_that_keeps_all_is_no_flip(plant: Plant, planted: ModuleType) -> None:
    first = planted.Router(np.array([[0], [1]]), 4)
    second = planted.Router(np.array([[2, 0], [2, 3]]), 4)
    frame = analyze([plant(lengths=[2], routers=[r]) for r in (first, second)], "routing_flips").df()
    assert frame[frame["metric"] == "flip rate"]["value"].tolist() == [0.5]


def test_nothing_flips_between_equal_runs(plant: Plant, planted: ModuleType) -> None:
    result = analyze(_runs(plant, planted, np.arange(6.0), np.zeros(6), [3, 3]), "routing_flips")
    assert "0.0% of decisions flip" in result.title
    assert result.figure().data


def test_runs_without_margins_are_refused(plant: Plant, planted: ModuleType) -> None:
    runs = _runs(plant, planted, np.arange(4.0), np.zeros(4), [4])
    runs[0].store.connection.execute("UPDATE routing SET margin = NULL WHERE run_id = ?", [runs[0].run_id])
    with pytest.raises(InputError, match="no margins"):
        analyze(runs, "routing_flips")
