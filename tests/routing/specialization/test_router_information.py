"""Information in the router's probabilities: closed forms of sure and blind routers, sums by hand, labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
INFORMATION, GLOBAL, LOCAL = (
    "router information",
    "entropy of the mean distribution",
    "mean entropy of a token",
)


def _chosen(logits: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


def _entropy(p: list[float]) -> float:
    return -sum(x * math.log2(x) for x in p if x > 0)


def test_sure_and_even_router_carries_log2_of_the_experts(plant: Plant, planted: ModuleType) -> None:
    sure = np.full((32, 8), -60.0)
    sure[np.arange(32), np.arange(32) % 8] = 60.0
    blind = np.zeros((32, 8))
    same = np.tile(np.linspace(0, 2, 8), (32, 1))
    routers = [
        planted.Router(_chosen(logits, 2), 8, layer=layer, logits=logits)
        for layer, logits in enumerate((sure, blind, same))
    ]
    frame = analyze(plant(lengths=[8] * 4, routers=routers), "router_information").df().set_index(["layer", "metric"])
    assert frame.loc[(0, INFORMATION), "value"] == pytest.approx(3.0, abs=1e-5)
    assert frame.loc[(0, LOCAL), "value"] == pytest.approx(0.0, abs=1e-5)
    assert frame.loc[(0, GLOBAL), "value"] == pytest.approx(3.0, abs=1e-5)
    assert frame.loc[(1, INFORMATION), "value"] == pytest.approx(0.0, abs=1e-5)
    assert frame.loc[(1, LOCAL), "value"] == pytest.approx(3.0, abs=1e-5)
    assert frame.loc[(2, INFORMATION), "value"] == pytest.approx(0.0, abs=1e-5)
    assert 0 < frame.loc[(2, GLOBAL), "value"] < 3.0


@given(data=st.data())
def test_values_equal_sums_by_hand(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    labels = data.draw(st.lists(st.sampled_from(["x", "y", None]), min_size=len(lengths), max_size=len(lengths)))
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    shapes = data.draw(st.sampled_from([((4, 1),), ((5, 2), (8, 3)), ((256, 8),)]))
    score = data.draw(st.sampled_from(["softmax", "sigmoid"]))
    routers = []
    for layer, (size, k) in enumerate(shapes):
        logits = generator.normal(0, 2, (sum(lengths), size))
        rule = {"score": score, "choice": "score"}
        routers.append(planted.Router(_chosen(logits, k), size, layer=layer, logits=logits, rule=rule))
    run = plant(lengths=lengths, labels=labels, routers=routers)
    frame = analyze(run, "router_information", draws=5).df()
    of_token = [label for label, length in zip(labels, lengths, strict=True) for _ in range(length)]
    for router in routers:
        for label in {None, *labels}:
            mean, local, tokens = [0.0] * router.n_experts, 0.0, 0
            for name, z in zip(of_token, router.logits.tolist(), strict=True):
                if label is not None and name != label:
                    continue
                scores = [math.exp(v) if score == "softmax" else 1 / (1 + math.exp(-v)) for v in z]
                p = [s / sum(scores) for s in scores]
                mean = [a + b for a, b in zip(mean, p, strict=True)]
                local += _entropy(p)
                tokens += 1
            whole = _entropy([m / tokens for m in mean])
            wanted = frame["label"].isna() if label is None else frame["label"] == label
            mine = frame[(frame["layer"] == router.layer) & wanted].set_index("metric")
            assert mine.loc[GLOBAL, "value"] == pytest.approx(whole, abs=1e-4)
            assert mine.loc[LOCAL, "value"] == pytest.approx(local / tokens, abs=1e-4)
            assert mine.loc[INFORMATION, "value"] == pytest.approx(whole - local / tokens, abs=1e-4)
            assert mine["n"].tolist() == [tokens] * 3


def test_labels_with_experts_of_their_own_lose_information_inside(plant: Plant, planted: ModuleType) -> None:
    """Each label's tokens are all alike: within a label the choice says nothing, over both it names the label."""
    own = np.repeat([0, 1], 40)
    logits = np.full((80, 4), -60.0)
    logits[np.arange(80), own] = 60.0
    run = plant(
        lengths=[10] * 8, labels=["a"] * 4 + ["b"] * 4, routers=[planted.Router(own[:, None], 4, logits=logits)]
    )
    result = analyze(run, "router_information")
    frame = result.df().query("metric == @INFORMATION")
    whole = frame[frame["label"].isna()].iloc[0]
    assert whole["value"] == pytest.approx(1.0, abs=1e-5)
    assert whole["ci_low"] < 1.0
    assert frame[frame["label"].notna()]["value"].abs().max() < 1e-5
    assert result.title == "The router's choice carries 1.00 of 2.00 bits about the token"


def test_run_without_logits_names_the_probe(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[2], routers=[planted.Router(np.array([[0], [1]]), 2)])
    with pytest.raises(InputError, match="router_logits"):
        analyze(run, "router_information")
