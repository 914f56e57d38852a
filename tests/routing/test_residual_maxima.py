"""Residual maxima: a planted massive activation is found where it was planted, and the rule holds at its borders."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.store.run import Run

Plant = Callable[..., Run]


def _stream(planted: ModuleType, largest: list[float], median: list[float], channel: int = 7) -> object:
    values = np.array([[v, 0.5, 0.25] for v in largest])
    channels = np.tile([channel, 1, 2], (len(largest), 1))
    return planted.Stream(np.abs(values[:, 0]), values, channels, np.array(median))


def test_planted_massive_activation_is_found_with_token_channel_and_layer(plant: Plant, planted: ModuleType) -> None:
    quiet = _stream(planted, [1.0] * 12, [0.5] * 3)
    values = [1.0] * 12
    values[4] = -2000.0
    streams = {0: quiet, 2: _stream(planted, values, [0.5] * 3, channel=321), 3: quiet}
    vocabulary = {i: f" w{i}".encode() for i in range(12)}
    result = analyze(plant(lengths=[4, 4, 4], streams=streams, vocabulary=vocabulary), "residual_maxima")
    massive = result.df().query("massive")
    row = massive.iloc[0]
    assert len(massive) == 1
    assert (row["layer"], row["token"], row["channel"], row["value"]) == (2, 4, 321, -2000.0)
    assert (row["sequence_id"], row["position"], row["ratio"]) == (1, 0, 4000.0)
    assert "⟦ w4⟧" in row["context"]
    assert "w3" not in row["context"], "the context crosses into another sequence"
    assert "|x| = 2,000 after layer 2, channel 321, position 0" in result.title


@pytest.mark.parametrize(
    ("value", "median", "massive"),
    [
        (100.0, 0.0625, False),  # 1600 ×, but not over 100
        (100.5, 0.0625, True),
        (-100.5, 0.0625, True),
        (500.0, 0.5, True),  # exactly 1000 ×
        (499.5, 0.5, False),
        (4096.0, 4.125, False),
        (0.5, 0.000244140625, False),  # 2048 ×, but tiny
    ],
)
def test_massive_needs_over_100_and_at_least_1000_times_the_median(
    plant: Plant, planted: ModuleType, value: float, median: float, massive: bool
) -> None:
    result = analyze(plant(lengths=[1], streams={0: _stream(planted, [value], [median])}), "residual_maxima")
    assert result.df()["massive"].tolist() == [massive]
    assert result.title.startswith("Massive" if massive else "No massive")


def test_ratio_is_to_the_median_of_the_tokens_own_sequence(plant: Plant, planted: ModuleType) -> None:
    stream = _stream(planted, [200.0, 1.0, 300.0, 1.0], [0.125, 50.0])
    frame = analyze(plant(lengths=[2, 2], streams={0: stream}), "residual_maxima").df().set_index("token")
    assert frame.loc[0, ["ratio", "massive"]].tolist() == [1600.0, True]
    assert frame.loc[2, ["ratio", "massive"]].tolist() == [6.0, False]


def test_equal_values_keep_the_earlier_token(plant: Plant, planted: ModuleType) -> None:
    stream = _stream(planted, [5.0, -9.0, 9.0, 9.0], [1.0])
    frame = analyze(plant(lengths=[4], streams={0: stream}), "residual_maxima", top=2).df()
    assert frame["token"].tolist() == [1, 2]


@given(data=st.data())
def test_table_equals_sorting_every_layer_by_magnitude(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tokens, top = sum(lengths), data.draw(st.integers(1, 6))
    number = st.integers(-3000, 3000).map(float)
    layers = {layer: data.draw(st.lists(number, min_size=tokens, max_size=tokens)) for layer in (0, 5)}
    medians = data.draw(st.lists(st.sampled_from([0.125, 0.25, 1.0]), min_size=len(lengths), max_size=len(lengths)))
    streams = {layer: _stream(planted, values, medians) for layer, values in layers.items()}
    result = analyze(plant(lengths=lengths, streams=streams), "residual_maxima", top=top)
    sequence = [number for number, length in enumerate(lengths) for _ in range(length)]
    expected = []
    for layer, values in layers.items():
        for token in sorted(range(tokens), key=lambda t: (-abs(values[t]), t))[:top]:
            ratio = abs(values[token]) / medians[sequence[token]]
            expected.append((layer, token, values[token], ratio, abs(values[token]) > 100 and ratio >= 1000))
    frame = result.df()
    assert list(frame[["layer", "token", "value", "ratio", "massive"]].itertuples(index=False, name=None)) == expected
    assert result.n == 2 * tokens


def test_a_massive_activation_below_the_rows_shown_is_still_told(plant: Plant, planted: ModuleType) -> None:
    """Medians differ a thousandfold, so that the largest |x| is not massive and a smaller one is."""
    values = np.zeros((4, 3))
    values[:, 0] = [300.0, 50.0, 10.0, -150.0]
    stream = planted.Stream(np.ones(4), values=values, channels=np.zeros((4, 3), int), median=np.array([1.0, 0.001]))
    result = analyze(plant(lengths=[2, 2], streams={0: stream}), "residual_maxima", top=1)
    assert result.df()["massive"].tolist() == [False]
    assert result.df()["massive_tokens"].tolist() == [1]
    assert result.title.startswith("Massive activations after layer 0;")
