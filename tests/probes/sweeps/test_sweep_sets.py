"""Which experts a score chooses, and which random ones stand beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from moescope.core.edit_kinds.experts import Ablate, Keep
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.sweeps.plans import doses, drop_sets, fewer_or_more, keep_sets, random_routers
from moescope.probes.sweeps.scores import ExpertScores, random_experts, read_scores
from moescope.probes.sweeps.variants import Variant, grouped

SCORES = ExpertScores("worth", {(0, "mlp"): np.array([5.0, 1.0, 3.0, 2.0]), (1, "mlp"): np.array([9.0, 8.0, 0.5, 7.0])})


def test_lowest_of_each_layer_and_of_the_model() -> None:
    assert SCORES.lowest(0.5) == {(0, "mlp"): (1, 3), (1, "mlp"): (2, 3)}
    assert SCORES.lowest(0.5, across="model") == {(0, "mlp"): (1, 2, 3), (1, "mlp"): (2,)}
    assert SCORES.lowest(0.5, across="model", least=2) == {(0, "mlp"): (1, 3), (1, "mlp"): (2, 3)}
    assert SCORES.lowest(0.25, highest=True) == {(0, "mlp"): (0,), (1, "mlp"): (0,)}
    assert SCORES.lowest(1.0, least=2) == {(0, "mlp"): (1, 3), (1, "mlp"): (2, 3)}


def test_scores_are_read_from_mappings_and_tables(demo_model: Any) -> None:
    anatomy = demo_model.anatomy
    mapping = {(layer, expert): layer + expert / 100 for layer in range(6) for expert in range(16)}
    table = pd.DataFrame(
        [(layer, expert, value) for (layer, expert), value in mapping.items()], columns=["layer", "expert", "value"]
    )
    for given in (mapping, table, {(layer, "mlp", expert): v for (layer, expert), v in mapping.items()}):
        found = read_scores(given, anatomy)
        assert found.by_router[3, "mlp"].tolist() == pytest.approx([3 + e / 100 for e in range(16)])
    missing = read_scores(mapping | {(2, 7): float("nan")}, anatomy)
    assert missing.lowest(1 / 16)[2, "mlp"] == (7,)
    with pytest.raises(InputError, match="several metrics"):
        read_scores(table.assign(metric=["a", "b"] * 48), anatomy)
    with pytest.raises(InputError, match="cannot be a list"):
        read_scores([1.0], anatomy)


def test_random_sets_match_the_layers_and_differ_by_draw(demo_model: Any) -> None:
    like = {(0, "mlp"): (1, 2, 3), (4, "mlp"): (0,)}
    draws = [random_experts(demo_model.anatomy, like, seed=1, draw=draw) for draw in range(20)]
    assert all(
        {router: len(found) for router, found in draw.items()} == {(0, "mlp"): 3, (4, "mlp"): 1} for draw in draws
    )
    assert len({draw[0, "mlp"] for draw in draws}) > 15
    assert draws[3] == random_experts(demo_model.anatomy, like, seed=1, draw=3)
    assert all(len(set(draw[0, "mlp"])) == 3 for draw in draws)


def test_drop_sets_grow_and_leave_every_token_its_experts(demo_model: Any) -> None:
    scores = ExpertScores("worth", {(layer, "mlp"): np.arange(16.0) for layer in range(6)})
    found = drop_sets(demo_model.anatomy, [scores], [0.25, 0.5, 1.0], controls=2)
    sizes = [[len(edit.ids) for edit in v.intervention.edits if isinstance(edit, Ablate)] for v in found]
    assert sizes == [[4] * 6] * 3 + [[8] * 6] * 3 + [[14] * 6] * 3
    assert [(v.kind, v.draw) for v in found[:3]] == [("target", None), ("control", 0), ("control", 1)]
    assert found[0].intervention.edits[0].ids == (0, 1, 2, 3)
    kept = keep_sets(demo_model.anatomy, [scores], [0.25, 0.01], controls=1)
    assert [len(v.intervention.edits[0].ids) for v in kept] == [4, 4, 2, 2]
    first = kept[0].intervention.edits[0]
    assert isinstance(first, Keep)
    assert first.ids == (12, 13, 14, 15)


def test_other_sweeps_take_each_layer_alone_and_all(demo_model: Any) -> None:
    widths = fewer_or_more(demo_model.anatomy, [1, 4])
    assert [len(v.intervention.edits) for v in widths] == [6, 6] + [1] * 12
    assert [v.layer for v in widths[2:]] == [layer for layer in range(6) for _ in range(2)]
    routed = random_routers(demo_model.anatomy, seeds=5, seed=10, layers=[2])
    assert [edit.seed for v in routed for edit in v.intervention.edits] == [10, 11, 12, 13, 14]
    cut = Intervention([Ablate(layer=3, experts=1, strength=0.5)], name="cut")
    assert [(v.intervention.name, v.intervention.edits[0].strength) for v in doses(cut, [0.5, 2])] == [
        ("cut × 0.5", 0.25),
        ("cut × 2", 1.0),
    ]


def test_groups_hold_whole_effects_that_begin_at_one_place() -> None:
    made = [
        Variant(Intervention([Ablate(layer=layer, experts=0)]), kind, draw, effect)
        for effect, layer in enumerate((2, 2, 5))
        for kind, draw in (("target", None), ("control", 0))
    ]
    assert [(g.layer, len(g.effects), len(g.variants)) for g in grouped(made)] == [(2, 2, 4), (5, 1, 2)]  # type: ignore[arg-type]  # kinds are literals
    assert [len(g.variants) for g in grouped(made, limit=3)] == [2, 2, 2]  # type: ignore[arg-type]  # kinds are literals
