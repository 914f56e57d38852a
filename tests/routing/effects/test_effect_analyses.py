"""The analyses of effects say what was planted, and refuse what is not there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run


def _loaded() -> ModuleType:
    path = Path(__file__).parents[1] / "planted_effects.py"
    spec = importlib.util.spec_from_file_location("moescope_tests_planted_effects", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


effects: Any = _loaded()


@pytest.fixture(scope="module")
def run(plant: Callable[..., Run]) -> Run:
    return plant(lengths=[31] * 12, labels=["a", "b", None] * 4, documents=[i // 2 for i in range(12)])


def _constant(run: Run, **values: float) -> dict[str, Any]:
    n = np.full(12, 30)
    return {metric: (np.full(12, value) * n, n) for metric, value in values.items()}


@pytest.fixture(scope="module")
def ids(run: Run) -> list[str]:
    """Two effects: the first of 0.5 nats beside controls of 0.1, 0.2 and 0.3, the second of 0.05 without any."""
    first, second = ("01a00000-0000-7000-8000-00000000000" + d for d in "12")
    effects.plant_one(
        run, first, effects.ablation(3, 5), "target", None, _constant(run, base_nll=2.0, delta_nll=0.5, kl=0.4)
    )
    for draw, value in enumerate((0.1, 0.2, 0.3)):
        effects.plant_one(
            run, first, effects.ablation(3, draw), "control", draw, _constant(run, delta_nll=value, kl=0.1)
        )
    effects.plant_one(
        run, second, effects.ablation(1, 0, name="the other"), "target", None, _constant(run, delta_nll=0.05)
    )
    return [first, second]


def test_effect_is_told_with_its_controls_and_the_difference(run: Run, ids: list[str]) -> None:
    result = analyze(run, "effect", effect=ids[0])
    frame = result.df().set_index(["metric", "kind"])
    beyond = frame.loc[("delta_nll", "difference")]
    assert beyond["value"] == pytest.approx(0.3)
    assert beyond["between"] == pytest.approx(0.1)
    assert beyond["rank_p"] == pytest.approx(1 / 4)
    # Documents are alike, so that only the draw of three controls from 0.1, 0.2, 0.3 varies: its mean is 0.1 or 0.3 once in 27.
    assert beyond["ci_low"] == pytest.approx(0.2, abs=0.04)
    assert beyond["ci_high"] == pytest.approx(0.4, abs=0.04)
    assert frame.loc[("delta_nll", "target"), "null"].item() == pytest.approx(0.2)
    assert sorted(frame.loc[("delta_nll", "control"), "value"]) == pytest.approx([0.1, 0.2, 0.3])
    assert frame.loc[("kl", "difference"), "value"] == pytest.approx(0.3)
    assert ("base_nll", "difference") not in frame.index
    assert result.title == "Removing L3E5 raises NLL by 0.500 nats (0.490 to 0.510); 3 matched controls 0.100 to 0.300"
    assert result.n == 360


def test_the_latest_effect_is_meant_where_none_is_named(run: Run, ids: list[str]) -> None:
    result = analyze(run, "effect")
    assert result.title.startswith("the other raises NLL by 0.050 nats (0.040 to 0.060); no matched controls")
    assert "difference" not in set(result.df()["kind"])
    assert any("There are no controls" in note for note in result.notes)
    assert analyze(run, "effect", effect=ids[1][:-1] + "2").title == result.title


def test_beginning_of_an_id_names_one_effect(run: Run, ids: list[str]) -> None:
    with pytest.raises(InputError, match=r"parameter 'effect' cannot be '01a0'.*several effects"):
        analyze(run, "effect", effect="01a0")
    for name in ("nope", "01b", "%", "' OR 1=1 --", ""):
        with pytest.raises(InputError, match="parameter 'effect' cannot be"):
            analyze(run, "effect", effect=name)


def test_effects_of_sweeps_are_the_latest_only_where_there_are_no_others(plant: Callable[..., Run]) -> None:
    run = plant(lengths=[31] * 12)
    of_sweep = effects.plant_effects(run, effects=1, seed=3, sweep=True)
    assert of_sweep[0] in analyze(run, "effect").notes[0]
    single = effects.plant_effects(run, effects=1, seed=2)
    assert single < of_sweep, "the sweep is younger"
    assert single[0] in analyze(run, "effect").notes[0]


def test_groups_are_told_with_the_range_of_their_controls(run: Run, ids: list[str]) -> None:
    result = analyze(run, "effect_groups", effect=ids[0])
    frame = result.df()
    assert frame["group_kind"].tolist() == [
        "all",
        "label",
        "label",
        "position",
        "position",
        "position",
        "class",
        "class",
    ]
    assert frame.loc[frame["group_kind"] == "position", "group"].tolist() == ["1–3", "4–15", "16–63"]
    assert frame["label"].dropna().tolist() == ["a", "b"]
    assert frame["null"].tolist() == pytest.approx([0.2] * 8)
    assert frame["control_low"].tolist() == pytest.approx([0.1] * 8)
    assert frame["control_high"].tolist() == pytest.approx([0.3] * 8)
    assert analyze(run, "effect_groups", effect=ids[1]).df()["controls"].tolist() == [0] * 8
    with pytest.raises(InputError, match="has no flips"):
        analyze(run, "effect_groups", effect=ids[0], metric="flips")


def test_effects_are_ranked(run: Run, ids: list[str]) -> None:
    result = analyze(run, "effects")
    frame = result.df()
    assert frame["effect_id"].tolist() == ids
    assert frame["intervention"].tolist() == ["Removing L3E5", "the other"]
    assert frame["value"].tolist() == pytest.approx([0.5, 0.05])
    assert frame["controls"].tolist() == [3, 0]
    assert "Removing L3E5 changes NLL most of 2 interventions: +0.500" in result.title
    assert result.title.endswith("1 of 1 with controls lie outside the range of theirs")


def test_run_without_effects_is_refused_with_what_to_do(plant: Callable[..., Run]) -> None:
    run = plant(lengths=[5])
    for name in ("effect", "effect_groups", "effects"):
        with pytest.raises(InputError, match="moescope intervene effect"):
            analyze(run, name)


def test_hostile_names_are_shown_as_text(plant: Callable[..., Run], planted: ModuleType) -> None:
    run = plant(lengths=[31] * 10, labels=list(planted.HOSTILE), name=planted.HOSTILE[3])
    effects.plant_effects(run, effects=2, names=planted.HOSTILE[:2])
    for name in ("effect", "effect_groups", "effects"):
        drawn = analyze(run, name).figure().to_json().replace("<br>", "").replace("<extra></extra>", "")
        assert "<script" not in drawn
        assert "<b>bold" not in drawn
        assert "<img" not in drawn


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"kind": "ablate", "layer": 3, "experts": [5, 9], "how": "route_around"}, "Removing L3E5, L3E9 (routed around)"),
        ({"kind": "ablate", "experts": [5]}, "Removing expert 5 of every layer"),
        ({"kind": "ablate", "layer": [1, 2], "experts": list(range(8)), "strength": 0.5},
         "Removing 8 experts of layers 1, 2 (strength 0.5)"),
        ({"kind": "scale", "layer": 0, "experts": [1], "factor": 2.0, "positions": "0:1"}, "Scaling by 2 L0E1 at 0:1"),
        ({"kind": "mask_head", "layer": 2, "heads": [1, 3], "how": "uniform"}, "Flattening heads 1, 3 of layer 2"),
        ({"kind": "skip", "layer": 2, "part": "mlp"}, "Skipping the MLP of layer 2"),
        ({"kind": "skip", "layer": 2}, "Skipping layer 2"),
        ({"kind": "splice", "layer": 2, "sae": "mine"}, "Putting what mine reconstructs into hook_resid_post of layer 2"),
        ({"kind": "latents", "layer": 2, "sae": "mine", "latents": [7], "values": [5.0]}, "Adding to latent 7 of mine of layer 2"),
        (
            {"kind": "latents", "layer": 2, "sae": "mine", "latents": [7, 8], "how": "scale", "values": [0.0, 0.0]},
            "Removing latents 7, 8 of mine of layer 2",
        ),
        ({"kind": "descend", "layer": 2, "sae": "mine", "target": [1.0]}, "Descending in the code of mine at hook_resid_post of layer 2"),
        ({"kind": "top_k", "k": 1}, "Top-1 routing of every layer"),
    ],
)  # fmt: skip
def test_interventions_are_told_in_words(edit: dict[str, Any], words: str) -> None:
    from moescope.core.intervention import Intervention
    from moescope.routing.effects.edit_words import in_words

    assert in_words(Intervention.from_data({"edits": [edit]})) == words


def test_every_kind_of_edit_has_words() -> None:
    from moescope.core.edit import edits
    from moescope.routing.effects.edit_words import _WORDS

    assert set(edits.names()) == set(_WORDS)


def test_effects_that_are_not_over_all_tokens_are_passed_over(plant: Callable[..., Run]) -> None:
    """Contrasts store a preference by side, without any row for all tokens."""
    run = plant(lengths=[31] * 4)
    (single,) = effects.plant_effects(run, effects=1, seed=1)
    (other,) = effects.plant_effects(run, effects=1, seed=9)
    assert other > single
    run.store.connection.execute(
        "UPDATE effects SET group_kind = 'contrast' WHERE effect_id = ? AND group_kind = 'all'", [other]
    )
    assert single in analyze(run, "effect").notes[0]
    assert analyze(run, "effects").df()["effect_id"].tolist() == [single]
    with pytest.raises(InputError, match="is not told over all tokens"):
        analyze(run, "effect", effect=other)
