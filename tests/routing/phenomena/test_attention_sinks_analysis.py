"""Attention sinks, classes of keys and sink decay of patterns that are written down."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.phenomena.attention_classes import uniform_sums
from moescope.routing.phenomena.attention_records import uniform_alpha
from moescope.store.run import Run

Plant = Callable[..., Run]

_SPEC = importlib.util.spec_from_file_location("moescope_planted_heads", Path(__file__).parents[1] / "planted_heads.py")
assert _SPEC is not None
assert _SPEC.loader is not None
heads: ModuleType = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(heads)

HALF = heads.towards_first(0.5)


def planted(plant: Plant, layers: Any, lengths: Any = (64, 70, 64), **fields: Any) -> Run:
    run = plant(lengths=list(lengths), **fields)
    heads.plant_heads(run, lengths, layers)
    return run


def rates(run: Run, **options: Any) -> dict[int, float]:
    frame = analyze(run, "attention_sinks", **options).df().query("metric == 'Sink_k'")
    return dict(zip(frame["position"], frame["value"], strict=True))


def test_uniform_attention_has_no_sink_and_the_harmonic_alpha(plant: Plant) -> None:
    result = analyze(planted(plant, {0: [heads.uniform, heads.uniform]}), "attention_sinks")
    frame = result.df()
    alpha = frame[(frame["metric"] == "alpha") & (frame["position"] == 0)]
    assert alpha["value"].tolist() == pytest.approx([sum(1 / i for i in range(1, 65)) / 64] * 2, abs=1e-6)
    assert alpha["value"].tolist() == pytest.approx(alpha["null"].tolist(), abs=1e-6)
    assert not frame.loc[frame["metric"] == "alpha", "sink"].any()
    assert result.title.startswith("No attention sink among the first 10 positions")


def test_all_on_the_first_token_is_a_sink_in_every_pair(plant: Plant) -> None:
    run = planted(plant, {0: [heads.on_first] * 3, 4: [heads.on_first] * 3})
    assert rates(run) == {0: 1.0, **dict.fromkeys(range(1, 10), 0.0)}
    assert analyze(run, "attention_sinks").n == 3 * 6


def test_attention_to_oneself_makes_no_spurious_sink(plant: Plant) -> None:
    run = planted(plant, {0: [heads.on_itself] * 2})
    assert set(rates(run).values()) == {0.0}
    assert analyze(run, "attention_sinks").title.startswith("No attention sink")


def test_half_of_the_heads_make_half_of_the_pairs_and_epsilon_decides(plant: Plant) -> None:
    run = planted(plant, {0: [heads.uniform, HALF], 1: [heads.uniform, HALF]})
    assert rates(run)[0] == 0.5
    assert rates(run, epsilon=0.6)[0] == 0.0  # α_0 of the half is 0.5 + 0.5 · 0.074
    frame = analyze(run, "attention_sinks").df()
    top = frame[(frame["metric"] == "alpha") & (frame["position"] == 0) & (frame["head"] == 1)]
    assert top["value"].tolist() == pytest.approx([0.5 + 0.5 * uniform_alpha(0)] * 2, abs=1e-6)
    assert top["rate"].tolist() == [1.0, 1.0]


def test_texts_of_one_document_are_resampled_together(plant: Plant) -> None:
    """Four texts of two documents, one document with sinks and one without: of two documents, a resample has 0, 1 or 2."""
    lengths = [64] * 4
    run = plant(lengths=lengths, documents=[0, 0, 1, 1])
    heads.plant_heads(run, lengths, {0: [heads.uniform]})
    run.store.connection.execute(
        "UPDATE head_sequences SET sums = [n::FLOAT] WHERE run_id = ? AND sequence_id < 2 AND metric = 'sink_alpha_0'",
        [run.run_id],
    )
    row = analyze(run, "attention_sinks").df().query("metric == 'Sink_k' and position == 0").iloc[0]
    assert (row["value"], row["ci_low"], row["ci_high"]) == (0.5, 0.0, 1.0)


def test_short_texts_are_left_out_unless_asked_for(plant: Plant) -> None:
    lengths = (64, 40, 12)
    run = planted(plant, {0: [heads.on_first]}, lengths)
    result = analyze(run, "attention_sinks")
    assert result.n == 1
    assert "1 of 3 texts have 64 tokens" in result.notes[0]
    assert analyze(run, "attention_sinks", shorter=True).n == 2


def test_uniform_attention_is_its_own_null_in_short_texts_too(plant: Plant) -> None:
    run = planted(plant, {0: [heads.uniform]}, (64, 24))
    frame = analyze(run, "attention_sinks", shorter=True).df()
    alpha = frame[frame["metric"] == "alpha"]
    assert alpha["value"].tolist() == pytest.approx(alpha["null"].tolist(), abs=1e-6)
    short = sum(1 / i for i in range(1, 25)) / 24  # H_24 ÷ 24, by hand
    whole = sum(1 / i for i in range(1, 65)) / 64
    assert alpha.iloc[0]["null"] == pytest.approx((short + whole) / 2)


def test_texts_too_short_to_tell_are_refused_with_what_to_do(plant: Plant) -> None:
    run = planted(plant, {0: [heads.on_first]}, (40, 30))
    with pytest.raises(InputError, match=r"long enough.*at least 64 tokens.*shorter=true"):
        analyze(run, "attention_sinks")
    with pytest.raises(InputError, match=r"at least 20 tokens"):
        analyze(planted(plant, {0: [heads.on_first]}, (12,)), "attention_sinks", shorter=True)


@pytest.mark.parametrize("epsilon", [0, 1, -0.2])
def test_an_epsilon_that_is_no_share_is_refused(epsilon: float, plant: Plant) -> None:
    with pytest.raises(InputError, match="share of attention"):
        analyze(planted(plant, {0: [heads.uniform]}), "attention_sinks", epsilon=epsilon)


def test_heads_without_records_are_refused_with_the_probe(plant: Plant) -> None:
    with pytest.raises(InputError, match="attention"):
        analyze(plant(lengths=[64]), "attention_sinks")


def test_classes_of_uniform_attention_are_their_null(plant: Plant) -> None:
    lengths = (64, 30)
    run = planted(plant, {0: [heads.uniform, heads.uniform]}, lengths)
    frame = analyze(run, "attention_classes").df()
    known = frame["null"].notna()
    assert known.all()
    assert frame["value"].to_numpy() == pytest.approx(frame["null"].to_numpy(), abs=1e-5)
    shared = [f"mass {name}" for name in ("first", "special", "punctuation", "self", "local", "other")]
    layer = frame[frame["head"].isna() & frame["metric"].isin(shared)]
    assert layer["value"].sum() == pytest.approx(1, abs=1e-6)


def test_uniform_sums_are_those_of_plain_loops() -> None:
    random = np.random.default_rng(3)
    marks = random.random(50) < 0.3
    expected = heads.statistics(heads.uniform(50), marks.tolist())
    for metric, value in uniform_sums(np.zeros(50, bool), marks).items():
        assert value == pytest.approx(expected[metric][0], abs=1e-9), metric


def test_values_of_heads_are_the_sums_over_all_queries(plant: Plant) -> None:
    run = planted(plant, {2: [HALF, heads.on_itself]}, (64, 20))
    frame = analyze(run, "attention_classes").df().query("metric == 'mass first'").set_index("head")["value"]
    half = sum(0.5 + 0.5 / i for length in (64, 20) for i in range(1, length + 1)) / 84
    assert frame[0] == pytest.approx(half, abs=1e-6)
    assert frame[1] == pytest.approx(2 / 84, abs=1e-6)
    stored = run.store.fetch(
        "SELECT head, value, n FROM heads WHERE run_id = ? AND metric = 'mass_first' ORDER BY head", [run.run_id]
    )
    assert stored == [(0, pytest.approx(half, abs=1e-6), 84), (1, pytest.approx(2 / 84, abs=1e-6), 84)]


def test_a_sink_logit_is_a_class_of_its_own(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[64])
    heads.plant_heads(run, [64], {0: [heads.uniform]})
    row = {
        "sequence_id": 0,
        "layer": 0,
        "block": "attn",
        "metric": "mass_sink_logit",
        "condition": "base",
        "sums": [16.0],
        "n": 64,
    }
    planted.insert(run, "head_sequences", [row])
    frame = analyze(run, "attention_classes").df().query("metric == 'mass sink logit'")
    assert frame["value"].tolist() == [0.25, 0.25]
    assert frame["null"].tolist() == [0.0, 0.0]


def test_decay_of_one_sink_of_two(plant: Plant) -> None:
    base = planted(plant, {0: [HALF, HALF], 1: [heads.on_first, HALF]})
    cut = planted(plant, {0: [heads.uniform, HALF], 1: [heads.on_first, HALF]})
    frame = analyze([base, cut], "sink_decay").df()
    lengths = (64, 70, 64)
    even = sum(1 / i for length in lengths for i in range(1, length + 1))
    half = sum(0.5 + 0.5 / i for length in lengths for i in range(1, length + 1))
    lost = 1 - even / half
    decay = frame[frame["metric"] == "decay"].set_index("layer")
    assert decay["value"].tolist() == pytest.approx([lost / 2, 0.0], abs=1e-6)
    assert decay.loc[0, "null"] == pytest.approx(lost, abs=1e-6)
    head = frame[(frame["metric"] == "decay of head") & (frame["layer"] == 0)]
    assert head["value"].tolist() == pytest.approx([lost, 0.0], abs=1e-6)


def test_mean_of_ratios_and_ratio_of_sums_differ_where_heads_do(plant: Plant) -> None:
    base = planted(plant, {0: [heads.on_first, heads.uniform]}, (64,))
    cut = planted(plant, {0: [heads.uniform, heads.uniform]}, (64,))
    frame = analyze([base, cut], "sink_decay").df().set_index("metric")["value"]
    harmonic = sum(1 / i for i in range(1, 65))
    assert frame["decay"] == pytest.approx((1 - harmonic / 64) / 2, abs=1e-6)
    assert frame["decay of sums"] == pytest.approx(1 - 2 * harmonic / (64 + harmonic), abs=1e-6)


def test_runs_of_other_texts_or_heads_are_refused(plant: Plant) -> None:
    base = planted(plant, {0: [HALF]})
    for other in (planted(plant, {0: [HALF, HALF]}), planted(plant, {3: [HALF]})):
        with pytest.raises(InputError, match="cannot be compared"):
            analyze([base, other], "sink_decay")


def test_texts_of_which_one_run_has_more_are_paired(plant: Plant) -> None:
    result = analyze([planted(plant, {0: [HALF]}), planted(plant, {0: [HALF]}, (64, 70))], "sink_decay")
    assert "2 texts" in result.notes[0]
    assert set(result.df()["value"]) == {0.0}


@pytest.mark.parametrize("name", ["attention_sinks", "attention_classes"])
def test_figures_are_drawn_from_the_result(name: str, plant: Plant) -> None:
    figure = analyze(planted(plant, {0: [HALF, heads.uniform], 1: [heads.uniform, HALF]}), name).figure()
    assert "layer" in (figure.layout.xaxis.title.text + figure.layout.yaxis.title.text)
    pair = [planted(plant, {0: [HALF], 1: [HALF]}) for _ in range(2)]
    assert len(analyze(pair, "sink_decay").figure().data) == 2


def test_every_mass_that_the_probe_writes_has_words_for_readers() -> None:
    from moescope.probes.attention_statistics import METRICS, SINK_METRIC
    from moescope.routing.phenomena.head_metrics import head_metric

    unnamed = [name for name in (*METRICS, SINK_METRIC) if head_metric(name).words == name]
    assert not unnamed
