"""Load: shares and their log-ratio to the fair share, counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]


def _by_expert(frame: pd.DataFrame, layer: int = 0, block: str = "mlp") -> pd.DataFrame:
    return frame[(frame["layer"] == layer) & (frame["block"] == block)].set_index("expert")


def test_round_robin_gives_every_expert_its_fair_share(plant: Plant, planted: ModuleType) -> None:
    experts = np.arange(16).reshape(8, 2) % 8
    run = plant(lengths=[8], routers=[planted.Router(experts, 8)])
    result = analyze(run, "load")
    frame = result.df()
    assert frame["value"].tolist() == [0.0] * 8
    assert frame["share"].tolist() == [1 / 8] * 8
    assert result.n == 16
    assert "all 8 experts are used" in result.title


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (4, 1), (2, 2)])
def test_constant_routing_gives_log2_of_experts_over_k(
    plant: Plant, planted: ModuleType, experts: int, top_k: int
) -> None:
    run = plant(lengths=[5], routers=[planted.Router(np.tile(np.arange(top_k), (5, 1)), experts)])
    frame = _by_expert(analyze(run, "load").df())
    assert frame.loc[: top_k - 1, "value"].tolist() == pytest.approx([math.log2(experts / top_k)] * top_k)
    assert frame.loc[top_k:, "value"].isna().all()
    assert frame.loc[top_k:, "tokens"].tolist() == [0] * (experts - top_k)


def test_experts_never_chosen_are_counted_in_the_title(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[5], routers=[planted.Router(np.tile([0, 1], (5, 1)), 8)])
    assert "6 of 8 experts are never chosen" in analyze(run, "load").title
    one = plant(lengths=[7], routers=[planted.Router(np.arange(7)[:, None], 8)])
    assert "1 of 8 experts is never chosen" in analyze(one, "load").title


def test_layers_and_blocks_are_shared_out_each_by_itself(plant: Plant, planted: ModuleType) -> None:
    even, all_on_two = np.arange(4)[:, None], np.full((4, 1), 2)
    routers = [
        planted.Router(even, 4, layer=0),
        planted.Router(all_on_two, 3, layer=0, block="attn"),
        planted.Router(all_on_two, 16, layer=5),
    ]
    frame = analyze(plant(lengths=[4], routers=routers), "load").df()
    assert _by_expert(frame)["value"].tolist() == [0.0] * 4
    assert _by_expert(frame, block="attn").loc[2, "value"] == pytest.approx(math.log2(3))
    assert _by_expert(frame, layer=5).loc[2, "value"] == pytest.approx(4.0)
    assert len(frame) == 4 + 3 + 16


def test_null_experts_count_as_experts(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[8], routers=[planted.Router(np.full((8, 1), 7), 4, n_null=4)])
    frame = _by_expert(analyze(run, "load").df())
    assert frame.loc[7, "value"] == pytest.approx(3.0)
    assert len(frame) == 8


def test_shared_experts_take_no_part(store: Store, plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[4], routers=[planted.Router(np.arange(4)[:, None], 4)])
    shared = {
        "layer": 0,
        "block": "mlp",
        "label": None,
        "phase": "prefill",
        "expert": -1,
        "tokens": 4,
        "weight_sum": 4.0,
    }
    planted.insert(run, "loads", [shared])
    frame = analyze(run, "load").df()
    assert frame["expert"].tolist() == [0, 1, 2, 3]
    assert frame["share"].tolist() == [0.25] * 4


@given(data=st.data())
def test_shares_equal_a_count_over_labels_and_phases(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    routers = data.draw(
        st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["mlp", "attn"])), min_size=1, unique=True)
    )
    rows: list[dict[str, Any]] = []
    for layer, block in routers:
        for label, phase in (("a", "prefill"), ("b", "prefill"), (None, "decode")):
            counts = data.draw(st.lists(st.integers(0, 50), min_size=5, max_size=5))
            counts[0] += 1
            rows += [
                {
                    "layer": layer,
                    "block": block,
                    "label": label,
                    "phase": phase,
                    "expert": e,
                    "tokens": c,
                    "weight_sum": c / 3,
                }
                for e, c in enumerate(counts)
            ]
    run = plant(lengths=[1])
    planted.insert(run, "loads", rows)
    found = analyze(run, "load").df().set_index(["layer", "block", "expert"])
    assert len(found) == 5 * len(routers)
    for place, row in found.iterrows():
        layer, block, expert = place
        here = [r for r in rows if (r["layer"], r["block"]) == (layer, block)]
        mine, total = sum(r["tokens"] for r in here if r["expert"] == expert), sum(r["tokens"] for r in here)
        assert row["tokens"] == mine
        assert row["share"] == pytest.approx(mine / total)
        assert row["weight_share"] == pytest.approx(mine / total)
        if mine:
            assert row["value"] == pytest.approx(math.log2(mine / total * 5))
        else:
            assert pd.isna(row["value"])


def test_weight_share_follows_weights_not_counts(plant: Plant, planted: ModuleType) -> None:
    weights = np.tile([0.75, 0.25], (4, 1))
    run = plant(lengths=[4], routers=[planted.Router(np.tile([0, 1], (4, 1)), 2, weights=weights)])
    frame = _by_expert(analyze(run, "load").df())
    assert frame["share"].tolist() == [0.5, 0.5]
    assert frame["weight_share"].tolist() == pytest.approx([0.75, 0.25])


def test_query_of_the_result_gives_its_numbers(store: Store, plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[6], routers=[planted.Router(np.array([[0], [0], [1], [2], [2], [2]]), 4)])
    result = analyze(run, "load")
    again = store.sql(result.sql, result.sql_parameters).df()
    pd.testing.assert_frame_equal(again, result.df()[again.columns], check_dtype=False)
