"""The rules for super experts against the published tables and loops over planted outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.phenomena.expert_outputs import ExpertOutputs
from moescope.routing.phenomena.super_expert_rules import RULES, judge
from moescope.store.run import Run

Plant = Callable[..., Run]
Expert = tuple[int, int]
DEFAULTS: dict[str, float] = {"percentile": 99.5, "fraction": 0.1, "share": 0.75}


def outputs(values: dict[Expert, float], n_layers: int, forming: list[int] | None) -> ExpertOutputs:
    order = sorted(values, key=lambda place: -values[place])
    frame = pd.DataFrame(
        {
            "layer": [layer for layer, _ in order], "block": "mlp", "expert": [expert for _, expert in order],
            "value": [values[place] for place in order],
        }
    )  # fmt: skip
    return ExpertOutputs(frame, n_layers, forming, ())


def called(found: ExpertOutputs, rule: str, **settings: float) -> set[Expert]:
    ruled = judge(found, rule, **(DEFAULTS | settings))
    if ruled is None:
        return set()
    return {(int(r.layer), int(r.expert)) for r in found.frame[ruled.chosen].itertuples()}


def filled(top: dict[Expert, float], layers: Iterable[int], experts: int, rest: list[float]) -> dict[Expert, float]:
    """Published outputs where they are known, the rest dealt out over the other experts."""
    others = [(layer, expert) for layer in layers for expert in range(experts) if (layer, expert) not in top]
    rest = rest + [0.5] * (len(others) - len(rest))
    return top | dict(zip(reversed(others), rest, strict=True))


# Table 1 of the paper: the largest five and the tenth. What is not known lies below the tenth.
QWEN3 = {(1, 68): 744.0, (2, 92): 540.0, (3, 82): 430.0}
V2_LITE = {(3, 54): 1424.0, (4, 38): 462.0}


@pytest.mark.parametrize("percentile", [95.0, 97.0, 99.0, 99.5, 99.9])
@pytest.mark.parametrize("fraction", [0.07, 0.08, 0.09, 0.1])
def test_the_published_super_experts_come_out_at_every_combination_the_paper_tried(
    percentile: float, fraction: float
) -> None:
    qwen3 = outputs(filled(QWEN3, range(48), 128, [50.0, 19.1, 12.1] + [11.0] * 8), 48, [1, 2, 3])
    assert called(qwen3, "paper", percentile=percentile, fraction=fraction) == set(QWEN3)
    assert called(qwen3, "REAP", percentile=percentile, fraction=fraction) == set(QWEN3)
    v2_lite = outputs(filled(V2_LITE, range(1, 27), 64, [89.5, 37.5] + [24.0] * 5), 27, [3, 4])
    assert called(v2_lite, "paper", percentile=percentile, fraction=fraction) == set(V2_LITE)
    mixtral = outputs(filled({(1, 3): 5600.0}, range(32), 8, [302.0, 286.0, 258.0, 253.0] + [139.0] * 5), 32, [1])
    if percentile < 99.9:
        assert called(mixtral, "paper", percentile=percentile, fraction=fraction) == {(1, 3)}
        assert called(mixtral, "released", percentile=percentile, fraction=fraction) == {(1, 3)}


def test_outliers_of_the_last_layers_are_none_by_any_rule() -> None:
    """Qwen3's layer 47 holds three large experts which the paper calls outliers, not super experts."""
    top = QWEN3 | {(47, 8): 600.0, (47, 48): 500.0, (47, 100): 300.0}
    found = outputs(filled(top, range(48), 128, [12.1] * 6), 48, [1, 2, 3])
    for rule in ("paper", "released", "REAP"):
        assert called(found, rule) == set(QWEN3)


def test_an_expert_of_the_last_quarter_depends_on_the_rule() -> None:
    """It forms the massive activation, so that the paper's rule names it; the code never looks there. Both are right."""
    top = {(2, 5): 900.0, (14, 7): 800.0}
    found = outputs(filled(top, range(16), 64, [20.0] * 9), 16, [2, 14])
    assert called(found, "paper") == called(found, "paper, A of forming layers", percentile=95) == set(top)
    assert called(found, "released") == called(found, "REAP") == {(2, 5)}


