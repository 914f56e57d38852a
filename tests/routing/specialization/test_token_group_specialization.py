"""Specialization by class and position: closed-form shares and nulls, p of signs, documents told from classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.store.run import Run

Plant = Callable[..., Run]


def _keyed(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    return frame.set_index(["layer", kind, "expert"])


def test_expert_of_a_class_takes_all_of_it(plant: Plant, planted: ModuleType) -> None:
    classes = ["word", "word", "digit", "space"] * 40
    experts = np.array([{"word": 0, "digit": 1, "space": 2}[name] for name in classes])[:, None]
    run = plant(lengths=[16] * 10, classes=classes, routers=[planted.Router(experts, 4)])
    result = analyze(run, "class_specialization")
    frame = _keyed(result.df(), "class")
    row = frame.loc[(0, "digit", 1)]
    assert (row["value"], row["ci_low"], row["ci_high"]) == (1.0, 1.0, 1.0)
    assert row["null"] == pytest.approx(0.25)
    assert row["over_null"] == pytest.approx(4.0)
    assert row["p"] == pytest.approx(0.5**10)  # ten documents, all on the same side
    assert row["q"] < 0.05
    assert frame.loc[(0, "digit", 0), "value"] == 0.0
    assert (frame.loc[(0, "word", 3), "over_null"], frame.loc[(0, "word", 3), "p"]) == (1.0, 1.0)  # never chosen
    assert result.title.startswith("3 of 12 expert–class pairs are specialized")


def test_a_class_is_not_credited_with_its_documents(plant: Plant, planted: ModuleType) -> None:
    """Digits stand in documents about one expert, but inside of each document the class decides nothing."""
    classes = (["digit"] * 8 + ["word"] * 2) * 10 + (["digit"] * 2 + ["word"] * 8) * 10
    experts = np.repeat([[0], [1]], 100, axis=0)
    run = plant(lengths=[10] * 20, classes=classes, routers=[planted.Router(experts, 2)])
    frame = _keyed(analyze(run, "class_specialization").df(), "class")
    row = frame.loc[(0, "digit", 0)]
    assert row["value"] == pytest.approx(0.8)
    assert row["null"] == pytest.approx(0.8)
    assert row["p"] == 1.0


def test_positions_are_grouped_by_powers_of_two(plant: Plant, planted: ModuleType) -> None:
    position = np.tile(np.arange(9), 8)
    run = plant(lengths=[9] * 8, routers=[planted.Router((position == 0).astype(int)[:, None], 2)])
    result = analyze(run, "position_specialization")
    frame = _keyed(result.df(), "position")
    assert set(result.df()["position"]) == {"0", "1", "2–3", "4–7", "8–15"}
    first = frame.loc[(0, "0", 1)]
    assert (first["value"], first["n"]) == (1.0, 8)
    assert first["null"] == pytest.approx(1 / 9)
    assert frame.loc[(0, "4–7", 1), "value"] == 0.0
    assert frame.loc[(0, "4–7", 1), "n"] == 32
    assert list(result.figure().data[0].y) == ["0", "1", "2–3", "4–7", "8–15"]


@given(data=st.data())
def test_shares_nulls_and_p_equal_counts_by_hand(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=6))
    documents = sorted(data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))))
    total = sum(lengths)
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    classes = generator.choice(["word", "digit", "space"], total).tolist()
    shapes = data.draw(st.sampled_from([((3, 1),), ((4, 2), (6, 3)), ((256, 8),)]))
    routers = [
        planted.Router(np.stack([generator.permutation(e)[:k] for _ in range(total)]), e, layer=layer)
        for layer, (e, k) in enumerate(shapes)
    ]
    run = plant(lengths=lengths, documents=documents, classes=classes, routers=routers)
    frame = _keyed(analyze(run, "class_specialization", draws=5).df(), "class")
    document = [d for d, length in zip(documents, lengths, strict=True) for _ in range(length)]
    for router in routers:
        chosen = router.experts.tolist()
        for name in set(classes):
            mine = [t for t in range(total) if classes[t] == name]
            for expert in range(min(router.n_experts, 8)):
                difference = []
                expected = 0.0
                for d in set(document):
                    there = [t for t in range(total) if document[t] == d]
                    inside = [t for t in there if classes[t] == name]
                    by_chance = len(inside) * sum(expert in chosen[t] for t in there) / len(there)
                    expected += by_chance
                    difference.append(sum(expert in chosen[t] for t in inside) - by_chance)
                row = frame.loc[(router.layer, name, expert)]
                assert row["value"] == pytest.approx(sum(expert in chosen[t] for t in mine) / len(mine))
                assert row["null"] == pytest.approx(expected / len(mine), abs=1e-12)
                assert row["n"] == len(mine)
                moving = [d for d in difference if abs(d) > 1e-9]
                if moving:
                    z = sum(moving) / math.sqrt(sum(d * d for d in moving))
                    tail = max(math.erfc(z / math.sqrt(2)) / 2, 0.5 ** len(moving))
                    assert row["p"] == pytest.approx(tail)
                else:
                    assert row["p"] == 1.0


def test_p_is_near_that_of_every_sign_counted(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(5)
    experts = generator.integers(0, 2, (12 * 10, 1))
    classes = generator.choice(["word", "digit"], 120).tolist()
    run = plant(lengths=[10] * 12, classes=classes, routers=[planted.Router(experts, 2)])
    row = _keyed(analyze(run, "class_specialization").df(), "class").loc[(0, "digit", 1)]
    digit, hit = (np.array(classes) == "digit").reshape(12, 10), (experts[:, 0] == 1).reshape(12, 10)
    difference = (digit & hit).sum(1) - digit.sum(1) * hit.mean(1)
    every = np.array(list(product([-1, 1], repeat=12))) @ difference
    assert row["p"] == pytest.approx((every >= difference.sum() - 1e-9).mean(), abs=0.05)


def test_classes_that_mean_nothing_are_rarely_called(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(6)
    called = 0
    for _ in range(15):
        taste = generator.dirichlet(np.full(6, 0.5), size=30)
        experts = np.concatenate([generator.choice(6, size=(12, 1), p=p) for p in taste])
        classes = generator.choice(["word", "digit", "space"], 360).tolist()
        run = plant(lengths=[12] * 30, classes=classes, routers=[planted.Router(experts, 6)])
        frame = analyze(run, "class_specialization", draws=5).df()
        called += bool(((frame["q"] < 0.05) & (frame["over_null"] > 1)).any())
    assert called <= 4


def test_one_class_and_one_document_are_answered_not_refused(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[5], routers=[planted.Router(np.array([[0], [1], [0], [1], [1]]), 2)])
    frame = analyze(run, "class_specialization").df()
    assert sorted(frame["value"]) == pytest.approx([0.4, 0.6])
    assert frame["over_null"].tolist() == [1.0, 1.0]
    assert frame["p"].tolist() == [1.0, 1.0]
    assert frame["ci_low"].isna().all()
