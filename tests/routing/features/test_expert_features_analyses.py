"""Latents × experts, one card, routing by sparsity, and neurons beside latents: from planted rows."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.features.feature_tables import chosen_sae
from moescope.store.run import Run

Plant = Callable[..., Run]


@pytest.fixture(scope="module")
def run(plant: Plant, planted: ModuleType) -> Run:
    made = plant(**planted.everything(layers=3, n_experts=6, labels=["a", "b"] * 3) | {"features": False})
    planted.beside("planted_feature_experts").plant_feature_experts(made)
    return made


SAE = "planted writers"


def of(result: Any, metric: str) -> Any:
    frame = result.df()
    return frame[frame["metric"] == metric]


def test_map_shows_every_latent_with_its_writer(run: Run) -> None:
    result = analyze(run, "expert_features", sae=SAE)
    held = of(result, "writes in excess").pivot(index="feature", columns="expert", values="value")
    assert held.idxmax(axis=1).to_dict() == {f: f % 6 for f in range(6)}
    assert held.shape == (6, 6)
    assert "E5 of layer 1 writes latent 5 most: 6 [5.9, 6.1]" in result.title
    assert "6 of 6 latents shown" in result.title
    heat = result.figure().data[0]
    assert np.asarray(heat.z).shape == (6, 6)
    assert list(heat.x) == [f"E{e}" for e in range(6)]


def test_fewest_latents_shown_are_the_strongest(run: Run) -> None:
    result = analyze(run, "expert_features", sae=SAE, features=2)
    assert set(result.df()["feature"]) == {4, 5}


def test_gates_are_of_the_layer_behind_with_what_weights_tell(run: Run) -> None:
    result = analyze(run, "expert_features", sae=SAE, side="gates")
    moved = of(result, "moves the logit")
    assert set(moved["layer"]) == {2}
    best = moved.loc[moved.groupby("feature")["value"].idxmax()].set_index("feature")["expert"]
    assert best.to_dict() == {f: (f + 1) % 6 for f in range(6)}
    assert any("Spearman correlation of 0.6 [0.55, 0.65]" in note for note in result.notes)
    assert result.figure().data


def test_card_of_a_latent_tells_its_writers_and_what_their_absence_leaves(run: Run) -> None:
    result = analyze(run, "feature_writers", sae=SAE)
    assert "Latent 2 is written most by E2 of layer 1: 3 [2.9, 3.1] in excess (null 0.2)" in result.title
    assert (
        "without its writers it loses 90 [80, 100] % of its activation, without matched experts 5.0 %" in result.title
    )
    first = of(result, "writes in excess").sort_values("rank").iloc[0]
    assert (first["expert"], first["rank"]) == (2, 1)
    assert of(result, "moves the logit").sort_values("rank").iloc[0]["expert"] == 3
    assert result.figure().data


def test_card_of_an_expert_tells_its_latents(run: Run) -> None:
    result = analyze(run, "feature_writers", sae=SAE, expert=4, layer=1)
    assert "E4 of layer 1 writes most latent 4: 5" in result.title
    assert next(iter(of(result, "writes in excess").sort_values("rank")["feature"])) == 4
    assert result.figure().data


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("expert_features", {"sae": "nobody"}, "nobody"),
        ("expert_features", {"sae": SAE, "layer": 7}, "in layer 7"),
        ("feature_writers", {"sae": SAE, "feature": 999}, "latent 999"),
        ("feature_writers", {"sae": SAE, "expert": 77}, "expert 77"),
        ("feature_writers", {"sae": SAE, "expert": 1, "feature": 1}, "not both"),
        ("expert_sparsity_routing", {"layer": 9}, "of layer 9"),
        ("neurons_against_sae", {"sae": "neurons of layer 1"}, "are a layer's neurons"),
    ],
)
def test_what_is_not_there_is_refused_with_what_to_do(
    name: str, options: dict[str, Any], message: str, run: Run
) -> None:
    with pytest.raises(InputError, match=message):
        analyze(run, name, **options)


def test_routing_by_sparsity_stands_beside_chance(run: Run) -> None:
    result = analyze(run, "expert_sparsity_routing")
    recall = of(result, "recall of the router's choice").iloc[0]
    assert (recall["layer"], recall["value"]) == (1, 0.5)
    assert recall["null"] == pytest.approx(2 / 6)
    swap = of(result, "ΔNLL with the router swapped").iloc[0]
    assert (swap["value"], swap["null"]) == (0.7, 1.5)
    assert list(of(result, "neurons on, by expert")["expert"]) == list(range(6))
    assert (
        "rank correlation of 0.3 [0.25, 0.35] in layer 1; it finds 50 % of the chosen experts, chance 33 %"
        in result.title
    )
    assert len(result.figure().data) >= 6


def test_neurons_stand_beside_latents_and_rotated_neurons(run: Run) -> None:
    result = analyze(run, "neurons_against_sae", sae=SAE)
    lift = of(result, "largest lift of a label").set_index("units")["value"]
    assert lift.to_dict() == {"latents": 3.0, "neurons": 2.0, "rotated neurons": 1.0}
    goes = of(result, "goes with a label").set_index("units")["value"]
    assert goes.to_dict() == pytest.approx({"latents": 3 / 6, "neurons": 2 / 6, "rotated neurons": 1 / 6})
    token = of(result, "predicted by the token").set_index("units")
    assert token.loc["neurons", "value"] == pytest.approx(np.mean([0.4 + 0.01 * f for f in range(6)]))
    assert token.loc["neurons", "null"] == pytest.approx(0.01)
    assert of(result, "active on a token").set_index("units")["value"]["latents"] == pytest.approx(6 * 25 / 216)
    assert result.figure().data


def test_neurons_that_were_not_read_are_asked_for(plant: Plant, planted: ModuleType) -> None:
    made = plant(**planted.everything(layers=3, n_experts=6, labels=["a"] * 4) | {"features": False})
    beside = planted.beside("planted_feature_experts")
    beside.plant_feature_experts(made)
    made.store.connection.execute("DELETE FROM features WHERE run_id = ? AND sae_id <> ?", [made.run_id, beside.SAE_ID])
    with pytest.raises(InputError, match="no layer's neurons were read"):
        analyze(made, "neurons_against_sae", sae=SAE)


def test_latents_that_were_not_joined_to_experts_lead_to_the_command_that_joins_them(run: Run) -> None:
    with pytest.raises(InputError, match=r"moescope sae experts, or ms\.sae\.feature_experts"):
        chosen_sae(run, "nobody", table="feature_experts")
    with pytest.raises(InputError, match=r"moescope sae read, or ms\.sae\.read\b"):
        chosen_sae(run, "nobody")
