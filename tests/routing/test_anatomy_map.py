"""The anatomy map: every number against a reading of the tables or a closed form."""

from __future__ import annotations

import math
import uuid
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


def test_each_site_shows_its_newest_autoencoder_of_all_experts(plant: Plant, planted: ModuleType) -> None:
    run = plant(**planted.everything(layers=2, n_experts=4, labels=["a"] * 2))
    rows = [
        ("mlp, old", "blocks.1.hook_mlp_out", None, 1, 0.5),
        ("mlp, new", "blocks.1.hook_mlp_out", None, 3, 0.2),
        ("mlp, one expert", "blocks.1.hook_mlp_out", 2, 4, 0.9),
        ("stream", "blocks.1.hook_resid_post", None, 2, 0.3),
    ]
    for name, site, expert, day, fvu in rows:
        sae = str(uuid.uuid5(uuid.UUID(run.run_id), name))
        run.store.connection.execute(
            "INSERT INTO saes BY NAME SELECT ?::UUID AS sae_id, ? AS name, ? AS site, ? AS expert, make_timestamp(2026, 1, ?, 0, 0, 0) "
            "AS created_at",
            [sae, name, site, expert, day],
        )
        run.store.connection.execute(
            "INSERT INTO sae_measures BY NAME SELECT ?::UUID AS sae_id, ?::UUID AS run_id, 'fvu' AS metric, 'sae' AS condition, 'all' AS "
            "group_kind, ? AS value, 100 AS n",
            [sae, run.run_id, fvu],
        )
    result = analyze(run, "anatomy_map", measure="sae_fvu")
    told = result.df().set_index("block")["value"].to_dict()
    assert told == pytest.approx({"autoencoder hook_mlp_out": 0.2, "autoencoder hook_resid_post": 0.3})
    assert {"autoencoder hook_mlp_out", "autoencoder hook_resid_post"} <= set(result.figure().data[0].y)
    whole_map = analyze(run, "anatomy_map").figure().data[0].y
    assert sum("leaves hook_" in row for row in whole_map) == 2, "a row each"


def test_heads_with_a_sink_are_those_of_the_first_64_tokens(plant: Plant, planted: ModuleType) -> None:
    """Over a whole long text a head attends to its first token otherwise than over its first 64 tokens."""
    run = plant(lengths=[64])
    planted.insert(
        run,
        "heads",
        [
            {"layer": 0, "head": head, "metric": metric, "condition": "base", "value": value, "n": 1, "block": "attn"}
            for head in range(4)
            for metric, value in (("sink_alpha_0", 0.15 + 0.1 * head), ("alpha_0", 0.1))
        ],
    )
    result = analyze(run, "anatomy_map", measure="sink_heads")
    assert result.df()["value"].tolist() == [0.5]
    assert result.df()["metric"].tolist() == ["heads with a sink (α₀ > 0.3, first 64 tokens)"]
