"""Dose-response of steering, read from planted effects: what is told is what was planted, controls beside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moescope.core.errors import InputError
from moescope.routing.effects.dose_response import dose_response
from moescope.routing.features.steering_dose import steering_dose


@pytest.fixture(scope="module")
def steering() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planted_steering", Path(__file__).parents[1] / "planted_steering.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(plant: Callable[..., Any], steering: ModuleType) -> Any:
    made = plant(lengths=[30, 20, 25, 1, 40], labels=["en", "en", "de", "de", "fr"])
    steering.plant_steering(made.store, made)
    return made


def test_what_was_planted_is_told(run: Any, steering: ModuleType) -> None:
    found = steering_dose(run, draws=200)
    frame = found.df().set_index(["metric", "strength"])
    for strength in steering.STRENGTHS:
        effect = frame.loc["target effect", strength]
        assert effect["value"] == pytest.approx(steering.REACHED * strength, abs=0.02)
        assert effect["ci_low"] <= effect["value"] <= effect["ci_high"]
        assert effect["null"] == pytest.approx(steering.CONTROL * strength, abs=0.02)
        assert effect["control_low"] <= effect["null"] <= effect["control_high"]
        assert effect["n"] == 29 + 19 + 24 + 39
        beyond = frame.loc["target effect beyond controls", strength]
        assert beyond["value"] == pytest.approx((steering.REACHED - steering.CONTROL) * strength, abs=0.03)
        assert beyond["ci_low"] > 0
        assert beyond["rank_p"] == pytest.approx(1 / 4)
        assert frame.loc["KL", strength]["value"] == pytest.approx(steering.COST * strength)
    assert "log p of ' Python'" in found.title
    assert "KL of 0.2 nats" in found.title


def test_a_label_keeps_the_target_s_own_texts_apart(run: Any) -> None:
    frame = steering_dose(run, on="en", draws=50).df()
    assert set(frame.loc[frame["metric"] == "target effect", "n"]) == {29 + 19}
    assert set(frame.loc[frame["metric"] == "KL", "n"]) == {24 + 39}
    with pytest.raises(InputError, match="no text of label 'it'"):
        steering_dose(run, on="it")


def test_without_controls_it_is_said(plant: Callable[..., Any], steering: ModuleType) -> None:
    other = plant(lengths=[30, 20])
    steering.plant_steering(other.store, other, controls=0, sweep=0x57EF)
    found = steering_dose(other, draws=20)
    assert "no controls" in " ".join(found.notes)
    assert "target effect beyond controls" not in set(found.df()["metric"])
    assert found.figure().data


def test_the_newest_or_the_named_one_is_told_and_none_is_refused(run: Any, plant: Callable[..., Any]) -> None:
    assert "57ee" in " ".join(steering_dose(run, sweep="00000000-0000-0000-0000-0000000057ee", draws=10).notes)
    with pytest.raises(InputError, match="no dose-response of steering"):
        steering_dose(run, sweep="abc")
    with pytest.raises(InputError, match="moescope sae steer"):
        steering_dose(plant(lengths=[5, 5]))


def test_the_figure_shows_controls_and_zero(run: Any) -> None:
    figure = steering_dose(run, draws=20).figure()
    names = {trace.name for trace in figure.data}
    assert {"steered", "mean of controls", "controls, smallest to largest"} <= names
    assert "nats" in figure.layout.yaxis.title.text


def test_the_dose_response_of_effects_reads_it_too_without_the_controls(run: Any, steering: ModuleType) -> None:
    frame = dose_response(run, draws=20).df()
    assert sorted(set(frame["strength"])) == list(steering.STRENGTHS)
    kl = frame[frame["metric"] == "KL"]
    assert len(kl) == len(steering.STRENGTHS)
