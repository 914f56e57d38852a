"""The anatomy map: every number against a reading of the tables or a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.anatomy_map import MEASURES
from moescope.store.run import Run

Plant = Callable[..., Run]


@pytest.fixture(scope="module")
def whole(plant: Plant, planted: ModuleType) -> Run:
    return plant(**planted.everything(layers=3, n_experts=6, labels=["a", "b"] * 3))


def test_loads_and_entropies_are_closed_forms(plant: Plant, planted: ModuleType) -> None:
    """Layer 0 gives every expert as much; layer 1 all to one of four."""
    even = planted.Router(np.arange(8)[:, None] % 4, 4, layer=0, entropy=np.full(8, math.log(4)))
    one = planted.Router(np.zeros((8, 1), int), 4, layer=1, entropy=np.zeros(8), margin=np.full(8, 0.25))
    frame = analyze(plant(lengths=[8], routers=[even, one]), "anatomy_map").df()
    told = frame.pivot_table(index="measure", columns="layer", values="value")
    assert told.loc["router_entropy"].tolist() == pytest.approx([1.0, 0.0])
    assert told.loc["load_cv"].tolist() == pytest.approx([0.0, math.sqrt(3)])
    assert told.loc["busiest"].tolist() == pytest.approx([1.0, 4.0])
    assert told.loc["unused"].tolist() == pytest.approx([0.0, 0.75])
    assert told.loc["router_margin"].tolist() == pytest.approx([0.5, 0.25])


def test_every_measure_asked_alone_gives_its_rows_of_the_whole_map(whole: Run) -> None:
    every = analyze(whole, "anatomy_map").df()
    assert {"router_entropy", "load_cv", "residual_norm", "massive_ratio", "output_norm"} <= set(every["measure"])
    for name in every["measure"].unique():
        alone = analyze(whole, "anatomy_map", measure=name)
        assert alone.df()["value"].tolist() == every[every["measure"] == name]["value"].tolist()
        assert set(alone.df()["kind"]) == {MEASURES[name].kind}
        assert alone.figure().data


def test_residual_measures_agree_with_the_table_and_with_their_own_analysis(whole: Run) -> None:
    norms = whole.sql("SELECT layer, norm FROM residual WHERE run_id = $run").df().groupby("layer")["norm"]
    norms = norms.apply(lambda norm: math.exp(np.log(norm.astype(float)).mean()))
    maxima = analyze(whole, "residual_maxima", top=100_000).df().groupby("layer")["ratio"].max()
    for measure, truth in (("residual_norm", norms), ("massive_ratio", maxima)):
        told = analyze(whole, "anatomy_map", measure=measure).df().set_index("layer")["value"]
        assert told.to_dict() == pytest.approx(truth.to_dict())


def test_the_largest_ratio_may_lie_in_a_sequence_of_small_activations(plant: Plant, planted: ModuleType) -> None:
    """Medians differ a hundredfold, so that the largest |x| has not the largest ratio."""
    values = np.zeros((4, 3))
    values[:, 0] = [100.0, 50.0, 10.0, -20.0]
    stream = planted.Stream(np.ones(4), values=values, channels=np.zeros((4, 3), int), median=np.array([1.0, 0.01]))
    told = analyze(plant(lengths=[2, 2], streams={0: stream}), "anatomy_map", measure="massive_ratio").df()
    assert told["value"].tolist() == pytest.approx([20.0 / 0.01], rel=1e-5)


def test_entropy_agrees_with_its_own_analysis(whole: Run) -> None:
    truth = analyze(whole, "router_entropy").df().set_index("layer")["value"] / math.log(6)
    told = analyze(whole, "anatomy_map", measure="router_entropy").df().set_index("layer")["value"]
    assert told.to_dict() == pytest.approx(truth.to_dict())


def test_a_measure_that_was_not_recorded_is_refused_with_those_that_were(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[4], streams={0: planted.Stream(np.ones(4), median=np.ones(1))})
    with pytest.raises(InputError, match=r"router entropy.*recorded: .*residual_norm"):
        analyze(run, "anatomy_map", measure="router_entropy")


def test_the_map_of_one_measure_marks_sublayers_without_it(whole: Run) -> None:
    grey, coloured = analyze(whole, "anatomy_map", measure="residual_norm").figure().data
    assert list(grey.y) == ["mlp", "residual"]
    assert np.isnan(np.asarray(grey.z, float)[1]).all()
    assert np.isfinite(np.asarray(coloured.z, float)[1]).all()
    assert np.isnan(np.asarray(coloured.z, float)[0]).all()
