"""Local consistency against closed forms, published levels of chance, planted routers and a real trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.consistency.segment_performance import binomial_histogram, f1_curve, performance
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]
REAL = Path("/work/shared/data/deepseek_v2_lite_routing")
ONE = [[0], [0], [1], [1], [0], [2]]
TWO = [[0, 1], [2, 1], [0, 3], [0, 1], [2, 3], [0, 1]]


def _frame(run: Run, metric: str = "SRP", **parameters: Any) -> pd.DataFrame:
    frame = analyze(run, "local_consistency", **({"draws": 20, "shuffles": 1} | parameters)).df()
    return frame[frame["metric"] == metric]


def _value(run: Run, metric: str = "SRP", **parameters: Any) -> float:
    return float(_frame(run, metric, **parameters)["value"].item())


def test_one_expert_a_token(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[6], routers=[planted.Router(np.array(ONE), 3)])
    assert _value(run, segment=2) == pytest.approx(20 / 26)
    assert _value(run, "relative size", segment=2) == pytest.approx(1.6)
    assert _value(run, "threshold", segment=2) == 1
    assert _value(run, "always-on F1", segment=2) == pytest.approx(2 * (1 / 3) / (4 / 3))
    experts = _frame(run, segment=2, pool="expert")
    assert experts["value"].round(4).tolist() == [0.7692, 0.8, 0.6667]


def test_f1_of_every_threshold() -> None:
    f1, positives, chosen = f1_curve(np.array([7, 6, 2]))
    assert f1.tolist() == pytest.approx([0.5, 20 / 26, 8 / 14])
    assert positives.tolist() == [30, 16, 4]
    assert chosen == 10


def test_two_experts_a_token_tie_to_the_smallest_threshold(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[6], routers=[planted.Router(np.array(TWO), 4)])
    assert _value(run, segment=3) == pytest.approx(2 / 3)
    assert _value(run, "threshold", segment=3) == 0
    assert _value(run, "relative size", segment=3) == pytest.approx(2.0)
    experts = _frame(run, segment=3, pool="expert")
    assert experts["value"].round(4).tolist() == [0.8, 0.75, 0.5, 0.5882]


@pytest.mark.parametrize(("experts", "top_k", "segment"), [(8, 2, 4), (64, 6, 16), (256, 1, 3), (4, 4, 5)])
def test_constant_routing_is_wholly_consistent(
    plant: Plant, planted: ModuleType, experts: int, top_k: int, segment: int
) -> None:
    run = plant(lengths=[20, 30], routers=[planted.Router(np.tile(np.arange(top_k), (50, 1)), experts)])
    row = _frame(run, segment=segment).iloc[0]
    assert row["value"] == row["ci_low"] == row["ci_high"] == 1
    assert _value(run, "relative size", segment=segment) == 1
    if top_k < experts:
        assert (
            _value(run, "threshold", segment=segment) == 1
        )  # every threshold from 1 to m does it: the smallest counts
        assert _value(run, "excess over binomial", segment=segment) == pytest.approx(1)


# k ÷ E and the levels of chance that the reference names for windows of 4, 16, 64 and 256 tokens.
LEVELS = {
    1 / 4: (0.565, 0.452, 0.409, 0.400),
    1 / 5: (0.513, 0.400, 0.349, 0.335),
    1 / 8: (0.464, 0.321, 0.253, 0.229),
    6 / 64: (0.447, 0.281, 0.210, 0.183),
    4 / 60: (0.433, 0.241, 0.171, 0.140),
    1 / 16: (0.431, 0.237, 0.165, 0.134),
    1 / 128: (0.404, 0.124, 0.063, 0.037),
}


@pytest.mark.parametrize("ratio", LEVELS)
def test_binomial_null_gives_the_levels_of_chance(ratio: float) -> None:
    found = [float(performance(binomial_histogram(segment, ratio)).srp) for segment in (4, 16, 64, 256)]
    assert np.round(found, 3).tolist() == list(LEVELS[ratio])


def test_binomial_null_of_one_in_eight_and_its_thresholds() -> None:
    found = [performance(binomial_histogram(segment, 1 / 8)) for segment in (4, 16, 64)]
    assert [round(float(one.srp), 4) for one in found] == [0.4640, 0.3214, 0.2526]
    assert [int(one.threshold) for one in found] == [1, 3, 9]


def _uniform(generator: np.random.Generator, tokens: int, experts: int, top_k: int) -> np.ndarray:
    return generator.random((tokens, experts)).argsort(axis=1)[:, :top_k]


@pytest.fixture(scope="module")
def uniform(plant: Plant, planted: ModuleType) -> Run:
    generator = np.random.default_rng(1)
    return plant(lengths=[250] * 20, routers=[planted.Router(_uniform(generator, 5000, 16, 2), 16)])


def test_uniform_routing_is_at_chance(uniform: Run) -> None:
    frame = _frame(uniform, segments="4,16,64", shuffles=2, draws=200).set_index("segment")
    assert frame["null"].round(4).tolist() == [0.4640, 0.3214, 0.2526]
    assert frame["value"].tolist() == pytest.approx([0.4640, 0.3214, 0.2526], abs=0.01)
    for column in ("null_shuffled", "null_shuffled_in_sequence"):
        assert frame[column].tolist() == pytest.approx(frame["null"].tolist(), abs=0.01)
    for name in ("binomial", "shuffled", "shuffled in sequence"):
        assert abs(_value(uniform, f"excess over {name}", segment=16)) < 0.015


def test_sticky_router_has_the_stated_consistency(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(2)
    tokens, length = 24_000, 1200
    chosen = generator.integers(8, size=tokens)
    stays = generator.random(tokens) < 0.6
    for token in range(tokens):
        if token % length and stays[token]:
            chosen[token] = chosen[token - 1]
    run = plant(lengths=[length] * (tokens // length), routers=[planted.Router(chosen[:, None], 8)])
    frame = _frame(run, segments="4,16,64", draws=200)
    assert frame["value"].tolist() == pytest.approx([0.734, 0.471, 0.320], abs=0.01)
    assert (frame["ci_low"] > frame["null_shuffled_in_sequence"]).all()
    stay = 0.6 + 0.4 / 8
    repeats = analyze(run, "repetition", draws=20, shuffles=1).df().set_index("metric")
    assert repeats.loc["first choice repeated", "value"] == pytest.approx(stay, abs=0.01)
    assert repeats.loc["replacement rate", "value"] == pytest.approx(1 - stay, abs=0.01)
    mean = analyze(run, "residency", draws=20, shuffles=1).df().set_index("metric").loc["mean stay"]
    assert mean["value"] == pytest.approx(length / (1 + (length - 1) * (1 - stay)), abs=0.05)


def test_shuffles_tell_what_consistency_comes_from(plant: Plant, planted: ModuleType) -> None:
    """Experts of a label, of a sequence, of a stretch of text: each is lost by another shuffle."""
    generator = np.random.default_rng(3)
    sequences, length = 24, 120
    labels = ["law", "code"] * (sequences // 2)
    pick = generator.integers(4, size=sequences * length)
    of_label = np.repeat(np.arange(sequences) % 2 * 4, length) + pick
    of_sequence = np.repeat(generator.integers(2, size=sequences) * 4, length) + pick
    of_stretch = np.repeat(generator.integers(2, size=sequences * length // 20) * 4, 20) + pick
    controls = ["null_shuffled", "null_shuffled_in_label", "null_shuffled_in_sequence"]
    for chosen, lost in ((of_label, 1), (of_sequence, 2), (of_stretch, 3)):
        run = plant(lengths=[length] * sequences, labels=labels, routers=[planted.Router(chosen[:, None], 8)])
        row = _frame(run, segment=16, shuffles=4).iloc[0]
        above = [row["value"] - row[control] > 0.03 for control in controls]
        assert above == [number < lost for number in range(3)]


def test_layers_are_pooled_before_the_maximum(plant: Plant, planted: ModuleType) -> None:
    """A constant and a uniform layer: neither the mean of their SRPs nor either of them."""
    generator = np.random.default_rng(4)
    routers = [
        planted.Router(np.zeros((400, 1), int), 4, layer=0),
        planted.Router(_uniform(generator, 400, 32, 3), 32, layer=1, block="attn"),
    ]
    run = plant(lengths=[200, 200], routers=routers)
    both = 4 * binomial_histogram(8, 1 / 4) + 32 * binomial_histogram(8, 3 / 32)
    row = _frame(run, segment=8).iloc[0]
    assert row["null"] == pytest.approx(float(performance(both).srp))
    layers = _frame(run, segment=8, pool="layer")
    assert layers["value"].iloc[0] == 1
    assert layers["block"].tolist() == ["mlp", "attn"]
    assert row["value"] != pytest.approx(layers["value"].mean(), abs=1e-6)


def test_one_document_has_no_interval_and_says_so(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[6, 6], documents=[0, 0], routers=[planted.Router(np.array(ONE * 2), 3)])
    result = analyze(run, "local_consistency", segment=2)
    assert result.df()["ci_low"].isna().all()
    assert "One document has no interval." in result.notes


def test_short_sequences_are_left_out_and_counted(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[6, 1, 3], routers=[planted.Router(np.array([*ONE, [2], [2], [2], [2]]), 3)])
    result = analyze(run, "local_consistency", segments="2,4,99", draws=10, shuffles=1)
    four = result.df().query("segment == 4 and metric == 'SRP'")
    assert four["n"].item() == 3
    assert any("2 of 3 sequences, which are shorter (4 of 10 tokens)" in note for note in result.notes)
    assert any("No sequence has 99 tokens" in note for note in result.notes)
    alone = plant(lengths=[6], routers=[planted.Router(np.array(ONE), 3)])
    assert four["value"].item() == pytest.approx(_value(alone, segment=4))


def test_expert_named_twice_by_a_token_counts_once(plant: Plant, planted: ModuleType) -> None:
    twice = plant(lengths=[6], routers=[planted.Router(np.repeat(np.array(ONE), 2, axis=1), 3)])
    result = analyze(twice, "local_consistency", segment=2, pool="expert", draws=10, shuffles=0)
    rows = result.df()
    assert rows.loc[rows["metric"] == "SRP", "value"].round(4).tolist() == [0.7692, 0.8, 0.6667]
    assert any(note.startswith("6 decisions name an expert") for note in result.notes)


def test_expert_never_chosen_has_no_consistency(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[6], routers=[planted.Router(np.array(ONE), 5)])
    assert _frame(run, segment=2, pool="expert")["value"].isna().tolist() == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"segment": 7}, "segment = 7"),
        ({"segments": "8,9"}, "segments = 8 and 9"),
        ({"segments": "four"}, "parameter 'segments'"),
        ({"segments": "0,4"}, "parameter 'segments'"),
        ({"pool": "label", "segment": 2}, "no labels"),
        ({"pool": "head"}, "pool"),
        ({"segment": 0}, "segment"),
    ],
)
def test_bad_input_is_refused_by_name(
    plant: Plant, planted: ModuleType, parameters: dict[str, Any], words: str
) -> None:
    run = plant(lengths=[6], routers=[planted.Router(np.array(ONE), 3)])
    with pytest.raises(InputError, match=words):
        analyze(run, "local_consistency", **parameters)


def test_labels_take_their_own_sequences(plant: Plant, planted: ModuleType) -> None:
    constant = [[1]] * 6
    run = plant(
        lengths=[6, 6, 6, 1],
        labels=["a", "b", None, "c"],
        routers=[planted.Router(np.array([*ONE, *constant, *constant, [0]]), 3)],
    )
    result = analyze(run, "local_consistency", segment=2, pool="label", draws=10, shuffles=1)
    rows = result.df().query("metric == 'SRP'").set_index("label")
    assert rows["value"].to_dict() == {"a": pytest.approx(20 / 26), "b": 1.0}
    assert any("1 sequences without a label" in note for note in result.notes)
    assert any("'c'" in note for note in result.notes)


@pytest.mark.skipif(not REAL.exists(), reason="the real trace is not here")
@pytest.mark.parametrize(
    ("part", "expected"), [("law", (0.5386, 0.3917, 0.3075)), ("summary", (0.5372, 0.3940, 0.3269))]
)
def test_real_trace(part: str, expected: tuple[float, ...], store: Store) -> None:
    run = store.import_trace(REAL / f"{part}.parquet", name=part, n_experts=64)
    result = analyze(run, "local_consistency", segments="4,16,64", draws=200, shuffles=1)
    rows = result.df().query("metric == 'SRP'")
    assert rows["value"].round(4).tolist() == list(expected)
    assert rows["null"].round(4).tolist() == [0.4472, 0.2810, 0.2103]
    assert result.df().query("metric == 'always-on F1'")["value"].round(4).tolist() == [0.1714] * 3
    assert (rows["ci_low"] < rows["value"]).all()
    assert (rows["ci_low"] > rows["null_shuffled_in_sequence"]).all()
