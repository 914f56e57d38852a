"""Sparse probes read from planted rows."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]


@pytest.fixture(scope="module")
def concepts(planted: ModuleType) -> Any:
    return planted.beside("planted_concepts")


@pytest.fixture(scope="module")
def probed(plant: Plant, concepts: Any) -> Run:
    run = plant(lengths=[36] * 8, labels=["a", "b"] * 4)
    concepts.plant_concepts(run)
    return run


def test_each_number_stands_beside_both_nulls_and_the_dense_probe(probed: Run) -> None:
    frame = analyze(probed, "sparse_probes", concept="a").df()
    row = frame[(frame["unit_kind"] == "expert") & (frame["k"] == 2) & (frame["metric"] == "F1")]
    assert row[["value", "null", "random", "dense"]].to_numpy().tolist() == [[0.6, 0.45, 0.4, 0.72]]
    assert (row["ci_low"].item(), row["ci_high"].item()) == pytest.approx((0.57, 0.62))
    assert set(frame["concept"]) == {"a"}


def test_means_are_over_the_concepts(plant: Plant, concepts: Any) -> None:
    run = plant(lengths=[4, 4], labels=["a", "b"])
    concepts.plant_probe(run, "expert", "hook_expert_indices", "a", f1={1: 0.6, 0: 0.8})
    concepts.plant_probe(run, "expert", "hook_expert_indices", "b", f1={1: 0.9, 0: 0.92})
    result = analyze(run, "sparse_probes")
    means = result.df()[lambda frame: frame["concept"] == "mean of the concepts"].set_index("k")["value"]
    assert means.to_dict() == pytest.approx({0: 0.86, 1: 0.75})
    assert result.title == "F1 mean over the concepts from 1 unit / all: experts 0.75 / 0.86; permuted labels 0.45"
    sparsity = result.df()[lambda frame: frame["metric"] == "sparsity"]
    assert sparsity[["concept", "value"]].to_numpy().tolist() == [["b", 1.0]]
    assert "1 of 2 concepts" in result.notes[0]


def test_means_of_several_units_are_over_the_concepts_they_share(plant: Plant, concepts: Any) -> None:
    run = plant(lengths=[4, 4], labels=["a", "b"])
    concepts.plant_probe(run, "expert", "hook_expert_indices", "a", f1={1: 0.6})
    concepts.plant_probe(run, "expert", "hook_expert_indices", "b", f1={1: 0.9})
    concepts.plant_probe(run, "neuron", "blocks.0.mlp.hook_post", "a", f1={1: 0.7})
    for name in ("sparse_probes", "concept_experts"):
        result = analyze(run, name)
        assert "experts 0.60" in result.title
        assert "neurons, blocks.0.mlp.hook_post 0.70" in result.title
        assert any("1 of 2 concepts" in note for note in result.notes)
        assert set(result.df()["concept"]) >= {"a", "b"}


def test_other_metrics_are_shown_when_asked_for(probed: Run) -> None:
    frame = analyze(probed, "sparse_probes", metric="MCC").df()
    assert set(frame["metric"]) == {"MCC", "sparsity"}
    assert np.allclose(frame.loc[frame["metric"] == "MCC", "value"], 0.6)


@pytest.mark.parametrize("name", ["concept", "ranking", "sae"])
def test_what_was_not_probed_is_refused_with_what_was(probed: Run, name: str) -> None:
    with pytest.raises(
        InputError, match=f"no probes of .*'nothing'.*Expected: .*{'mean_difference' if name == 'ranking' else ''}"
    ):
        analyze(probed, "sparse_probes", **{name: "nothing"})


def test_single_units_are_named_by_layer_and_expert(plant: Plant, planted: ModuleType, concepts: Any) -> None:
    fields = planted.everything(layers=3, n_experts=6, labels=["a", "b"] * 2)
    run = plant(**{name: fields[name] for name in ("lengths", "labels", "routers", "vectors")})
    rows = {
        "expert": ("hook_expert_indices", 13, "L2·E1"),
        "router_logit": ("blocks.1.mlp.hook_router_logits", 4, "L1·E4"),
        "neuron": ("blocks.2.mlp.experts.hook_post", 4 * 3 + 2, "L2·E3·n2"),  # four neurons an expert
    }
    for kind, (site, unit, _) in rows.items():
        concepts.plant_probe(run, kind, site, "a", f1={1: 0.7})
        run.store.connection.execute(
            "UPDATE sparse_probes SET units = [?], coefficients = [-1.0] WHERE run_id = ? AND unit_kind = ?",
            [unit, run.run_id, kind],
        )
    frame = analyze(run, "concept_experts").df().set_index("unit_kind")
    assert frame["name"].to_dict() == {kind: name for kind, (_, _, name) in rows.items()}
    assert set(frame["sign"]) == {"less"}
    assert frame.loc["expert", ["layer", "expert"]].tolist() == [2, 1]
    assert frame.loc["neuron", ["layer", "expert", "neuron"]].tolist() == [2, 3, 2]


def test_the_map_compares_kinds_of_units(probed: Run) -> None:
    result = analyze(probed, "concept_experts")
    frame = result.df()
    assert frame.groupby("unit_kind")["value"].first().to_dict() == pytest.approx(
        {"expert": 0.5, "neuron": 0.55, "latent": 0.6}
    )
    assert frame["concept"].unique().tolist() == ["a", "b"]
    names = {trace.name for trace in result.figure().data}
    assert "labels permuted" in names
    assert len(names) == 4


def test_run_without_single_units_is_refused(plant: Plant, concepts: Any) -> None:
    run = plant(lengths=[4], labels=["a"])
    concepts.plant_probe(run, "expert", "hook_expert_indices", "a", f1={2: 0.6})
    with pytest.raises(InputError, match="no probes of one unit"):
        analyze(run, "concept_experts")


def test_figure_draws_nulls_and_the_dense_probe(probed: Run) -> None:
    figure = analyze(probed, "sparse_probes").figure()
    names = [trace.name for trace in figure.data]
    assert "labels permuted" in names
    assert any("random units" in name for name in names)
    assert list(figure.data[0].x) == ["1", "2", "4", "all"]
