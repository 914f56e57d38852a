"""Mutual information: closed forms, counts by hand, the bias of independent routing, shuffles of the right unit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]


def _information(pairs: Sequence[tuple[Any, int]]) -> float:
    joint, left, right = Counter(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    n = len(pairs)
    return sum(c / n * math.log2(c * n / (left[a] * right[b])) for (a, b), c in joint.items())


def test_lookup_by_id_says_all_and_constant_routing_nothing(plant: Plant, planted: ModuleType) -> None:
    ids = np.tile(np.arange(8), 50)
    routers = [
        planted.Router(ids[:, None], 8, layer=0),
        planted.Router(np.tile([3, 5], (400, 1)), 8, layer=1),
    ]
    run = plant(lengths=[40] * 10, ids=ids.tolist(), labels=["a", "b"] * 5, routers=routers)
    frame = analyze(run, "routing_information").df().set_index(["given", "layer"])
    row = frame.loc[("token id", 0)]
    assert (row["value"], row["entropy"], row["share"]) == pytest.approx((3.0, 3.0, 1.0))
    assert row["null"] < 0.2
    for name in ("token id", "label", "class", "position"):
        assert frame.loc[(name, 1), "value"] == pytest.approx(0.0, abs=1e-12)
        assert frame.loc[(name, 1), "entropy"] == pytest.approx(1.0)
    # Sequences are whole rounds of the ids, so the label says nothing of them.
    assert frame.loc[("label", 0), "value"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("domains", [2, 4])
def test_exclusive_experts_carry_the_entropy_of_the_label(plant: Plant, planted: ModuleType, domains: int) -> None:
    own = np.repeat(np.arange(domains), 6 * 10)
    experts = np.stack([2 * own, 2 * own + 1], 1)
    labels = [f"d{number}" for number in range(domains) for _ in range(6)]
    run = plant(lengths=[10] * len(labels), labels=labels, routers=[planted.Router(experts, 2 * domains)])
    row = analyze(run, "routing_information", given="label").df().iloc[0]
    assert row["value"] == pytest.approx(math.log2(domains))
    assert row["null"] < row["value"] / 2


def test_uniform_routing_has_the_bias_of_its_sample_size(plant: Plant, planted: ModuleType) -> None:
    """I of independent uniform variables is about (E − 1)(L − 1) ÷ (2 N ln 2) bits."""
    generator = np.random.default_rng(0)
    size, n = 8, 4000
    routers = [planted.Router(generator.integers(0, size, (n, 1)), size, layer=layer) for layer in range(12)]
    ids = generator.integers(0, size, n)
    run = plant(lengths=[100] * 40, ids=ids.tolist(), routers=routers)
    frame = analyze(run, "routing_information", given="token id").df()
    bias = (size - 1) ** 2 / (2 * n * math.log(2))
    assert frame["bias"].tolist() == pytest.approx([bias] * 12)
    assert frame["value"].mean() == pytest.approx(bias, rel=0.25)
    assert frame["null"].mean() == pytest.approx(bias, rel=0.25)


@given(data=st.data())
def test_values_equal_a_count_over_decisions(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    labels = data.draw(st.lists(st.sampled_from(["x", "y", None]), min_size=len(lengths), max_size=len(lengths)))
    total = sum(lengths)
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    ids = generator.integers(0, 4, total).tolist()
    classes = generator.choice(["word", "digit"], total).tolist()
    shapes = data.draw(st.sampled_from([((3, 1),), ((4, 2), (6, 3)), ((256, 8),), ((1, 1),)]))
    routers = [
        planted.Router(np.stack([generator.permutation(e)[:k] for _ in range(total)]), e, layer=layer)
        for layer, (e, k) in enumerate(shapes)
    ]
    run = plant(lengths=lengths, labels=labels, ids=ids, classes=classes, routers=routers)
    frame = analyze(run, "routing_information", permutations=2, shuffles=1, draws=5).df().set_index(["given", "layer"])
    position = [p for length in lengths for p in range(length)]
    keys = {
        "label": [label for label, length in zip(labels, lengths, strict=True) for _ in range(length)],
        "token id": ids,
        "class": classes,
        "position": position,
        "id before it": [None if p == 0 else ids[t - 1] for t, p in enumerate(position)],
    }
    for name, of_token in keys.items():
        if all(key is None for key in of_token):
            assert name not in frame.index.get_level_values(0)
            continue
        for router in routers:
            pairs = [
                (key, expert)
                for key, chosen in zip(of_token, router.experts.tolist(), strict=True)
                if key is not None
                for expert in chosen
            ]
            row = frame.loc[(name, router.layer)]
            assert row["value"] == pytest.approx(max(_information(pairs), 0), abs=1e-9)
            assert row["n"] == len(pairs)
            assert row["ci_low"] <= row["value"] + 1e-9
            assert row["value"] <= row["ci_high"] + 1e-9


def test_labels_are_shuffled_over_documents_not_tokens(plant: Plant, planted: ModuleType) -> None:
    """Each document keeps to one expert of its own: labels look informative, but no more than any split of documents."""
    generator = np.random.default_rng(3)
    experts = np.repeat(np.arange(20), 30)[:, None]
    labels = generator.permutation(["a", "b"] * 10).tolist()
    run = plant(lengths=[30] * 20, labels=labels, routers=[planted.Router(experts, 20)])
    row = analyze(run, "routing_information", given="label").df().iloc[0]
    assert row["value"] == pytest.approx(1.0)
    assert row["null"] == pytest.approx(1.0)
    assert row["bias"] < 0.05  # the closed form counts tokens as independent


def test_interval_covers_the_spread_of_fresh_corpora(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(4)

    def draw() -> Run:
        taste = generator.dirichlet([8, 2, 2], size=40), generator.dirichlet([2, 2, 8], size=40)
        ids = generator.integers(0, 2, (40, 25))
        experts = [generator.choice(3, p=taste[i][d]) for d in range(40) for i in ids[d]]
        return plant(
            lengths=[25] * 40, ids=ids.ravel().tolist(), routers=[planted.Router(np.array(experts)[:, None], 3)]
        )

    rows = [analyze(draw(), "routing_information", given="token id", shuffles=1).df().iloc[0] for _ in range(25)]
    spread = np.std([row["value"] for row in rows])
    width = np.mean([row["ci_high"] - row["ci_low"] for row in rows])
    assert width / (2 * 1.96) == pytest.approx(spread, rel=0.4)


def test_x_that_the_run_lacks_is_named(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[3], routers=[planted.Router(np.zeros((3, 1), int), 2)])
    with pytest.raises(InputError, match=r"no label of any token.*--label-field"):
        analyze(run, "routing_information", given="label")
    assert "The run has no label of any token." in analyze(run, "routing_information").notes
