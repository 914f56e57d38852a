"""Largest expert outputs: ordered by size, each with the place it happened at."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.store.run import Run

Plant = Callable[..., Run]


def _expert(
    layer: int, expert: int, value: float | None, token: int | None, *, channel: int = 0, tokens: int = 4
) -> dict[str, Any]:
    return {
        "layer": layer,
        "block": "mlp",
        "expert": expert,
        "tokens": tokens if value is not None else 0,
        "weight_sum": 1.0,
        "output_norm_mean": 2.0 if value is not None else None,
        "weighted_norm_sum": 3.0,
        "max_abs_out": value,
        "max_abs_channel": channel if value is not None else None,
        "max_abs_token": token,
    }


def test_planted_peak_comes_first_with_its_place_and_text(plant: Plant, planted: ModuleType) -> None:
    rows = [
        _expert(0, 0, 1.0, 0),
        _expert(3, 5, 640.0, 4, channel=17),
        _expert(3, 6, 2.0, 1),
        _expert(0, 1, None, None),
    ]
    vocabulary = {i: f" w{i}".encode() for i in range(6)}
    run = plant(lengths=[3, 3], labels=["a", "b"], vocabulary=vocabulary, experts=rows)
    result = analyze(run, "expert_maxima")
    frame = result.df()
    top = frame.iloc[0]
    assert (top["layer"], top["expert"], top["value"], top["channel"], top["token"]) == (3, 5, 640.0, 17, 4)
    assert (top["sequence_id"], top["position"], top["label"]) == (1, 1, "b")
    assert top["context"] == "w3⟦ w4⟧ w5"
    assert frame["value"].tolist() == [640.0, 2.0, 1.0]
    assert "The largest expert output is 640, from L3·E5 at position 1: 320.0× the median" in result.title


def test_expert_never_chosen_is_left_out(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[2], experts=[_expert(0, 0, 1.0, 0), _expert(0, 1, None, None)])
    result = analyze(run, "expert_maxima")
    assert result.df()["expert"].tolist() == [0]
    assert result.n == 4


def test_only_the_first_contexts_are_read(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[5], vocabulary={0: b"x"}, experts=[_expert(0, e, 10.0 - e, e) for e in range(5)])
    context = analyze(run, "expert_maxima", contexts=2).df()["context"]
    assert context.notna().tolist() == [True, True, False, False, False]


@given(data=st.data())
def test_order_is_by_size_then_layer_and_expert(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    places = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), min_size=1, max_size=12, unique=True))
    value = st.sampled_from([0.5, 1.0, 2.0, 300.0])
    values = data.draw(st.lists(value, min_size=len(places), max_size=len(places)))
    rows = [_expert(layer, expert, v, 0) for (layer, expert), v in zip(places, values, strict=True)]
    frame = analyze(plant(lengths=[1], experts=rows), "expert_maxima").df()
    expected = sorted((-v, layer, expert) for (layer, expert), v in zip(places, values, strict=True))
    assert [(-r.value, r.layer, r.expert) for r in frame.itertuples()] == expected


def test_median_in_the_title_is_over_experts(plant: Plant, planted: ModuleType) -> None:
    values = np.array([1.0, 4.0, 9.0, 20.0])
    run = plant(lengths=[1], experts=[_expert(0, e, v, 0) for e, v in enumerate(values)])
    assert f"{20 / 6.5:,.1f}× the median" in analyze(run, "expert_maxima").title


def test_peak_without_its_token_in_the_store_is_still_shown(plant: Plant, planted: ModuleType) -> None:
    frame = analyze(plant(lengths=[1], experts=[_expert(0, 0, 3.0, -1)]), "expert_maxima").df()
    assert frame["value"].tolist() == [3.0]
    assert frame["context"].isna().all()