def test_the_two_ways_to_count_three_quarters_differ() -> None:
    """27 blocks, the first dense: round(20.25) = 20 blocks are those below 20; ⌊0.75 × 26⌋ = 19 layers are 1 to 19."""
    at = {layer: outputs(filled({(layer, 0): 900.0}, range(1, 27), 64, []), 27, None) for layer in (19, 20)}
    assert [called(at[n], "released") for n in (19, 20)] == [{(19, 0)}, set()]
    assert [called(at[n], "REAP") for n in (19, 20)] == [{(19, 0)}, set()]
    six = {layer: outputs(filled({(layer, 0): 900.0}, range(6), 64, []), 6, None) for layer in (3, 4)}
    assert [called(six[n], "released") for n in (3, 4)] == [{(3, 0)}, set()], "round(4.5) is 4"
    assert [called(six[n], "REAP") for n in (3, 4)] == [{(3, 0)}, set()]
    ten = {layer: outputs(filled({(layer, 0): 900.0}, range(10), 64, []), 10, None) for layer in (7, 8)}
    assert [called(ten[n], "released") for n in (7, 8)] == [{(7, 0)}, set()], "round(7.5) is 8"
    assert [called(ten[n], "REAP") for n in (7, 8)] == [set(), set()], "⌊7.5⌋ is 7"


def test_floor_division_lets_one_through_that_a_tenth_does_not() -> None:
    """max = 99: a tenth is 9.9, floor division gives 9; 9.5 lies between."""
    found = outputs(filled({(0, 0): 99.0, (0, 1): 9.5}, range(8), 64, [0.6] * 3), 8, [0])
    assert called(found, "released", percentile=99) == {(0, 0), (0, 1)}
    assert called(found, "paper", percentile=99) == {(0, 0)}


def test_with_few_experts_the_interpolated_percentile_lets_one_pass_and_equal_maxima_none() -> None:
    few = outputs({(0, expert): 10.0 + expert for expert in range(8)}, 1, [0])
    assert called(few, "paper") == {(0, 7)}
    tied = outputs({(0, 0): 50.0, (0, 1): 50.0, (0, 2): 1.0}, 1, [0])
    assert called(tied, "paper") == set()
    one = outputs({(0, 0): 50.0}, 1, [0])
    assert called(one, "paper") == set()


def quantile(values: list[float], percent: float) -> float:
    """Linear interpolation between order statistics, written out."""
    order = sorted(values)
    rank = percent / 100 * (len(order) - 1)
    below = math.floor(rank)
    return order[below] + (rank - below) * (order[min(below + 1, len(order) - 1)] - order[below])


def by_hand(
    values: dict[Expert, float], rule: str, n_layers: int, forming: list[int], p: float, f: int, share: float
) -> set[Expert]:
    moe = sorted({layer for layer, _ in values})
    layers = {
        "paper": forming, "paper, A of forming layers": forming, "released": list(range(round(share * n_layers))),
        "REAP": moe[: int(share * len(moe))],
    }[rule]  # fmt: skip
    early = rule in ("paper, A of forming layers", "released")
    in_a = [x for (layer, _), x in values.items() if layer in layers or not early]
    if not in_a:
        return set()
    limit = max(in_a) // f if rule == "released" else max(in_a) / f
    return {
        place for place, x in values.items() if place[0] in layers and x > quantile(in_a, p) * (1 + 1e-12) and x > limit
    }


@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 2**31),
    forming=st.lists(st.integers(0, 5), max_size=3),
    percent=st.sampled_from([50.0, 80.0, 99.5]),
    fraction=st.sampled_from([4, 10]),
    share=st.sampled_from([0.3, 0.75, 1.0]),
)
def test_every_rule_is_what_it_says_on_any_shape(
    shape: list[int], seed: int, forming: list[int], percent: float, fraction: int, share: float
) -> None:
    """Layers without experts, of different sizes, with equal outputs."""
    random = np.random.default_rng(seed)
    values = {(n, e): float(random.integers(0, 40) ** 2) for n, size in enumerate(shape) for e in range(size)}
    found = outputs(values, len(shape), sorted(set(forming)))
    for rule in RULES:
        got = called(found, rule, percentile=percent, fraction=1 / fraction, share=share)
        assert got == by_hand(values, rule, len(shape), sorted(set(forming)), percent, fraction, share)


def rows(values: dict[Expert, float], *, token: int = 0, **other: Any) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer, "block": "mlp", "expert": expert, "tokens": 4, "weight_sum": 1.0, "output_norm_mean": 1.0,
            "weighted_norm_sum": 1.0, "max_abs_out": value, "max_abs_channel": 17, "max_abs_token": token, **other,
        }
        for (layer, expert), value in values.items()
    ]  # fmt: skip


def run_of(
    plant: Plant, planted: ModuleType, values: dict[Expert, float], *, heights: dict[int, float] | None = None, extra: Iterable[Any] = (),
    experts: int = 64, **router: Any,
) -> Run:  # fmt: skip
    """A run of 16 layers; `heights` is the largest |x| after each layer, on token 5, the median being 0.1."""
    routers = [
        planted.Router(np.zeros((6, 1), int), experts, layer=layer, **router)
        for layer in sorted({at for at, _ in values})
    ]
    streams = {}
    for layer, height in (heights or {}).items():
        largest = np.array([[1.0, 0.5, 0.2]] * 5 + [[height, 0.5, 0.2]])
        streams[layer] = planted.Stream(np.ones(6), largest, np.array([[17, 1, 2]] * 6), np.array([0.1]))
    return plant(
        lengths=[6], routers=routers, streams=streams, experts=[*rows(values, token=5), *extra],
        vocabulary={n: f" w{n}".encode() for n in range(6)},
    )  # fmt: skip


