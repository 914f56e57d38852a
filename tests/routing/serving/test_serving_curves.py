"""Whole curves in one answer: every point is what asking for it alone gives."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]


@pytest.fixture(scope="module")
def uneven(plant: Plant, planted: ModuleType) -> Run:
    """Two layers that prefer some experts, with logits; the second has a null expert."""
    generator = np.random.default_rng(3)
    routers = []
    for layer, null in ((0, 0), (1, 1)):
        logits = generator.normal(size=(150, 6 + null)) + np.linspace(0, 2, 6 + null)
        experts = np.argsort(-logits, axis=1, kind="stable")[:, :2]
        routers.append(planted.Router(experts, 6, n_null=null, logits=logits, layer=layer))
    return plant(lengths=[30] * 5, routers=routers)


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one.reset_index(drop=True), other.reset_index(drop=True), check_dtype=False)


@pytest.mark.parametrize("priority", ["slot", "token"])
@pytest.mark.parametrize("batch", [None, 64])
def test_each_of_many_capacities_is_what_it_is_alone(uneven: Run, priority: str, batch: int | None) -> None:
    asked: dict[str, Any] = {"priority": priority, "batch": batch, "minimum": 1, "reroute": True, "draws": 20}
    every = analyze(uneven, "capacity", factors="1.5,0.5,1,3", **asked).df()
    assert every["factor"].unique().tolist() == [0.5, 1.0, 1.5, 3.0]
    for factor, part in every.groupby("factor"):
        same(part, analyze(uneven, "capacity", factor=float(str(factor)), **asked).df())


def test_more_capacity_never_drops_more(uneven: Run) -> None:
    factors = ",".join(str(factor / 10) for factor in range(3, 41))
    result = analyze(uneven, "capacity", factors=factors, minimum=0)
    frame = result.df()
    for _, part in frame[frame["metric"] == "dropped"].groupby(["layer", "block"], dropna=False):
        assert (np.diff(part.sort_values("factor")["value"]) <= 0).all()
    assert {type(trace).__name__ for trace in result.figure().data} == {"Scatter", "Heatmap"}


@pytest.mark.parametrize("factors", ["", "1,x", "0", "nan", "1,-2"])
def test_capacities_that_are_none_are_refused(uneven: Run, factors: str) -> None:
    with pytest.raises(InputError, match="factors"):
        analyze(uneven, "capacity", factors=factors)


def test_one_capacity_and_several_are_not_asked_for_at_once(uneven: Run) -> None:
    with pytest.raises(InputError, match="cannot both be given"):
        analyze(uneven, "capacity", factor=1, factors="1,2")


@pytest.mark.parametrize("pairs", ["first", "all"])
def test_each_number_of_devices_is_what_it_is_alone(uneven: Run, pairs: str) -> None:
    every = analyze(uneven, "placement", sweep="2,6,3", batch=16, pairs=pairs, draws=20).df()
    assert every["devices"].unique().tolist() == [2, 3, 6]
    for devices, part in every.groupby("devices"):
        alone = analyze(uneven, "placement", devices=int(str(devices)), batch=16, pairs=pairs, draws=20).df()
        same(part.drop(columns="devices"), alone)


def test_devices_beyond_the_experts_are_tried_once(uneven: Run) -> None:
    result = analyze(uneven, "placement", sweep="4,8,16", batch=16)
    assert result.df()["devices"].unique().tolist() == [4, 6]
    assert any("6 devices are used" in note for note in result.notes)
    assert len(result.figure().data) == 10, "five lines in each of two panels"


@pytest.mark.parametrize("sweep", ["a", "0,2", "-1"])
def test_numbers_of_devices_that_are_none_are_refused(uneven: Run, sweep: str) -> None:
    with pytest.raises(InputError, match="sweep"):
        analyze(uneven, "placement", sweep=sweep)
