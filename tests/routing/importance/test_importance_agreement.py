"""Agreement of measures: planted agreement, disagreement and none."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau, spearmanr

from moescope.analysis_api import analyze
from moescope.store.run import Run

Plant = Callable[..., Run]
E = 12


def _run(plant: Plant, planted: ModuleType, norm_of: np.ndarray, layers: int = 1) -> Run:
    """Expert e takes e + 1 tokens of every document, with output norm `norm_of[e]`."""
    document = np.repeat(np.arange(E), np.arange(1, E + 1))
    chosen = np.tile(document, 4)[:, None]
    routers = [
        planted.Router(chosen, E, layer=layer, weights=np.ones(chosen.shape), norms=norm_of[chosen])
        for layer in range(layers)
    ]
    return plant(lengths=[len(document)] * 4, routers=routers)


def _row(frame: pd.DataFrame, metric: str, measure: str, other: str, scope: str = "layer") -> pd.Series:
    part = frame.query("metric == @metric and measure == @measure and other == @other and scope == @scope")
    assert len(part) == 1
    return part.iloc[0]


@pytest.mark.parametrize(("sign", "expected"), [(1, 1.0), (-1, -1.0)])
def test_planted_agreement_is_found_far_from_chance(
    plant: Plant, planted: ModuleType, sign: int, expected: float
) -> None:
    frame = analyze(_run(plant, planted, 20.0 + sign * np.arange(E)), "importance_agreement").df()
    for metric in ("Spearman", "Kendall"):
        row = _row(frame, metric, "frequency", "REAP")
        assert row["value"] == pytest.approx(expected)
        assert row["null"] == 0
        assert row["null_low"] < 0 < row["null_high"] < 0.8
        assert row["p"] < 0.01
        assert row["ci_low"] == row["ci_high"] == pytest.approx(expected), "every document is alike"


def test_unrelated_norms_stay_within_chance(plant: Plant, planted: ModuleType) -> None:
    order = np.array([6, 1, 9, 4, 11, 2, 8, 0, 5, 10, 3, 7]) + 1.0
    frame = analyze(_run(plant, planted, order), "importance_agreement").df()
    row = _row(frame, "Spearman", "frequency", "mean output norm")
    assert row["value"] == pytest.approx(spearmanr(np.arange(E), order).statistic)
    assert row["null_low"] < row["value"] < row["null_high"]
    assert row["p"] > 0.05
    kendalls = _row(frame, "Kendall", "frequency", "mean output norm")
    assert kendalls["value"] == pytest.approx(kendalltau(np.arange(E), order).statistic)


def test_layers_are_averaged_and_pooled(plant: Plant, planted: ModuleType) -> None:
    first = _run(plant, planted, 20.0 + np.arange(E), layers=2)
    first.store.connection.execute(
        "UPDATE expert_outputs SET norms = list_transform(norms, lambda x: 1000 - x) WHERE run_id = ? AND layer = 1",
        [first.run_id],
    )
    frame = analyze(first, "importance_agreement").df()
    assert _row(frame, "Spearman", "frequency", "REAP", "mean over layers")["value"] == pytest.approx(0, abs=1e-9)
    frequency = np.tile(np.arange(1.0, E + 1), 2)
    norms = np.concatenate([20.0 + np.arange(E), 980.0 - np.arange(E)])
    pooled = _row(frame, "Spearman", "frequency", "mean output norm", "all experts")
    assert pooled["value"] == pytest.approx(spearmanr(frequency, norms).statistic)
    pooled = _row(frame, "Kendall", "frequency", "mean output norm", "all experts")
    assert pooled["value"] == pytest.approx(kendalltau(frequency, norms).statistic)
    assert pooled["n"] == 2 * E


def test_experts_never_chosen_are_left_out(plant: Plant, planted: ModuleType) -> None:
    chosen = np.array([[0], [1], [1], [2], [2], [2]])
    router = planted.Router(chosen, 5, norms=chosen + 1.0, weights=np.ones(chosen.shape))
    frame = analyze(plant(lengths=[3, 3], routers=[router]), "importance_agreement").df()
    row = _row(frame, "Spearman", "frequency", "REAP")
    assert row["n"] == 3
    assert row["value"] == pytest.approx(1)


def test_one_expert_has_no_ranking(plant: Plant, planted: ModuleType) -> None:
    result = analyze(plant(lengths=[3], routers=[planted.Router(np.zeros((3, 1), int), 1)]), "importance_agreement")
    assert result.df()["value"].isna().all()
    assert "undefined" in " ".join(result.notes)
    assert "No layer" in result.title
