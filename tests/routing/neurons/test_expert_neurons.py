"""Neurons of experts, from the running counts of a recording."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]


def _row(expert: int, tokens: int, active: float | None, zero: float | None, layer: int = 0) -> dict[str, object]:
    return {
        "layer": layer, "block": "mlp", "expert": expert, "tokens": tokens, "active_share": active, "zero_share": zero,
    }  # fmt: skip


def test_shares_come_with_the_layers_mean_over_tokens(plant: Plant, planted: ModuleType) -> None:
    rows = [_row(0, 30, 0.5, 0.5), _row(1, 10, 0.9, 0.1), _row(2, 0, None, None), _row(-1, 40, 0.25, 0.75)]
    router = planted.Router(np.array([[0], [0], [0], [1]]), 3)
    result = analyze(plant(lengths=[4], routers=[router], experts=rows), "expert_neurons")
    active = result.df().query("metric == 'active'").set_index("expert")
    assert active["value"].dropna().to_dict() == {-1: 0.25, 0: 0.5, 1: 0.9}
    assert set(active["null"].round(12)) == {(30 * 0.5 + 10 * 0.9 + 40 * 0.25) / 80}
    assert any("1 experts were never chosen" in note for note in result.notes)
    assert "from 25.0% in L0·E-1 to 90.0% in L0·E1" in result.title


def test_neurons_that_could_not_be_read_are_said(plant: Plant, planted: ModuleType) -> None:
    router = planted.Router(np.array([[0], [0]]), 1)
    run = plant(lengths=[2], routers=[router], experts=[_row(0, 2, 0.5, 0.5), _row(0, 2, None, None, layer=3)])
    assert any("could not be read in L3" in note for note in analyze(run, "expert_neurons").notes)
    run = plant(lengths=[2], routers=[router], experts=[_row(0, 2, None, None)])
    with pytest.raises(InputError, match="no counts of neurons"):
        analyze(run, "expert_neurons")
