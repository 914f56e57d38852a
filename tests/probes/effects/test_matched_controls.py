"""Controls are as large as the intervention, at the same places, and never touch what it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

SEED = 3


@pytest.fixture(scope="module")
def demo(demo_model: Any) -> Any:
    return demo_model


@pytest.fixture
def drawn(demo: Any) -> Callable[..., Any]:
    """`drawn(edit, …, draws=5, loads=None)`: controls of an intervention of these edits."""
    from moescope.core.intervention import Intervention
    from moescope.probes.effects.controls import controls_for

    def draw(*edits: Any, draws: int = 5, loads: Any = None, model: Any = demo, seed: int = SEED) -> Any:
        return controls_for(Intervention(edits), model, draws=draws, loads=loads, seed=seed)

    return draw


LOADS = {(layer, "mlp"): np.random.default_rng(layer).permutation(16) * 100.0 for layer in range(6)}


@pytest.mark.parametrize("kind", ["Ablate", "Force", "Bias", "Scale", "FakeQuant"])
def test_as_many_other_experts_of_the_same_layers(kind: str, drawn: Callable[..., Any]) -> None:
    from moescope.core.edit_kinds import experts

    edit = getattr(experts, kind)(layer=(1, 4), experts=[2, 3])
    found = drawn(edit, loads=LOADS)
    assert len(found.interventions) == 5
    assert all(note.startswith("Loads are matched poorly") for note in found.notes)
    chosen = set()
    for control in found.interventions:
        assert [made.layer for made in control.edits] == [1, 4]
        for made in control.edits:
            assert type(made) is type(edit)
            assert len(set(made.ids)) == 2
            assert not set(made.ids) & {2, 3}
        chosen.add(tuple(frozenset(made.ids) for made in control.edits))
    assert len(chosen) == 5, "all differ"


def test_the_same_seed_draws_the_same_and_another_seed_others(drawn: Callable[..., Any]) -> None:
    from moescope.core.edit_kinds.experts import Ablate

    edit = Ablate(layer=2, experts=[1, 2, 3])
    assert drawn(edit).interventions == drawn(edit).interventions
    assert drawn(edit).interventions != drawn(edit, seed=SEED + 1).interventions


def test_experts_of_nearest_load_stand_for_each_other(drawn: Callable[..., Any]) -> None:
    from moescope.core.edit_kinds.experts import Ablate

    loads = {(2, "mlp"): np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007])}
    found = drawn(Ablate(layer=2, experts=[8]), draws=5, loads=loads)
    assert {made.ids[0] for control in found.interventions for made in control.edits} <= set(range(9, 16))
    few = drawn(Ablate(layer=2, experts=[0]), draws=1, loads=loads)
    assert few.interventions[0].edits[0].ids[0] in (1, 2, 3), "among the three nearest"
    unmatched = drawn(Ablate(layer=2, experts=[8]), loads=None)
    assert any("without matching" in note for note in unmatched.notes)


def test_an_expert_that_several_edits_name_is_one_expert_in_a_control(drawn: Callable[..., Any]) -> None:
    from moescope.core.edit_kinds.experts import Bias, Scale

    found = drawn(Bias(layer=2, experts=5, value=1.0), Scale(layer=2, experts=[5, 6], factor=2.0), loads=LOADS)
    for control in found.interventions:
        bias, scale = control.edits
        assert bias.ids[0] == scale.ids[0]
        assert not {*bias.ids, *scale.ids} & {5, 6}
        assert (bias.value, scale.factor) == (1.0, 2.0)


def test_keep_of_most_experts_leaves_out_others(drawn: Callable[..., Any]) -> None:
    from moescope.core.edit_kinds.experts import Keep

    for control in drawn(Keep(layer=1, experts=range(13)), loads=LOADS).interventions:
        left_out = set(range(16)) - set(control.edits[0].ids)
        assert len(left_out) == 3
        assert not left_out & {13, 14, 15}
    for control in drawn(Keep(layer=1, experts=[0, 1, 2]), loads=LOADS).interventions:
        assert len(control.edits[0].ids) == 3
        assert not set(control.edits[0].ids) & {0, 1, 2}


def test_fewer_controls_where_fewer_differ(drawn: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    import moescope as ms
    from moescope.core.edit_kinds.experts import Ablate

    mixtral = ms.load(tiny_model("mixtral"))
    found = drawn(Ablate(layer=0, experts=1), model=mixtral)
    assert sorted(control.edits[0].ids[0] for control in found.interventions) == [0, 2, 3]
    assert any("Only 3 different controls exist, of 5 asked for" in note for note in found.notes)
    none = drawn(Ablate(layer=0, experts=[0, 1, 2]), model=mixtral)
    assert none.interventions == ()
    assert any("of the 4 experts in layer 0, 3 are named, and too few are left" in note for note in none.notes)


def test_other_heads_channels_directions_and_layers(drawn: Callable[..., Any], demo: Any) -> None:
    from moescope.core.edit_kinds.experts import MixRouting, SwapExperts
    from moescope.core.edit_kinds.stream import Add, Clamp, MaskHead, ProjectOut, SetChannel, Skip

    for control in drawn(MaskHead(layer=(1, 2), heads=[0, 1])).interventions:
        for made, layer in zip(control.edits, (1, 2), strict=True):
            assert made.layer == layer
            assert len(set(made.heads)) == 2
            assert not set(made.heads) & {0, 1}
    for control in drawn(SetChannel(layer=1, channels=[4, 5], values=[1.0, 2.0])).interventions:
        assert len(set(control.edits[0].channels)) == 2
        assert not set(control.edits[0].channels) & {4, 5}
        assert control.edits[0].values == (1.0, 2.0)
    vector = np.random.default_rng(0).normal(size=demo.anatomy.d_model)
    for kind in (Add, ProjectOut, Clamp):
        for control in drawn(kind(layer=1, vector=vector)).interventions:
            other = np.array(control.edits[0].vector)
            assert np.linalg.norm(other) == pytest.approx(np.linalg.norm(vector))
            assert abs(other @ vector) < 0.4 * np.linalg.norm(vector) ** 2
    skipped = [control.edits[0].layers for control in drawn(Skip(layer=(0, 3), part="mlp")).interventions]
    assert len({frozenset(layers) for layers in skipped}) == 5
    assert all(len(set(layers)) == 2 and not set(layers) & {0, 3} for layers in skipped)
    for control in drawn(SwapExperts(layer=2, first=1, second=9), loads=LOADS).interventions:
        assert len({1, 9, control.edits[0].first, control.edits[0].second}) == 4
    reference = (0.6, 0.3, 0.1, *([0.0] * 13))
    for control in drawn(MixRouting(layer=2, reference=reference)).interventions:
        assert control.edits[0].reference != reference
        assert sorted(control.edits[0].reference) == sorted(reference)


def test_the_same_direction_in_two_layers_has_one_stand_in(drawn: Callable[..., Any], demo: Any) -> None:
    from moescope.core.edit_kinds.stream import Add

    vector = np.ones(demo.anatomy.d_model)
    for control in drawn(Add(layer=1, vector=vector), Add(layer=3, vector=vector)).interventions:
        first, second = control.edits
        assert first.vector == second.vector != tuple(vector)


def test_kinds_without_a_counterpart_say_so(drawn: Callable[..., Any]) -> None:
    from moescope.core.edit_kinds.experts import Ablate, RandomRouting, SetRouting, TopK, TopP

    for edit in (TopK(k=1), TopP(p=0.5), RandomRouting(), SetRouting(run="base")):
        found = drawn(edit)
        assert found.interventions == ()
        assert f"no matched random counterpart of {edit.kind}" in found.notes[0]
    both = drawn(TopK(k=1), Ablate(layer=2, experts=3), loads=LOADS)
    assert len(both.interventions) == 5
    assert all(control.edits[0] == TopK(k=1) for control in both.interventions)
    assert any("leave top_k as it is" in note for note in both.notes)
    assert drawn(Ablate(layer=2, experts=3), draws=0).interventions == ()


def test_loads_are_those_of_the_run(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    from moescope.probes.effects.controls import loads_of

    run = record_ids(tiny_model("qwen3_moe"), token_ids((9, 5)), labels=["a", "b"])
    loads = loads_of(run)
    assert set(loads) == {(0, "mlp"), (1, "mlp")}
    for (layer, _), load in loads.items():
        rows = run.store.fetch("SELECT unnest(experts) FROM routing WHERE layer = ?", [layer])
        assert load.tolist() == np.bincount([expert for (expert,) in rows], minlength=8).tolist()
    dense = record_ids(tiny_model("llama"), token_ids((9, 5)), name="dense")
    assert loads_of(dense) == {}
