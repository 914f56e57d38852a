"""Neuron activity from vectors: counted one by one, normal neurons at their null, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
Keep = Callable[..., None]
DENSE, INSIDE = "blocks.0.mlp.hook_post", "blocks.1.mlp.experts.hook_post"


def _dense(plant: Plant, planted: ModuleType, lengths: list[int]) -> Run:
    return plant(lengths=lengths, streams={0: planted.Stream(np.ones(sum(lengths)))})


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    width=st.integers(1, 6),
    tau=st.sampled_from([0.0, 0.5, 1.0]),
    shards=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=12)
def test_shares_agree_with_counting(
    plant: Plant,
    planted: ModuleType,
    keep_vectors: Keep,
    lengths: list[int],
    width: int,
    tau: float,
    shards: int,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    tokens = sum(lengths)
    values = generator.integers(-2, 3, (tokens, width)) / 2
    experts = generator.integers(0, 3, 2 * tokens)
    slots = generator.integers(-2, 3, (2 * tokens, width)) / 2
    run = _dense(plant, planted, lengths)
    keep_vectors(run, DENSE, values, shards=shards)
    keep_vectors(run, INSIDE, slots, token=np.repeat(np.arange(tokens), 2), expert=experts, shards=shards)
    frame = analyze(run, "neuron_activity", threshold=tau, draws=3).df().set_index(["layer", "metric"])["value"]
    for layer, rows in ((0, values.tolist()), (1, slots.tolist())):
        entries = [a for row in rows for a in row]
        assert frame[layer, "exact zeros"] == pytest.approx(sum(a == 0 for a in entries) / len(entries))
        assert frame[layer, f"NSAR τ = {tau:g}"] == pytest.approx(sum(abs(a) > tau for a in entries) / len(entries))
    silent = [all(row[i] == 0 for row in values.tolist()) for i in range(width)]
    assert frame[0, "never active"] == pytest.approx(np.mean(silent))
    silent = [
        all(row[i] == 0 for row, e in zip(slots.tolist(), experts, strict=True) if e == expert)
        for expert in set(experts.tolist())
        for i in range(width)
    ]
    assert frame[1, "never active"] == pytest.approx(np.mean(silent))


def test_normal_neurons_lie_at_the_null(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    run = _dense(plant, planted, [20] * 10)
    keep_vectors(run, DENSE, np.random.default_rng(0).normal(0, 0.5, (200, 100)))
    frame = analyze(run, "neuron_activity").df().set_index("metric")
    for metric in ("NSAR τ = 0.1", "NSAR τ = 1"):
        assert frame.loc[metric, "value"] == pytest.approx(frame.loc[metric, "null"], abs=0.01)
    assert frame.loc["NSAR τ = 1", "null"] == pytest.approx(0.0455, abs=0.005), "two standard deviations"


def test_rectified_neurons_have_more_zeros_than_normal_ones(
    plant: Plant, planted: ModuleType, keep_vectors: Keep
) -> None:
    run = _dense(plant, planted, [20] * 10)
    keep_vectors(run, DENSE, np.random.default_rng(0).normal(0, 1, (200, 100)).clip(0))
    row = analyze(run, "neuron_activity").df().set_index("metric").loc["exact zeros"]
    assert row["ci_low"] < 0.5 < row["ci_high"]
    assert row["null"] == 0


def test_whole_sequences_are_taken_up_to_the_limit(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    run = _dense(plant, planted, [4] * 6)
    keep_vectors(run, DENSE, np.repeat(np.arange(6.0) % 2, 4)[:, None])
    result = analyze(run, "neuron_activity", tokens=8, threshold=0.0)
    assert result.n == 8
    assert any("8 of 24 recorded tokens" in note for note in result.notes)
    assert result.df().set_index("metric").loc["exact zeros", "value"] in (0, 0.5, 1)


def test_bfloat16_vectors_are_read_as_their_values(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    run = _dense(plant, planted, [2])
    keep_vectors(run, DENSE, np.array([[0x3F80, 0x0000], [0xC000, 0x3F80]]), dtype="bfloat16")
    frame = analyze(run, "neuron_activity", threshold=1.5).df().set_index("metric")["value"]
    assert frame["exact zeros"] == 0.25
    assert frame["NSAR τ = 1.5"] == 0.25


def test_vectors_that_are_no_numbers_are_left_out_and_said(
    plant: Plant, planted: ModuleType, keep_vectors: Keep
) -> None:
    run = _dense(plant, planted, [3])
    keep_vectors(run, DENSE, np.array([[1.0], [np.nan], [0.0]]))
    result = analyze(run, "neuron_activity")
    assert result.n == 2
    assert any("1 vectors with NaN" in note for note in result.notes)


def test_runs_without_neurons_name_the_site(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    run = _dense(plant, planted, [3])
    with pytest.raises(InputError, match="activations"):
        analyze(run, "neuron_activity")
    keep_vectors(run, "blocks.0.hook_resid_post", np.ones((3, 2)))
    with pytest.raises(InputError, match=r"--site blocks.L.mlp.hook_post"):
        analyze(run, "neuron_activity")


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_senseless_thresholds_are_refused(
    plant: Plant, planted: ModuleType, keep_vectors: Keep, threshold: float
) -> None:
    run = _dense(plant, planted, [3])
    keep_vectors(run, DENSE, np.ones((3, 2)))
    with pytest.raises(InputError, match="'threshold' cannot be"):
        analyze(run, "neuron_activity", threshold=threshold)
