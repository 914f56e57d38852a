"""Residual norms: percentiles over tokens, and the first token beside them."""

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


def test_percentiles_of_0_to_100_are_their_own_numbers(plant: Plant, planted: ModuleType) -> None:
    run = plant(
        lengths=[101], streams={3: planted.Stream(np.random.default_rng(0).permutation(101.0 + np.arange(101)))}
    )
    row = analyze(run, "residual_norms").df().iloc[0]
    assert (row["p5"], row["value"], row["p95"], row["largest"]) == (106.0, 151.0, 196.0, 201.0)
    assert (row["layer"], row["n"]) == (3, 101)


def test_first_tokens_are_the_mean_over_sequences(plant: Plant, planted: ModuleType) -> None:
    norm = np.array([50, 1, 1, 70, 1, 1.0])
    result = analyze(plant(lengths=[3, 3], streams={0: planted.Stream(norm)}), "residual_norms")
    assert result.df()["first_token"][0] == 60.0
    assert "first tokens reach 60.0× the median, after layer 0" in result.title


def test_title_goes_from_the_first_layer_to_the_last(plant: Plant, planted: ModuleType) -> None:
    streams = {layer: planted.Stream(np.full(4, value)) for layer, value in ((9, 30.0), (0, 10.0), (4, 20.0))}
    result = analyze(plant(lengths=[4], streams=streams), "residual_norms")
    assert result.df()["layer"].tolist() == [0, 4, 9]
    assert "from 10 after layer 0 to 30 after layer 9" in result.title


@given(data=st.data())
def test_numbers_equal_sorting_and_interpolating(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    value = st.floats(np.float32(1e-3).item(), 2.0**20, width=32)
    norm = np.array(data.draw(st.lists(value, min_size=sum(lengths), max_size=sum(lengths))))
    row = analyze(plant(lengths=lengths, streams={1: planted.Stream(norm)}), "residual_norms").df().iloc[0]

    def quantile(share: float) -> float:
        ordered, place = sorted(norm), share * (len(norm) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))

    starts = np.cumsum([0, *lengths[:-1]])
    expected = [quantile(0.5), quantile(0.05), quantile(0.95), max(norm), np.mean(norm[starts])]
    assert row[["value", "p5", "p95", "largest", "first_token"]].tolist() == pytest.approx(expected, rel=1e-5)
