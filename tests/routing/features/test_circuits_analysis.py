"""The analysis of head circuits, on rows planted with known answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import moescope as ms
from moescope.core.errors import InputError
from moescope.routing.features.circuits import _auc
from moescope.store.run import Run

Plant = Callable[..., Run]


@pytest.fixture(scope="module")
def circuits() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "moescope_planted_circuit", Path(__file__).parents[1] / "planted_students.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(plant: Plant, circuits: ModuleType) -> Run:
    made = plant(lengths=[8] * 12)
    circuits.plant_circuit(made, known=((1, 2), (0, 1)))
    return made


def test_heads_have_their_codes_with_the_chance_level(run: Run) -> None:
    frame = ms.analyze(run, "head_circuit").df()
    heads = frame[frame["metric"] == "codes"]
    assert len(heads) == 12
    members = heads[heads["member"].astype(bool)]
    assert list(zip(members["layer"], members["head"], strict=True)) == [(1, 2), (2, 0)]
    assert set(members["value"]) == {9}
    assert set(heads["null"]) == {2.1}


def test_cuts_are_told_with_random_heads_beside_them(run: Run) -> None:
    found = ms.analyze(run, "head_circuit").df().set_index(["metric", "condition"])
    cut = found.loc[("logit difference", "circuit at its mean")]
    assert cut["value"] == pytest.approx(1.0)
    assert cut["null"] == pytest.approx(2.9)
    assert cut["null_low"] < 2.9 < cut["null_high"]
    assert found.loc[("logit difference", "base"), "value"] == pytest.approx(3.0)
    assert found.loc[("logit difference", "random heads less the circuit"), "value"] == pytest.approx(1.9)
    lost, kept = found.loc[("lost", "circuit at its mean")], found.loc[("recovered", "all other heads at their mean")]
    assert lost["value"] == pytest.approx(2 / 3)
    assert lost["null"] == pytest.approx(0.1 / 3)
    assert kept["value"] == pytest.approx(2.5 / 3)
    assert kept["null"] == pytest.approx(0.5 / 3)
    assert lost["ci_low"] <= lost["value"] <= lost["ci_high"]


def test_precision_recall_and_auc_against_known_heads(run: Run) -> None:
    found = ms.analyze(run, "head_circuit").df().set_index("metric")
    assert found.loc["precision", "value"] == pytest.approx(0.5)
    assert found.loc["recall", "value"] == pytest.approx(0.5)
    assert found.loc["precision", "null"] == pytest.approx(2 / 12)
    # Known: one of 9 codes (over 9 of the 10 others, level with one) and one of 2 codes (level with 9, under one).
    assert found.loc["AUC", "value"] == pytest.approx((9 + 0.5 + 9 * 0.5) / 20)
    assert found.loc["AUC", "null"] == 0.5


def test_auc_is_that_of_pairs_counted_one_by_one() -> None:
    random = np.random.default_rng(0)
    counts, truth = random.integers(0, 5, 30).astype(float), random.random(30) < 0.4
    weights = random.integers(0, 3, (6, 30)).astype(float)
    for row, found in zip(weights, _auc(counts, truth, weights), strict=True):
        above = below = 0.0
        for i in np.flatnonzero(truth):
            for j in np.flatnonzero(~truth):
                pair = row[i] * row[j]
                below += pair
                above += pair * (1.0 if counts[i] > counts[j] else 0.5 if counts[i] == counts[j] else 0.0)
        assert found == pytest.approx(above / below)


def test_title_and_figure(run: Run) -> None:
    result = ms.analyze(run, "head_circuit")
    assert "2 of 12 heads" in result.title
    assert "L1·H2 9" in result.title
    assert "from 3.00 to 1.00" in result.title
    assert "random heads to 2.90" in result.title
    assert "keep 83%" in result.title
    figure = result.figure()
    outlined = next(trace for trace in figure.data if trace.name == "of the circuit")
    assert list(zip(outlined.y, outlined.x, strict=True)) == [("L1", "H2"), ("L2", "H0")]
    bars = next(trace for trace in figure.data if trace.type == "bar")
    assert dict(zip(bars.x, bars.y, strict=True))["circuit<br>alone"] == pytest.approx(2.5)


def test_run_without_members_or_cuts_says_so(plant: Plant, circuits: ModuleType) -> None:
    made = plant(lengths=[8] * 3)
    circuits.plant_circuit(made, members=(), task="greater_than", seed=1)
    made.store.connection.execute("DELETE FROM effects WHERE base_run_id = ?", [made.run_id])
    result = ms.analyze(made, "head_circuit")
    assert result.title.startswith("No head has more codes of its own on greater_than")
    assert any("No cut was measured" in note for note in result.notes)
    assert result.figure().data
    assert "logit difference" not in set(result.df()["metric"])


def test_other_tasks_and_runs_without_circuits_are_refused(run: Run, plant: Plant) -> None:
    with pytest.raises(InputError, match="no circuit of 'docstring'"):
        ms.analyze(run, "head_circuit", task="docstring")
    with pytest.raises(InputError, match="no circuit"):
        ms.analyze(plant(lengths=[64], head_layers=1), "head_circuit")