HEIGHTS = {layer: 900.0 if 2 <= layer < 14 else 1700.0 if layer >= 14 else 1.0 for layer in range(16)}
TOP = {(2, 5): 900.0, (14, 7): 800.0}


def test_rules_stand_side_by_side_with_token_channel_margin_and_runner_up(plant: Plant, planted: ModuleType) -> None:
    run = run_of(plant, planted, filled(TOP, range(16), 64, [20.0, 19.0, 18.0]), heights=HEIGHTS)
    result = analyze(run, "super_experts", percentile=99.0)
    assert result.title.startswith(
        "Super experts, rule by rule: paper and paper, A of forming layers: L2·E5, L14·E7; released and REAP: L2·E5"
    )
    assert result.title.endswith("the least of them is 40× the largest other output")
    frame = result.df()
    first = frame[(frame["rule"] == "released") & (frame["round"] == 0)].reset_index(drop=True)
    assert first.loc[0, ["layer", "expert", "value", "super_expert", "position", "channel", "token"]].tolist() == [
        2,
        5,
        900,
        True,
        5,
        17,
        5,
    ]
    assert first.loc[0, "context"] == "w0 w1 w2 w3 w4⟦ w5⟧"
    assert first.loc[0, "threshold"] == 90
    assert first.loc[0, "margin"] == 10
    assert first.loc[1, ["layer", "expert", "fails"]].tolist() == [14, 7, "layer"]
    assert set(first.loc[2:, "fails"]) <= {
        "fraction",
        "percentile, fraction",
        "layer, fraction",
        "layer, percentile, fraction",
    }
    assert set(frame.loc[frame["rule"] == "paper", "candidates"]) == {"2, 14"}
    assert "Massive activations form in blocks 2, 14." in result.notes
    figure = result.figure()
    marked = next(trace for trace in figure.data if trace.name == "super expert")
    assert list(zip(marked.x, marked.y, marked.text, strict=True)) == [("L2", 900, "E5"), ("L14", 800, "E7")]


def test_the_rule_is_applied_again_without_those_it_named(plant: Plant, planted: ModuleType) -> None:
    """Of 768 experts below layer 12 one is named; of the rest, which lie between 1 and 20, the largest is again."""
    run = run_of(
        plant, planted, filled({(2, 5): 900.0}, range(16), 64, []) | {(3, 1): 20.0, (3, 2): 1.0}, heights=HEIGHTS
    )
    frame = analyze(run, "super_experts").df()
    again = frame[(frame["rule"] == "released") & (frame["round"] == 1)]
    assert [(r.layer, r.expert, r.super_expert, r.threshold) for r in again.itertuples()] == [
        (3, 1, True, 2.0),
        (3, 2, False, 2.0),
    ]
    assert frame[(frame["rule"] == "paper") & (frame["round"] == 1)]["super_expert"].tolist() == [False]


def test_without_a_residual_stream_the_papers_rule_is_left_out_and_it_is_said(
    plant: Plant, planted: ModuleType
) -> None:
    run = run_of(plant, planted, filled(TOP, range(16), 64, []))
    result = analyze(run, "super_experts")
    assert set(result.df()["rule"].dropna()) == {"released", "REAP"}
    assert result.title.startswith("1 super expert by released and REAP: L2·E5")
    assert any("record with the probe `residual`" in note for note in result.notes)
    with pytest.raises(InputError, match="--probe residual"):
        analyze(run, "super_expert_sensitivity", rule="paper")


def test_without_massive_activations_the_papers_rule_names_none(plant: Plant, planted: ModuleType) -> None:
    run = run_of(plant, planted, filled(TOP, range(16), 64, []), heights=dict.fromkeys(range(16), 50.0))
    result = analyze(run, "super_experts")
    assert "paper: none" in result.title
    assert any("No block forms massive activations" in note for note in result.notes)


