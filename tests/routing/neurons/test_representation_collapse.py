"""Collapse of token vectors: closed forms, planted collapse onto experts, and none."""

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
PRE, POST = "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"


def _run(plant: Plant, planted: ModuleType, lengths: list[int], experts: int = 4) -> Run:
    chosen = (np.arange(sum(lengths)) % experts)[:, None]
    return plant(lengths=lengths, routers=[planted.Router(chosen, experts)])


def _value(run: Run, metric: str) -> dict[str, float]:
    row = analyze(run, "representation_collapse").df().query("metric == @metric").iloc[0]
    return {name: float(row[name]) for name in ("value", "null", "ci_low", "ci_high")}


@pytest.mark.parametrize("width", [3, 40])
def test_vectors_along_the_axes_fill_as_many_directions(
    plant: Plant, planted: ModuleType, keep_vectors: Keep, width: int
) -> None:
    """±e_i, i = 1 to 3, has the covariance I/3 on three axes, whatever the width."""
    run = _run(plant, planted, [6] * 3)
    axes = np.eye(width)[:3]
    keep_vectors(run, POST, np.concatenate([axes, -axes] * 3))
    assert _value(run, "effective rank")["value"] == pytest.approx(3)


def test_effective_rank_of_two_unequal_directions(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    """Variances 9 : 1 give exp of the entropy of (0.9, 0.1)."""
    run = _run(plant, planted, [4, 4])
    keep_vectors(run, POST, np.array([[3, 0], [-3, 0], [0, 1], [0, -1]] * 2))
    expected = np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1))
    assert _value(run, "effective rank")["value"] == pytest.approx(expected)


def test_normal_vectors_lie_at_their_null(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    run = _run(plant, planted, [25] * 8)
    keep_vectors(run, POST, np.random.default_rng(7).normal(size=(200, 32)))
    rank = _value(run, "effective rank")
    assert rank["value"] == pytest.approx(rank["null"], rel=0.03)
    cosine = _value(run, "mean cosine")
    assert cosine["ci_low"] < cosine["null"] == 0 < cosine["ci_high"]
    spread = _value(run, "within ÷ between experts")
    assert spread["value"] == pytest.approx(spread["null"], rel=0.5)


@given(lengths=st.lists(st.integers(1, 4), min_size=2, max_size=5), width=st.integers(1, 4), seed=st.integers(0, 10**6))
@settings(max_examples=12)
def test_mean_cosine_is_over_pairs_of_different_documents(
    plant: Plant, planted: ModuleType, keep_vectors: Keep, lengths: list[int], width: int, seed: int
) -> None:
    states = np.random.default_rng(seed).normal(1, 1, (sum(lengths), width)).astype(np.float32)
    run = _run(plant, planted, lengths)
    keep_vectors(run, POST, states)
    document = np.repeat(np.arange(len(lengths)), lengths)
    cosines = [
        float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for i, a in enumerate(states)
        for j, b in enumerate(states)
        if document[i] != document[j]
    ]
    assert _value(run, "mean cosine")["value"] == pytest.approx(np.mean(cosines), abs=1e-5)


def test_within_over_between_is_the_trace_of_the_definition(
    plant: Plant, planted: ModuleType, keep_vectors: Keep
) -> None:
    generator = np.random.default_rng(4)
    states = generator.normal(size=(24, 5)).astype(np.float32).astype(float)
    run = _run(plant, planted, [6] * 4, experts=3)
    keep_vectors(run, PRE, states)
    group = np.arange(24) % 3
    mean = states.mean(0)
    within, between = np.zeros((5, 5)), np.zeros((5, 5))
    for state, number in zip(states, group, strict=True):
        centre = states[group == number].mean(0)
        within += np.outer(state - centre, state - centre) / 24
        between += np.outer(centre - mean, centre - mean) / 24
    expected = np.trace(within @ np.linalg.pinv(between, rcond=1e-9))
    assert _value(run, "within ÷ between experts")["value"] == pytest.approx(expected, rel=1e-4)


def test_vectors_gathered_round_experts_fall_far_below_the_null(
    plant: Plant, planted: ModuleType, keep_vectors: Keep
) -> None:
    generator = np.random.default_rng(1)
    run = _run(plant, planted, [20] * 5)
    centres = generator.normal(size=(4, 16))
    keep_vectors(run, PRE, centres[np.arange(100) % 4] + generator.normal(0, 0.1, (100, 16)))
    spread = _value(run, "within ÷ between experts")
    assert spread["value"] < spread["null"] / 50


def test_equal_vectors_have_no_direction(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    run = _run(plant, planted, [3, 3])
    keep_vectors(run, POST, np.ones((6, 4)))
    assert _value(run, "effective rank")["value"] == 0
    assert _value(run, "mean cosine")["value"] == pytest.approx(1)


def test_one_document_has_no_cosine_between_documents(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    run = _run(plant, planted, [6])
    keep_vectors(run, POST, np.random.default_rng(0).normal(size=(6, 4)))
    assert set(analyze(run, "representation_collapse").df()["metric"]) == {"effective rank", "within ÷ between experts"}


def test_too_few_vectors_are_refused(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    run = _run(plant, planted, [4])
    keep_vectors(run, "blocks.0.mlp.hook_post", np.ones((4, 2)))
    with pytest.raises(InputError, match=r"--site blocks.L.hook_resid_pre"):
        analyze(run, "representation_collapse")
    keep_vectors(run, POST, np.ones((1, 2)))
    with pytest.raises(InputError, match="fewer than two vectors"):
        analyze(run, "representation_collapse")
