"""The analysis of students, on rows planted with known answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import moescope as ms
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]


@pytest.fixture(scope="module")
def students() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "moescope_planted_students", Path(__file__).parents[1] / "planted_students.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(plant: Plant, students: ModuleType) -> Run:
    made = plant(lengths=[8] * 4)
    students.plant_students(made, layer=3)
    students.plant_students(made, layer=5, active=(8,))
    return made


def test_gains_stand_beside_those_on_gaussian_inputs(run: Run) -> None:
    frame = ms.analyze(run, "mlp_students").df()
    assert set(frame["layer"]) == {3}
    real = frame[(frame["inputs"] == "real") & (frame["metric"] == "gain") & frame["router_rank"].isna()]
    assert real["value"].tolist() == [0.2, 0.2]
    assert real["null"].tolist() == [0.0, 0.0]
    low = frame[(frame["inputs"] == "real") & (frame["metric"] == "gain") & (frame["router_rank"] == 8)]
    assert low["value"].tolist() == [0.1, 0.1]
    fvu = frame[(frame["metric"] == "fvu") & frame["inputs"].isin(["real", "gaussian"])]
    assert (fvu["null"] == 1).all()
    nmi = frame[frame["metric"] == "nmi"]
    assert nmi["null"].tolist() == [0.1, 0.1]
    assert frame.loc[frame["inputs"] == "gaussian − real", "null"].iloc[0] == 0


def test_title_tells_the_finding_and_its_control(run: Run) -> None:
    result = ms.analyze(run, "mlp_students", layer=3)
    assert "MLP of L3" in result.title
    assert "0.400 of the variance" in result.title
    assert "dense student 0.600" in result.title
    assert "+0.200 [+0.150, +0.250]" in result.title
    assert "on Gaussian inputs the gain is +0.000" in result.title
    assert result.n == 1000
    assert any("L5" in note for note in result.notes)


def test_figure_has_a_panel_for_each_kind_of_inputs_and_the_controls(run: Run) -> None:
    figure = ms.analyze(run, "mlp_students", layer=3).figure()
    names = [trace.name for trace in figure.data]
    assert names.count("mixture") == names.count("dense") == names.count("mean (control)") == 2
    mixture = next(trace for trace in figure.data if trace.name == "mixture")
    assert list(mixture.y) == pytest.approx([0.4, 0.3])
    assert list(mixture.x) == pytest.approx([21.6, 26.4])


def test_other_layers_are_found_and_missing_ones_refused(run: Run, plant: Plant) -> None:
    assert "8 active neurons" in ms.analyze(run, "mlp_students", layer=5).title
    with pytest.raises(InputError, match="no students of 'mlp' in layer 4"):
        ms.analyze(run, "mlp_students", layer=4)
    with pytest.raises(InputError, match=r"no students of block 'mlp\.1'"):
        ms.analyze(run, "mlp_students", block="mlp.1")
    with pytest.raises(InputError):
        ms.analyze(plant(lengths=[4]), "mlp_students")


def test_a_run_with_controls_alone_is_told_too(plant: Plant, students: ModuleType) -> None:
    made = plant(lengths=[8])
    students.plant_students(made, active=())
    result = ms.analyze(made, "mlp_students")
    assert "the linear map leaves least: FVU 0.700" in result.title
    assert result.figure().data
