"""The analysis `massive_activations` against loops over planted records."""

from __future__ import annotations

import itertools
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
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
LENGTHS = (4, 1, 6)
VOCABULARY = {n: f" w{n}".encode() for n in range(50)}
Spikes = dict[tuple[int, int, int], float]


def plant_spikes(
    plant: Plant, planted: ModuleType, spikes: Spikes, medians: list[list[float]], *, lengths: tuple[int, ...] = LENGTHS,
    write: bool = True, **fields: Any,
) -> Run:  # fmt: skip
    """A stream of 1, −0.5 and 0.25 in channels 0, 1, 2 with (layer, token, channel) → value instead; medians [layer][text]."""
    tokens, streams, rows = sum(lengths), {}, []
    text = [number for number, length in enumerate(lengths) for _ in range(length)]
    for layer, by_text in enumerate(medians):
        values, channels = np.tile([1.0, -0.5, 0.25], (tokens, 1)), np.tile([0, 1, 2], (tokens, 1))
        for token in range(tokens):
            own = {0: 1.0, 1: -0.5, 2: 0.25} | {c: x for (at, t, c), x in spikes.items() if (at, t) == (layer, token)}
            ranked = sorted(own.items(), key=lambda item: -abs(item[1]))
            values[token], channels[token] = [x for _, x in ranked[:3]], [c for c, _ in ranked[:3]]
            for channel, x in sorted(own.items()):
                if abs(x) > 100 and abs(x) >= 1000 * by_text[text[token]]:
                    ratio = abs(x) / by_text[text[token]] if by_text[text[token]] else math.inf
                    rows.append({"layer": layer, "token": token, "channel": channel, "value": x, "ratio": ratio})
        streams[layer] = planted.Stream(np.ones(tokens), values, channels, np.array(by_text))
    run = plant(lengths=list(lengths), streams=streams, vocabulary=VOCABULARY, **fields)
    if write:
        planted.insert(run, "massive_activations", rows)
    return run