def test_shared_experts_count_null_and_unseen_ones_do_not(plant: Plant, planted: ModuleType) -> None:
    values = filled({}, range(16), 64, [])
    extra = [*rows({(1, -1): 700.0}), *rows({(1, 64): 9e9}), *rows({(1, 65): None})]  # type: ignore[dict-item]  # null is what is tried
    run = run_of(plant, planted, values, extra=extra, n_null=2)
    result = analyze(run, "super_experts")
    assert result.title.startswith("1 super expert by released and REAP: L1·shared 1")
    assert result.n == 16 * 64 + 1
    assert any("1 shared experts are in A" in note for note in result.notes)
    assert any("null experts" in note for note in result.notes)
    marked = next(trace for trace in result.figure().data if trace.name == "super expert")
    assert list(marked.text) == ["shared 1"]


def test_a_model_whose_shared_experts_were_not_recorded_is_told(plant: Plant, planted: ModuleType) -> None:
    run = run_of(plant, planted, filled(TOP, range(16), 64, []))
    assert not any("shared" in note for note in analyze(run, "super_experts").notes)
    run.store.connection.execute("UPDATE layers SET n_shared = 2 WHERE run_id = ?", [run.run_id])
    assert any("whose outputs this run does not hold" in note for note in analyze(run, "super_experts").notes)


def test_what_is_never_chosen_or_no_number_is_left_out_and_counted(plant: Plant, planted: ModuleType) -> None:
    values: dict[Expert, Any] = {(0, 0): 4.0, (0, 1): 2.0, (0, 2): None, (0, 3): math.inf}
    result = analyze(run_of(plant, planted, values, experts=4), "super_experts")
    assert result.n == 2
    assert any("1 experts were never chosen" in note for note in result.notes)
    assert any("1 experts put out NaN" in note for note in result.notes)
    with pytest.raises(InputError, match="no finite expert output"):
        analyze(run_of(plant, planted, {(0, 0): math.nan}, experts=1), "super_experts")


def test_outputs_of_nothing_are_no_super_experts(plant: Plant, planted: ModuleType) -> None:
    result = analyze(run_of(plant, planted, {(0, 0): 0.0, (0, 1): 0.0}, experts=2), "super_experts")
    assert result.title.startswith("No super expert by any rule")
    assert result.figure().data


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("percentile", 0.0),
        ("percentile", 101.0),
        ("fraction", -0.1),
        ("fraction", 2.0),
        ("share", 0.0),
        ("share", math.nan),
    ],
)
def test_senseless_thresholds_are_refused_by_name(name: str, value: float, plant: Plant, planted: ModuleType) -> None:
    run = run_of(plant, planted, {(0, 0): 1.0, (0, 1): 2.0}, experts=2)
    with pytest.raises(InputError, match=name):
        analyze(run, "super_experts", **{name: value})


def test_sensitivity_counts_and_names_what_never_changes(plant: Plant, planted: ModuleType) -> None:
    """Of 768 below layer 12: 900 passes everywhere; 100 where the fraction of 900 is below it and P99.9 (rank 766.2) is."""
    run = run_of(plant, planted, filled({(2, 5): 900.0, (3, 6): 100.0}, range(16), 64, []))
    result = analyze(run, "super_expert_sensitivity")
    cells = result.df().query("metric == 'super experts'").set_index(["percentile", "fraction"])
    expected = {(p, f): 2.0 if f * 900 < 100 else 1.0 for p in (95, 97, 99, 99.5) for f in (0.05, 0.07, 0.1, 0.15, 0.2)}
    expected |= {(99.9, f): 1.0 for f in (0.05, 0.07, 0.1, 0.15, 0.2)}
    assert cells["value"].to_dict() == expected
    assert cells.loc[(99.5, 0.1), "experts"] == "L2·E5, L3·E6"
    times = result.df().query("metric == 'combinations naming it'")
    assert [(r.layer, r.expert, r.value) for r in times.itertuples()] == [(2, 5, 1.0), (3, 6, 12 / 25)]
    assert (
        result.title
        == "L2·E5 is named by all 25 combinations of percentile and fraction; the number of super experts is from 1 to 2"
    )
    assert result.figure().data[0].z.shape == (5, 5)


def test_sensitivity_of_the_papers_rule_looks_at_forming_layers(plant: Plant, planted: ModuleType) -> None:
    run = run_of(plant, planted, filled(TOP, range(16), 64, []), heights=HEIGHTS)
    assert "L2·E5, L14·E7 are named by all" in analyze(run, "super_expert_sensitivity", rule="REAP", share=1.0).title
    times = analyze(run, "super_expert_sensitivity", rule="paper").df().query("metric == 'combinations naming it'")
    assert set(zip(times["layer"], times["expert"], strict=True)) == set(TOP)
    none = run_of(plant, planted, filled(TOP, range(16), 64, []), heights=dict.fromkeys(range(16), 50.0))
    assert analyze(none, "super_expert_sensitivity", rule="paper").title.startswith("No combination")
    with pytest.raises(InputError, match="no layer"):
        analyze(none, "super_expert_sensitivity", share=0.01)
