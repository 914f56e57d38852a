"""Descriptions and their scores read from planted rows."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]


@pytest.fixture(scope="module")
def concepts(planted: ModuleType) -> Any:
    return planted.beside("planted_concepts")


@pytest.fixture(scope="module")
def described(plant: Plant, planted: ModuleType, concepts: Any) -> Run:
    run = plant(lengths=[36] * 6, labels=[planted.HOSTILE[0], "b"] * 3)
    concepts.plant_concepts(run)
    return run


def test_scores_stand_beside_chance_and_another_description(described: Run) -> None:
    frame = analyze(described, "descriptions", unit_kind="expert").df().set_index(["unit", "metric"])
    assert frame.loc[(1, "detection"), ["value", "null", "control"]].tolist() == [0.9, 0.5, 0.5]
    assert frame.loc[(1, "fuzzing"), ["value", "null", "control"]].tolist() == [0.8, 0.5, 0.6]
    assert frame.loc[(1, "causal"), ["value", "control"]].tolist() == [0.02, 0.001]
    assert frame.loc[(0, "not scored"), "description"] == "never scored"
    assert frame.loc[(1, "causal"), "name"] == "L0·E1"


def test_title_tells_means_and_controls(plant: Plant, concepts: Any) -> None:
    run = plant(lengths=[4])
    concepts.plant_description(run, "expert", 0, "x", {"detection": (0.9, 0.5)})
    concepts.plant_description(run, "expert", 1, "y", {"detection": (0.7, 0.6)})
    result = analyze(run, "descriptions")
    assert result.title == "2 descriptions of experts, mean detection 0.80 (another unit's description 0.55)"
    assert result.n == 2


def test_unread_answers_are_no_score(plant: Plant, concepts: Any) -> None:
    run = plant(lengths=[4])
    of = concepts.plant_description(run, "expert", 0, "x", {"detection": (0.9, 0.5)})
    run.store.connection.execute(
        "INSERT INTO description_scores BY NAME SELECT ?::UUID AS description_id, 'detection_unread' AS metric, 3 AS value",
        [of],
    )
    assert set(analyze(run, "descriptions").df()["metric"]) == {"detection"}


def test_of_several_autoencoders_the_newest_is_shown(plant: Plant, concepts: Any) -> None:
    run = plant(lengths=[4])
    saes = [concepts.plant_sae(run, name) for name in ("old", "new")]
    for year, sae in zip((2024, 2025), saes, strict=True):
        run.store.connection.execute(
            "UPDATE saes SET created_at = make_timestamp(?, 1, 1, 0, 0, 0) WHERE sae_id = ?", [year, sae]
        )
        concepts.plant_description(run, "latent", 5, f"written in {year}", {}, sae=sae)
    assert analyze(run, "descriptions").df()["description"].tolist() == ["written in 2025"]
    assert analyze(run, "descriptions", sae=saes[0]).df()["description"].tolist() == ["written in 2024"]


def test_nothing_of_the_kind_is_refused_with_what_there_is(described: Run) -> None:
    with pytest.raises(InputError, match=r"Found: .*experts by planted"):
        analyze(described, "descriptions", unit_kind="head")


def test_figure_shows_controls_and_escapes_text(described: Run) -> None:
    figure = analyze(described, "descriptions").figure()
    names = {trace.name for trace in figure.data}
    assert "detection, another unit's description" in names
    assert any("&lt;script&gt;" in label for trace in figure.data for label in trace.y)
    assert not any("<" in label for trace in figure.data for label in trace.y)


def test_causal_scores_alone_are_drawn_against_zero(plant: Plant, concepts: Any) -> None:
    run = plant(lengths=[4])
    concepts.plant_description(run, "expert", 0, "x", {"causal": (0.3, 0.01)})
    figure = analyze(run, "descriptions").figure()
    assert "nats" in figure.layout.xaxis.title.text
    assert figure.layout.shapes[0].x0 == 0