def part(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    return frame[frame["metric"] == metric]


def test_what_was_planted_is_told_with_its_layer_token_channel_value_and_ratio(
    plant: Plant, planted: ModuleType
) -> None:
    """Text 0 has a massive activation on its first token in blocks 1 to 3, text 2 a smaller one on its fourth in block 2."""
    spikes = {(layer, 0, 507): 5000.0 for layer in (1, 2, 3)} | {(2, 8, 247): -1500.0}
    run = plant_spikes(plant, planted, spikes, [[0.5] * 3, [0.5] * 3, [1.0] * 3, [2.0] * 3, [2.0] * 3])
    result = analyze(run, "massive_activations")
    assert result.title == (
        "Massive activations form in block 1, on 2 tokens in 2 of 3 texts: |x| up to 5,000 in channel 507, 10,000× the median; "
        "2 channels qualify, at the outputs of blocks 1 to 3"
    )
    frame = result.df()
    place = part(frame, "massive at token").set_index("channel")
    assert list(place.index) == [507, 247], "the largest first"
    shown = [
        "layer",
        "last_layer",
        "layers",
        "peak_layer",
        "value",
        "signed",
        "ratio",
        "at",
        "position",
        "token",
        "n",
        "texts",
    ]
    assert place.loc[507, shown].tolist() == [1, 3, 3, 1, 5000.0, 5000.0, 10000.0, "first token", 0, 0, 1, 1]
    assert place.loc[247, shown].tolist() == [2, 2, 1, 2, 1500.0, -1500.0, 1500.0, "' w8'", 3, 8, 1, 1]
    assert place.loc[507, "context"] == "⟦ w0⟧ w1 w2 w3"
    layers = part(frame, "max |x|")
    assert layers["value"].tolist() == [1.0, 5000.0, 5000.0, 5000.0, 1.0]
    assert layers["forms"].tolist() == [False, True, False, False, False]
    assert layers["threshold"].tolist() == [500.0, 500.0, 1000.0, 2000.0, 2000.0]
    assert part(frame, "texts with massive activations")["value"].tolist() == [0.0, 1 / 3, 2 / 3, 1 / 3, 0.0]
    figure = result.figure()
    assert {"massive in channel 507", "massive in channel 247", "|x| = 100"} <= {trace.name for trace in figure.data}


def test_blocks_that_add_a_tenth_form_and_those_that_hand_on_do_not(plant: Plant, planted: ModuleType) -> None:
    heights = [200.0, 1000.0, 1000.0, 1050.0, 2000.0, 500.0]
    run = plant_spikes(plant, planted, {(n, 0, 9): h for n, h in enumerate(heights)}, [[0.4] * 3] + [[0.1] * 3] * 5)
    layers = part(analyze(run, "massive_activations").df(), "max |x|")
    assert layers["forms"].tolist() == [False, True, False, False, True, False]
    assert layers["massive"].tolist() == [False, True, True, True, True, True]


def test_none_is_an_answer_that_says_how_near_the_largest_came(plant: Plant, planted: ModuleType) -> None:
    """Nearest is what has the largest share of its own threshold, not what is largest."""
    spikes = {(0, 2, 11): 80.0, (1, 5, 12): -900.0}
    run = plant_spikes(plant, planted, spikes, [[0.01] * 3, [3.0] * 3])
    result = analyze(run, "massive_activations")
    assert result.title == (
        "No massive activation; the nearest is |x| = 80 after layer 0 (channel 11, position 2), 8,000× the median: 80.0% of what "
        "the rule asks"
    )
    assert not result.df()["massive"].any()


@pytest.mark.parametrize(
    ("value", "median", "massive"), [(100.0, 0.01, False), (100.5, 0.1005, True), (1000, 1.0, True), (999, 1.0, False)]
)
def test_the_rule_is_strict_in_size_and_inclusive_in_ratio(
    value: float, median: float, massive: bool, plant: Plant, planted: ModuleType
) -> None:
    run = plant_spikes(plant, planted, {(0, 1, 40): value}, [[np.float32(median).item()] * 3], write=False)
    layers = part(analyze(run, "massive_activations").df(), "max |x|")
    assert layers["massive"].tolist() == [massive and value >= 1000 * np.float32(median).item()]


def test_the_test_on_means_differs_at_the_edge(plant: Plant, planted: ModuleType) -> None:
    """One text of three passes; the mean of maxima does not: (1200 + 1 + 1) ÷ 3 is 401 × the mean of medians."""
    run = plant_spikes(plant, planted, {(0, 0, 3): 1200.0}, [[1.0] * 3])
    means = part(analyze(run, "massive_activations").df(), "mean of maxima")
    assert means["value"].tolist() == pytest.approx([1202 / 3])
    assert means["ratio"].tolist() == pytest.approx([1202 / 3])
    assert means["massive"].tolist() == [False]
    assert part(analyze(run, "massive_activations").df(), "max |x|")["massive"].tolist() == [True]


def test_a_run_recorded_without_the_table_is_read_from_the_three_largest(plant: Plant, planted: ModuleType) -> None:
    spikes = {(0, 0, channel): 1000.0 + channel for channel in (3, 4, 5, 6)}
    whole, old = (plant_spikes(plant, planted, spikes, [[0.5] * 3], write=write) for write in (True, False))
    for run, channels, said in ((whole, [3, 4, 5, 6], False), (old, [4, 5, 6], True)):
        result = analyze(run, "massive_activations")
        assert sorted(part(result.df(), "massive in channel")["channel"]) == channels
        assert any("up to three channels a token are known" in note for note in result.notes) == said


def test_texts_that_begin_with_a_special_token_and_generated_tokens_are_told(plant: Plant, planted: ModuleType) -> None:
    generated = [False] * 10 + [True]
    run = plant_spikes(plant, planted, {(0, 10, 3): 5000.0}, [[1.0] * 3], decode=generated)
    run.store.connection.execute(
        "UPDATE tokens SET is_special = TRUE WHERE run_id = ? AND position = 0 AND sequence_id > 0", [run.run_id]
    )
    notes = " ".join(analyze(run, "massive_activations").notes)
    assert "2 of 3 texts begin with a special token" in notes
    assert "median of the text that was given" in notes


def test_a_median_of_nothing_makes_the_ratio_infinite_and_breaks_nothing(plant: Plant, planted: ModuleType) -> None:
    run = plant_spikes(plant, planted, {(0, 4, 3): 500.0}, [[0.0] * 3])
    result = analyze(run, "massive_activations")
    assert part(result.df(), "massive at token")["ratio"].tolist() == [math.inf]
    assert result.figure().data
    assert not part(result.df(), "max |x|")["value"].isna().any()


def test_activations_that_are_no_numbers_are_left_out_or_refused(plant: Plant, planted: ModuleType) -> None:
    broken = planted.Stream(np.ones(3), np.full((3, 3), np.nan), None, np.array([1.0]))
    with pytest.raises(InputError, match="no finite activation"):
        analyze(plant(lengths=[3], streams={0: broken}), "massive_activations")
    half = planted.Stream(np.ones(3), np.array([[np.inf, 2, 1], [7.0, 2, 1], [3, 2, 1]]), None, np.array([1.0]))
    run = plant(lengths=[3], streams={0: half})
    assert part(analyze(run, "massive_activations").df(), "max |x|")["value"].tolist() == [7.0]


def test_intervals_resample_documents_and_one_document_has_none(plant: Plant, planted: ModuleType) -> None:
    lengths = (2,) * 40
    spikes = {(0, 2 * text, 5): 3000.0 for text in range(0, 40, 4)}
    run = plant_spikes(plant, planted, spikes, [[1.0] * 40], lengths=lengths)
    row = part(analyze(run, "massive_activations", draws=400).df(), "texts with massive activations").iloc[0]
    assert row["value"] == 0.25
    assert 0.05 < row["ci_low"] < 0.25 < row["ci_high"] < 0.45
    one = plant_spikes(plant, planted, {(0, 0, 5): 3000.0}, [[1.0] * 2], lengths=(3, 3), documents=[0, 0])
    row = part(analyze(one, "massive_activations").df(), "texts with massive activations").iloc[0]
    assert row["value"] == 0.5
    assert math.isnan(row["ci_low"])


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    places=st.lists(
        st.tuples(
            st.integers(0, 2), st.integers(0, 14), st.integers(3, 8), st.sampled_from([90.0, -300.0, 2000.0, 9000.0])
        ),
        max_size=9,
    ),
    median=st.lists(st.sampled_from([0.25, 1.0, 4.0]), min_size=9, max_size=9),
)
def test_every_number_is_what_loops_over_the_plan_find(
    plant: Plant,
    planted: ModuleType,
    lengths: list[int],
    places: list[tuple[int, int, int, float]],
    median: list[float],
) -> None:
    tokens = sum(lengths)
    text = [number for number, length in enumerate(lengths) for _ in range(length)]
    position = [place for length in lengths for place in range(length)]
    spikes = {(layer, token % tokens, channel): x for layer, token, channel, x in places}
    medians = [[median[3 * layer + t] for t in range(len(lengths))] for layer in range(3)]
    run = plant_spikes(plant, planted, spikes, medians, lengths=tuple(lengths))
    frame = analyze(run, "massive_activations", draws=5).df()
    massive = {
        key: abs(x) for key, x in spikes.items() if abs(x) > 100 and abs(x) >= 1000 * medians[key[0]][text[key[1]]]
    }
    for layer in range(3):
        here = [(abs(x), t) for (at, t, _), x in spikes.items() if at == layer] + [(1.0, t) for t in range(tokens)]
        top = part(frame, "max |x|").set_index("layer").loc[layer]
        assert top["value"] == max(here)[0]
        assert top["token"] == min(t for size, t in here if size == max(here)[0])
        share = len({text[t] for at, t, _ in massive if at == layer}) / len(lengths)
        assert part(frame, "texts with massive activations").set_index("layer").loc[layer, "value"] == pytest.approx(
            share
        )
        largest = [max(size for size, t in here if text[t] == number) for number in range(len(lengths))]
        assert part(frame, "mean of maxima").set_index("layer").loc[layer, "value"] == pytest.approx(np.mean(largest))
    found = {(int(r.layer), int(r.channel)): (r.value, r.n) for r in part(frame, "massive in channel").itertuples()}
    expected = {}
    for layer, channel in itertools.product(range(3), range(3, 9)):
        if sizes := [size for (at, _, c), size in massive.items() if (at, c) == (layer, channel)]:
            expected[layer, channel] = (max(sizes), len(sizes))
    assert found == expected
    kinds = {(c, -1 if position[t] == 0 else t): [] for _, t, c in massive}
    for (layer, t, c), size in massive.items():
        kinds[c, -1 if position[t] == 0 else t].append((layer, t, size))
    rows = [
        (int(r.channel), r.value, int(r.layer), int(r.last_layer), int(r.layers), int(r.n))
        for r in part(frame, "massive at token").itertuples()
    ]
    assert sorted(rows) == sorted(
        (
            c, max(size for *_, size in seen), min(at for at, *_ in seen), max(at for at, *_ in seen), len({at for at, *_ in seen}),
            len({t for _, t, _ in seen}),
        )
        for (c, _), seen in kinds.items()
    )  # fmt: skip


def test_of_equal_largest_values_the_first_token_is_told_each_time(plant: Plant, planted: ModuleType) -> None:
    lengths = [30_000] * 10  # more rows than one thread reads
    n = sum(lengths)
    values = np.tile([9.0, 2.0, 1.0], (n, 1))
    stream = planted.Stream(
        np.full(n, 10.0), values=values, channels=np.tile([5, 6, 7], (n, 1)), median=np.linspace(0.5, 1.0, 10)
    )
    run = plant(lengths=lengths, streams={0: stream})
    for _ in range(3):
        for by, rows in (("position", 27), ("channel", 3)):
            frame = analyze(run, "massive_map", by=by).df()
            assert len(frame) == rows
            tokens = frame["token"].tolist()
            assert tokens == (frame["position"].tolist() if by == "position" else [0, 0, 0])
            assert frame["ratio"].iloc[0] == pytest.approx(9 / 0.5)
