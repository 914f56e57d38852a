"""Balance losses: closed forms, transformers' own function, the pooling trap, groups and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
POOLED, MEAN = "pooled loss (all layers' tokens in one)", "mean loss of layers"


def _top(logits: NDArray[Any], top_k: int) -> NDArray[Any]:
    return np.argsort(-logits, axis=1, kind="stable")[:, :top_k]


def _router(planted: ModuleType, logits: NDArray[Any], top_k: int, **fields: Any) -> Any:
    return planted.Router(_top(logits, top_k), logits.shape[1], logits=logits, **fields)


def _of(frame: pd.DataFrame, metric: str, **where: Any) -> float:
    part = frame[frame["metric"] == metric]
    for name, value in where.items():
        part = part[part[name] == value]
    assert len(part) == 1
    return float(part["value"].iloc[0])


@pytest.mark.parametrize("experts", [2, 8, 256])
def test_collapse_onto_one_expert_costs_as_many_as_there_are(plant: Plant, planted: ModuleType, experts: int) -> None:
    logits = np.zeros((6, experts))
    logits[:, 1] = 60.0
    frame = analyze(plant(lengths=[6], routers=[_router(planted, logits, 1)]), "balance_losses").df()
    assert _of(frame, "Switch loss") == pytest.approx(experts)
    assert _of(frame, "router z-loss") == pytest.approx(3600)


@pytest.mark.parametrize("per", ["slot", "token"])
def test_even_probabilities_cost_one_or_k(plant: Plant, planted: ModuleType, per: str) -> None:
    frame = analyze(plant(lengths=[6], routers=[_router(planted, np.zeros((6, 8)), 3)]), "balance_losses", per=per).df()
    expected = 1.0 if per == "slot" else 3.0
    assert _of(frame, "Switch loss") == pytest.approx(expected)
    assert frame.query("metric == 'Switch loss'")["null"].iloc[0] == expected
    assert _of(frame, "router z-loss") == pytest.approx(math.log(8) ** 2, rel=1e-5)


def test_pooled_loss_of_random_logits_is_about_k_as_transformers_tests_expect(
    plant: Plant, planted: ModuleType
) -> None:
    generator = np.random.default_rng(0)
    routers = [_router(planted, generator.normal(size=(500, 8)), 2, layer=layer) for layer in range(3)]
    frame = analyze(plant(lengths=[50] * 10, routers=routers), "balance_losses", per="token", draws=20).df()
    assert _of(frame, POOLED) == pytest.approx(2, abs=0.03)


def test_pooled_loss_equals_transformers(plant: Plant, planted: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    generator = np.random.default_rng(3)
    logits = [(generator.normal(size=(40, 6)) * 2).astype(np.float32) for _ in range(4)]
    routers = [_router(planted, each, 2, layer=layer) for layer, each in enumerate(logits)]
    frame = analyze(plant(lengths=[10] * 4, routers=routers), "balance_losses", per="token", draws=20).df()
    expected = load_balancing_loss_func(tuple(torch.from_numpy(each) for each in logits), 6, 2)
    assert _of(frame, POOLED) == pytest.approx(float(expected), rel=1e-5)


def test_pooling_hides_layers_that_collapse_onto_different_experts(plant: Plant, planted: ModuleType) -> None:
    routers = []
    for layer in range(4):
        logits = np.zeros((8, 4))
        logits[:, layer] = 50.0
        routers.append(_router(planted, logits, 1, layer=layer))
    result = analyze(plant(lengths=[4, 4], routers=routers), "balance_losses")
    frame = result.df()
    assert _of(frame, MEAN) == pytest.approx(4)
    assert _of(frame, POOLED) == pytest.approx(1)
    assert "hides 3.000 of it" in result.title


def _loss_by_hand(logits: NDArray[Any], experts: NDArray[Any], members: list[int]) -> tuple[float, float]:
    """Switch loss per slot, and z-loss, one token at a time."""
    size, top_k = logits.shape[1], experts.shape[1]
    share, mean, squares = [0.0] * size, [0.0] * size, 0.0
    for token in members:
        total = sum(math.exp(value) for value in logits[token])
        squares += math.log(total) ** 2
        for expert in range(size):
            mean[expert] += math.exp(logits[token][expert]) / total / len(members)
        for expert in experts[token]:
            share[expert] += 1 / (top_k * len(members))
    return size * sum(f * p for f, p in zip(share, mean, strict=True)), squares / len(members)


@given(data=st.data())
def test_losses_equal_a_loop_over_tokens(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    tokens = sum(lengths)
    labels = data.draw(st.lists(st.sampled_from(["a", "b"]), min_size=len(lengths), max_size=len(lengths)))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    routers, sizes = [], []
    for layer in range(2):
        size = data.draw(st.sampled_from([1, 3, 256]))
        top_k = data.draw(st.integers(1, min(size, 2)))
        sizes.append((size, top_k))
        logits = generator.normal(size=(tokens, size)).astype(np.float32)
        routers.append(_router(planted, logits, top_k, layer=layer))
    run = plant(lengths=lengths, labels=labels, routers=routers)
    result = analyze(run, "balance_losses", by="label", draws=5)
    of_token = [label for label, length in zip(labels, lengths, strict=True) for _ in range(length)]
    for label in set(labels):
        frame = result.df().query("label == @label")
        members = [token for token in range(tokens) if of_token[token] == label]
        losses = []
        for router in routers:
            loss, z = _loss_by_hand(router.logits, router.experts, members)
            losses.append(loss)
            assert _of(frame, "Switch loss", layer=router.layer) == pytest.approx(loss, rel=1e-4)
            assert _of(frame, "router z-loss", layer=router.layer) == pytest.approx(z, rel=1e-4, abs=1e-6)
        assert _of(frame, MEAN) == pytest.approx(sum(losses) / 2, rel=1e-4)
        assert (POOLED in set(frame["metric"])) == (sizes[0] == sizes[1])


def test_sigmoid_routers_take_scores_over_their_sum(plant: Plant, planted: ModuleType) -> None:
    logits = np.tile([0.0, 0.0, -60.0, -60.0], (4, 1))
    router = _router(planted, logits, 1, rule={"score": "sigmoid", "choice": "score", "bias": None, "groups": None})
    frame = analyze(plant(lengths=[4], routers=[router]), "balance_losses").df()
    assert _of(frame, "Switch loss") == pytest.approx(4 * 0.5)


def test_interval_is_of_documents(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(1)
    run = plant(lengths=[10] * 12, routers=[_router(planted, generator.normal(size=(120, 8)), 2)])
    row = analyze(run, "balance_losses").df().query("metric == 'router z-loss'").iloc[0]
    assert row["ci_low"] < row["value"] < row["ci_high"]
    alone = plant(lengths=[5], routers=[_router(planted, generator.normal(size=(5, 8)), 2)])
    assert analyze(alone, "balance_losses").df()[["ci_low", "ci_high"]].isna().all(axis=None)


def test_tokens_and_routers_without_logits_are_named(plant: Plant, planted: ModuleType) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 4))
    silent = planted.Router(_top(logits, 1), 4, layer=1)
    run = plant(lengths=[4], routers=[_router(planted, logits, 1), silent])
    run.store.connection.execute("DELETE FROM router_logits WHERE run_id = ? AND token = 2", [run.run_id])
    result = analyze(run, "balance_losses")
    assert result.n == 3
    assert any("1 token × router pairs without logits" in note for note in result.notes)
    assert any("1 routers have no logits" in note for note in result.notes)
    assert _of(result.df(), "Switch loss") == pytest.approx(
        _loss_by_hand(logits, _top(logits, 1), [0, 1, 3])[0], rel=1e-4
    )


def test_run_without_logits_is_told_which_probe_to_add(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[3], routers=[planted.Router(np.zeros((3, 1), int), 4)])
    with pytest.raises(InputError, match="router_logits"):
        analyze(run, "balance_losses")


@pytest.mark.parametrize("by", ["layer", "label", "class"])
def test_figures_are_drawn(plant: Plant, planted: ModuleType, by: str) -> None:
    logits = np.random.default_rng(0).normal(size=(8, 4))
    run = plant(lengths=[4, 4], labels=["a", "b"], routers=[_router(planted, logits, 2)])
    assert analyze(run, "balance_losses", by=by).figure().data
