from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.phenomena.attention_records import uniform_alpha
from moescope.store.run import Run

Plant = Callable[..., Run]


@pytest.fixture(scope="module")
def heads(plant: Plant) -> Run:
    """Three heads a layer: even attention, half on the first token, all of it; and scores of protocols for four heads."""
    return plant(lengths=[64] * 4, head_layers=3)


def test_every_head_has_the_value_that_was_planted_with_rank_and_chance(heads: Run) -> None:
    result = analyze(heads, "head_map", metric="sink_alpha_0")
    frame = result.df()
    even = uniform_alpha(0)
    assert frame["layer"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.allclose(frame["value"], [even, 0.5 + 0.5 * even, 1.0] * 3, atol=1e-6)
    assert np.allclose(frame["null"], even)
    assert frame["rank"].tolist() == [7, 4, 1] * 3
    assert "L0·H2" in result.title
    assert "1 [1, 1], 0.0741 by chance" in result.title


def test_values_and_bounds_enclose_the_table_heads(heads: Run) -> None:
    frame = analyze(heads, "head_map", metric="induction").df()
    stored = heads.store.fetch(
        "SELECT value FROM heads WHERE run_id = ? AND metric = 'induction' ORDER BY layer, head", [heads.run_id]
    )
    assert np.allclose(frame["value"], [value for (value,) in stored])
    assert (frame["ci_low"] <= frame["value"]).all()
    assert (frame["value"] <= frame["ci_high"]).all()
    chance = heads.store.fetch(
        "SELECT value FROM heads WHERE run_id = ? AND metric = 'other offset' ORDER BY layer, head", [heads.run_id]
    )
    assert np.allclose(frame["null"], [value for (value,) in chance])


def test_the_first_of_what_is_asked_for_most_is_shown_without_a_metric(heads: Run) -> None:
    assert analyze(heads, "head_map").df()["metric"].unique().tolist() == ["sink_alpha_0"]


@pytest.mark.parametrize("given", [{"metric": "wit"}, {"metric": "entropy", "condition": "edited"}])
def test_what_was_not_measured_is_refused_with_what_was(heads: Run, given: dict[str, str]) -> None:
    with pytest.raises(InputError) as refused:
        analyze(heads, "head_map", **given)
    assert refused.value.found
    assert refused.value.fix


def test_heads_beyond_the_colours_are_marked_and_groups_divided(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[8])
    values = [0.01 * (n % 7) for n in range(64)]
    values[17] = 0.9
    planted.insert(
        run,
        "heads",
        [
            {"layer": n // 8, "head": n % 8, "metric": "mine", "condition": "base", "value": v, "n": 5, "block": "attn"}
            for n, v in enumerate(values)
        ],
    )
    told = {f"{layer} attn": 2 for layer in range(8)}
    run.store.connection.execute(
        "UPDATE runs SET summary = ? WHERE run_id = ?", [json.dumps({"key_value_heads": told}), run.run_id]
    )
    result = analyze(run, "head_map")
    assert result.df()["group"].tolist() == [0.0] * 4 + [1.0] * 4 + ([0.0] * 4 + [1.0] * 4) * 7
    figure = result.figure()
    cells, marks = figure.data
    assert cells.zmax < 0.9
    assert (list(marks.x), list(marks.y)) == (["H1"], ["L2"])
    assert [shape.x0 for shape in figure.layout.shapes] == [3.5]
    assert "no intervals" in " ".join(result.notes).lower()


def test_a_second_attention_of_a_layer_has_a_row_of_its_own(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[8])
    planted.insert(
        run,
        "heads",
        [
            {"layer": 1, "head": h, "metric": "m", "condition": c, "value": v, "n": 1, "block": b}
            for b, c, h, v in (("attn", "base", 0, 0.1), ("attn.1", "base", 0, math.nan), ("attn.1", "base", 1, 0.4))
        ],
    )
    result = analyze(run, "head_map")
    assert list(result.figure().data[0].y) == ["L1", "L1 attn.1"]
    assert result.n == 2
    assert "L1 attn.1·H1" in result.title


def _loud(planted: ModuleType, lengths: list[int]) -> dict[str, Any]:
    """Streams in which token 5 of layer 1 is massive in channel 9."""
    total = sum(lengths)
    streams = {}
    for layer in range(2):
        values = np.tile([2.0, -1.0, 0.5], (total, 1))
        values[:, 0] += np.arange(total) / 100
        if layer == 1:
            values[5] = [-3000.0, 2.0, 1.0]
        channels = np.tile([4, 5, 6], (total, 1))
        channels[5] = [9, 4, 5]
        streams[layer] = planted.Stream(
            np.ones(total), values=values, channels=channels, median=np.full(len(lengths), 0.5)
        )
    return {"lengths": lengths, "streams": streams}


def test_the_map_names_the_token_of_every_cell_and_what_is_massive(plant: Plant, planted: ModuleType) -> None:
    run = plant(**_loud(planted, [40, 20]))
    frame = analyze(run, "massive_map").df()
    cell = frame[(frame["layer"] == 1) & (frame["first"] == 5)].iloc[0]
    assert (cell["value"], cell["token"], cell["channel"], cell["massive"], cell["n"]) == (3000.0, 5, 9, 1, 2)
    late = frame[(frame["layer"] == 0) & (frame["first"] == 16)].iloc[0]  # positions 16 to 31 of both texts
    assert (late["n"], late["token"], late["position"]) == (20, 59, 19)
    assert late["value"] == pytest.approx(2.59)
    assert frame["n"].sum() == 2 * 60
    assert frame["massive"].sum() == 1


def test_the_map_by_channel_holds_the_largest_of_each(plant: Plant, planted: ModuleType) -> None:
    run = plant(**_loud(planted, [12]))
    result = analyze(run, "massive_map", by="channel", top=2)
    frame = result.df()
    assert sorted(frame["channel"].unique()) == [4, 9]
    assert frame.set_index(["layer", "channel"])["value"].loc[(1, 9)] == 3000.0
    figure = result.figure()
    assert figure.data[1].customdata[0] == {"token": 5}
    assert "massive activations stand at channel 9, in 1 layer" in result.title


def test_without_medians_nothing_is_called_massive(plant: Plant, planted: ModuleType) -> None:
    streams = {0: planted.Stream(np.ones(4), values=np.full((4, 3), 5000.0), channels=np.tile([1, 2, 3], (4, 1)))}
    result = analyze(plant(lengths=[4], streams=streams), "massive_map")
    assert result.df()["massive"].sum() == 0
    assert "not known" in result.title


def test_a_bin_of_several_positions_is_named_by_its_span(plant: Plant, planted: ModuleType) -> None:
    plan = _loud(planted, [40])
    stream = plan["streams"][1]
    stream.values[[5, 20]], stream.channels[[5, 20]] = stream.values[[20, 5]], stream.channels[[20, 5]]
    title = analyze(plant(**plan), "massive_map").title
    assert "(L1, position 20, channel 9)" in title
    assert title.endswith("massive activations stand at positions 16–31, in 1 layer")
