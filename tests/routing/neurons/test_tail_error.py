"""CETT: closed forms, planted zeros, a search over every candidate, and the analysis made of it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.neurons.tail_error import cut_at, gaussian_ratio
from moescope.store.run import Run

Plant = Callable[..., Run]
Keep = Callable[..., None]


def _cett(neurons: np.ndarray, down: np.ndarray, threshold: float) -> float:
    """The definition, token by token and neuron by neuron."""
    ratios = []
    for token in neurons:
        tail = np.zeros(len(down))
        whole = np.zeros(len(down))
        for i, value in enumerate(token):
            whole += value * down[:, i]
            if abs(value) * np.sqrt((down[:, i] ** 2).sum()) < threshold:
                tail += value * down[:, i]
        ratios.append(np.sqrt((tail**2).sum()) / np.sqrt((whole**2).sum()))
    return float(np.mean(ratios))


@given(
    tokens=st.integers(1, 6),
    width=st.integers(1, 8),
    target=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_unit_columns_are_the_identity_matrix(tokens: int, width: int, target: float, seed: int) -> None:
    neurons = np.random.default_rng(seed).normal(size=(tokens, width))
    plain, full = cut_at(neurons, target), cut_at(neurons, target, down=np.eye(width))
    assert plain.threshold == pytest.approx(full.threshold)
    assert plain.cett == pytest.approx(full.cett)
    assert plain.kept.tolist() == full.kept.tolist()


@given(
    tokens=st.integers(1, 5), width=st.integers(2, 6), target=st.sampled_from([0.1, 0.3]), seed=st.integers(0, 10**6)
)
@settings(max_examples=15)
def test_threshold_keeps_the_error_and_the_next_candidate_does_not(
    tokens: int, width: int, target: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    neurons, down = generator.normal(size=(tokens, width)), generator.normal(size=(4, width))
    cut = cut_at(neurons, target, down=down)
    assert cut.cett == pytest.approx(_cett(neurons, down, cut.threshold))
    size = np.abs(neurons) * np.linalg.norm(down, axis=0)
    step = (np.quantile(size, 0.99) - size.min()) / 65535
    if cut.threshold < np.quantile(size, 0.99) - step / 2:
        assert cut.cett <= target
        assert _cett(neurons, down, cut.threshold + 1.01 * step) > target
    for token, kept in zip(size, cut.kept, strict=True):
        assert kept == pytest.approx(np.mean([n >= cut.threshold and n > 0 for n in token]))


@pytest.mark.parametrize("with_columns", [False, True])
def test_planted_zeros_are_the_activation_ratio_at_no_error(with_columns: bool) -> None:
    """A rectified network with 30 % dead neurons keeps its live ones at CETT 0."""
    generator = np.random.default_rng(0)
    neurons = generator.uniform(0.5, 2, (40, 10))
    neurons[:, :3] = 0
    down = generator.normal(size=(6, 10)) if with_columns else None
    cut = cut_at(neurons, 0.0, down=down)
    assert set(cut.kept) == {0.7}
    assert cut.cett == 0


def test_neurons_with_columns_of_nothing_are_dropped_first() -> None:
    generator = np.random.default_rng(1)
    neurons, down = generator.normal(size=(30, 8)), generator.normal(size=(5, 8))
    down[:, [1, 4]] = 0
    assert cut_at(neurons, 0.0, down=down).kept.max() <= 6 / 8


def test_one_large_neuron_is_all_that_stays() -> None:
    neurons = np.tile([1.0, 1.0, 1.0, 1.0, 100.0], (5, 1))
    cut = cut_at(neurons, 0.2)
    assert set(cut.kept) == {0.2}
    assert cut.cett == pytest.approx(2 / np.sqrt(10004))


def test_normal_neurons_reach_their_closed_form() -> None:
    cut = cut_at(np.random.default_rng(0).normal(size=(200, 2000)), 0.2)
    assert cut.kept.mean() == pytest.approx(gaussian_ratio(0.2), abs=0.005)
    assert gaussian_ratio(0) == 1
    assert gaussian_ratio(1) == 0


def test_shapes_that_do_not_fit_and_silence_are_refused() -> None:
    with pytest.raises(InputError, match="does not fit"):
        cut_at(np.ones((2, 3)), 0.2, down=np.ones((4, 5)))
    with pytest.raises(InputError, match="other than 0"):
        cut_at(np.zeros((2, 3)), 0.2)


def test_analysis_gives_threshold_ratio_and_control_by_layer(
    plant: Plant, planted: ModuleType, keep_vectors: Keep
) -> None:
    run = plant(lengths=[5] * 4, streams={0: planted.Stream(np.ones(20))})
    sparse = np.tile([1.0, 1.0, 1.0, 1.0, 100.0], (20, 1))
    keep_vectors(run, "blocks.0.mlp.hook_post", sparse)
    keep_vectors(run, "blocks.3.mlp.hook_post", np.zeros((20, 5)))
    result = analyze(run, "neuron_cett")
    frame = result.df().set_index("metric")
    assert frame.loc["activation ratio", "value"] == frame.loc["activation ratio", "ci_low"] == pytest.approx(0.2)
    assert frame.loc["activation ratio", "null"] == pytest.approx(gaussian_ratio(0.2))
    assert frame.loc["CETT", "value"] == pytest.approx(2 / np.sqrt(10004))
    notes = " ".join(result.notes)
    assert "weights are not in the store" in notes
    assert "All neurons are 0 at blocks.3.mlp.hook_post" in notes
    assert result.figure().data


@pytest.mark.parametrize("target", [-0.1, 1.1, float("nan")])
def test_senseless_targets_are_refused(plant: Plant, planted: ModuleType, keep_vectors: Keep, target: float) -> None:
    run = plant(lengths=[2], streams={0: planted.Stream(np.ones(2))})
    keep_vectors(run, "blocks.0.mlp.hook_post", np.ones((2, 2)))
    with pytest.raises(InputError, match="'target' cannot be"):
        analyze(run, "neuron_cett", target=target)
