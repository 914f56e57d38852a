"""Distance between labels: 1 where no expert is shared, the tree of planted families, support, null."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
DISTANCE, SUPPORT = "JS distance", "bootstrap support of the group"


def _pairs(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["metric"] == DISTANCE].set_index(["label", "other"])


def test_labels_without_a_shared_expert_are_1_apart(plant: Plant, planted: ModuleType) -> None:
    own = np.repeat([0, 1, 2], 8)
    experts = np.stack([2 * own, 2 * own + 1], 1)
    run = plant(lengths=[4] * 6, labels=["a", "a", "b", "b", "c", "c"], routers=[planted.Router(experts, 6)])
    frame = _pairs(analyze(run, "label_distance").df())
    assert frame["value"].tolist() == pytest.approx([1.0] * 3)
    assert (frame["null"] < 0.95).all()


def test_layers_are_averaged_before_the_root(plant: Plant, planted: ModuleType) -> None:
    apart, alike = np.repeat([[0], [1]], 4, axis=0), np.zeros((8, 1), int)
    routers = [planted.Router(apart, 2, layer=0), planted.Router(alike, 5, layer=3)]
    run = plant(lengths=[2] * 4, labels=["a", "a", "b", "b"], routers=routers)
    assert _pairs(analyze(run, "label_distance").df())["value"].item() == pytest.approx(math.sqrt(0.5))
    assert _pairs(analyze(run, "label_distance", layer=0).df())["value"].item() == pytest.approx(1.0)
    assert _pairs(analyze(run, "label_distance", layer=3).df())["value"].item() == pytest.approx(0.0)
    with pytest.raises(InputError, match=r"no router in layer 7.*0, 3"):
        analyze(run, "label_distance", layer=7)


def _families(generator: np.random.Generator, per_label: int) -> tuple[np.ndarray, list[str]]:
    """Four labels in two families: those of a family prefer the same experts, with small differences of their own."""
    odds = {
        "anise": [0.45, 0.35, 0.1, 0.1],
        "basil": [0.35, 0.45, 0.1, 0.1],
        "cobalt": [0.1, 0.1, 0.45, 0.35],
        "daffodil": [0.1, 0.1, 0.35, 0.45],
    }
    labels = [label for label in odds for _ in range(per_label)]
    return np.concatenate([generator.choice(4, size=(40, 1), p=odds[label]) for label in labels]), labels


def test_planted_families_come_out_as_groups_with_full_support(plant: Plant, planted: ModuleType) -> None:
    experts, labels = _families(np.random.default_rng(0), 8)
    run = plant(lengths=[40] * len(labels), labels=labels, routers=[planted.Router(experts, 4)])
    result = analyze(run, "label_distance")
    groups = result.df().query("metric == @SUPPORT").set_index("members")
    assert set(groups.index) == {"0 1", "2 3", "0 1 2 3"}
    assert (groups["value"] > 0.95).all()
    assert groups.loc["0 1 2 3", "height"] == groups["height"].max()
    between = _pairs(result.df()).loc[("anise", "cobalt")]
    assert between["value"] > 3 * between["null"]
    assert between["p"] == pytest.approx(1 / 201)
    figure = result.figure()
    assert set(figure.layout.yaxis.ticktext) == set(labels)
    assert any(trace.line.dash == "dash" for trace in figure.data)


def test_labels_that_mean_nothing_lie_at_their_chance_level(plant: Plant, planted: ModuleType) -> None:
    experts, _ = _families(np.random.default_rng(3), 8)
    generator, p, ratio = np.random.default_rng(9), [], []
    for _ in range(20):
        labels = generator.permutation(["w", "x", "y", "z"] * 8).tolist()
        run = plant(lengths=[40] * 32, labels=labels, routers=[planted.Router(experts, 4)])
        frame = _pairs(analyze(run, "label_distance", permutations=60, draws=2).df())
        p += frame["p"].tolist()
        ratio.append(frame["value"].mean() / frame["null"].mean())
    assert np.mean(np.array(p) < 0.05) < 0.12
    assert 0.35 < np.mean(p) < 0.65
    assert np.mean(ratio) == pytest.approx(1.0, abs=0.3)  # spread over labellings: about 0.3 each


@given(data=st.data())
def test_distances_equal_a_count_by_hand(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    more = data.draw(st.lists(st.sampled_from("xyz"), min_size=len(lengths) - 2, max_size=len(lengths) - 2))
    labels = ["x", "y", *more]
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    shapes = data.draw(st.sampled_from([((4, 1),), ((5, 2), (8, 3)), ((256, 4),)]))
    routers = [
        planted.Router(np.stack([generator.permutation(e)[:k] for _ in range(sum(lengths))]), e, layer=layer)
        for layer, (e, k) in enumerate(shapes)
    ]
    run = plant(lengths=lengths, labels=labels, routers=routers)
    frame = _pairs(analyze(run, "label_distance", permutations=2, draws=2).df())
    of_token = [label for label, length in zip(labels, lengths, strict=True) for _ in range(length)]
    for one, two in combinations(sorted(set(labels)), 2):
        divergences = []
        for router in routers:
            profiles = []
            for label in (one, two):
                chosen = [
                    e for name, row in zip(of_token, router.experts.tolist(), strict=True) for e in row if name == label
                ]
                profiles.append([chosen.count(e) / len(chosen) for e in range(router.n_experts)])
            total = 0.0
            for p, q in zip(*profiles, strict=True):
                middle = (p + q) / 2
                total += sum(x / 2 * math.log2(x / middle) for x in (p, q) if x > 0)
            divergences.append(total)
        expected = math.sqrt(max(sum(divergences) / len(divergences), 0))
        assert frame.loc[(one, two), "value"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_height_of_a_group_is_its_linkage(plant: Plant, planted: ModuleType, linkage: str) -> None:
    generator = np.random.default_rng(5)
    experts = np.concatenate([generator.choice(5, size=(30, 1), p=p) for p in generator.dirichlet(np.ones(5), size=3)])
    run = plant(lengths=[30] * 3, labels=["a", "b", "c"], routers=[planted.Router(experts, 5)])
    frame = analyze(run, "label_distance", linkage=linkage).df()
    near, *far = sorted(_pairs(frame)["value"])
    height = {"average": sum(far) / 2, "complete": max(far), "single": min(far)}[linkage]
    assert frame.query("metric == @SUPPORT")["height"].tolist() == pytest.approx([near, height])
    assert frame.query("metric == @SUPPORT")["value"].isna().all()  # one document a label: nothing to resample
