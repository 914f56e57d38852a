"""Specialization: exclusive experts are found with closed-form shares, shuffled labels give none, p and q are what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
DOMAINS = ("code", "french", "law", "perl")


def _documents(per_label: int, length: int) -> tuple[list[int], list[str]]:
    labels = [label for label in DOMAINS for _ in range(per_label)]
    return [length] * len(labels), labels


def _exclusive(labels: Sequence[str], length: int) -> NDArray[np.int64]:
    """Two experts for each domain, and every token of the domain takes both."""
    return np.repeat([[2 * DOMAINS.index(label), 2 * DOMAINS.index(label) + 1] for label in labels], length, axis=0)


def _keyed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_index(["layer", "block", "label", "expert"]).sort_index()


def test_exclusive_experts_have_share_1_inside_and_0_outside(plant: Plant, planted: ModuleType) -> None:
    lengths, labels = _documents(6, 5)
    run = plant(lengths=lengths, labels=labels, routers=[planted.Router(_exclusive(labels, 5), 8)])
    result = analyze(run, "specialization")
    for row in result.df().itertuples():
        inside = row.expert // 2 == DOMAINS.index(row.label)
        assert row.value == (1.0 if inside else 0.0)
        assert row.lift == (4.0 if inside else 0.0)  # one over its overall share, a quarter
        assert row.n == 30
        if inside:
            assert row.p == pytest.approx(1 / 201)
            assert row.q < 0.05
            assert (row.ci_low, row.ci_high) == (1.0, 1.0)
            assert 0.15 < row.null < 0.35  # shuffled labels: the overall share
    assert "8 of 32 expert–label pairs are specialized" in result.title
    assert "takes 100%" in result.title
    assert "4.0× its overall share" in result.title


def test_layers_are_told_apart(plant: Plant, planted: ModuleType) -> None:
    lengths, labels = _documents(6, 4)
    blind = np.tile([0, 1], (len(labels) * 4, 1))
    routers = [planted.Router(blind, 8, layer=0), planted.Router(_exclusive(labels, 4), 8, layer=2, block="attn")]
    frame = analyze(plant(lengths=lengths, labels=labels, routers=routers), "specialization", permutations=400).df()
    found = frame[(frame["q"] < 0.05) & (frame["lift"] > 1)]
    assert set(zip(found["layer"], found["block"], strict=True)) == {(2, "attn")}
    assert len(found) == 8


def test_share_is_of_tokens_so_long_documents_count_more(plant: Plant, planted: ModuleType) -> None:
    experts = np.array([[0]] * 6 + [[1]] * 2 + [[1]] * 8)
    run = plant(lengths=[6, 2, 8], labels=["a", "a", "b"], routers=[planted.Router(experts, 2)])
    frame = _keyed(analyze(run, "specialization").df())
    assert frame.loc[(0, "mlp", "a", 0), "value"] == pytest.approx(6 / 8)
    assert frame.loc[(0, "mlp", "a", 0), "lift"] == pytest.approx((6 / 8) / (6 / 16))


def test_documents_without_label_take_no_part(plant: Plant, planted: ModuleType) -> None:
    experts = np.array([[0]] * 4 + [[1]] * 4 + [[2]] * 100)
    run = plant(lengths=[4, 4, 100], labels=["a", "b", None], routers=[planted.Router(experts, 4)])
    result = analyze(run, "specialization")
    frame = _keyed(result.df())
    assert result.n == 8
    assert frame.loc[(0, "mlp", "a", 0), "lift"] == pytest.approx(2.0)
    assert frame.loc[(0, "mlp", "a", 2), "value"] == 0.0


def test_expert_nobody_chose_has_lift_1_and_is_no_discovery(plant: Plant, planted: ModuleType) -> None:
    lengths, labels = _documents(6, 4)
    run = plant(lengths=lengths, labels=labels, routers=[planted.Router(_exclusive(labels, 4), 10)])
    unused = analyze(run, "specialization").df().query("expert >= 8")
    assert len(unused) == 8
    assert unused["lift"].tolist() == [1.0] * 8
    assert unused["p"].tolist() == [1.0] * 8


def test_random_labels_give_about_no_discoveries(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(5)
    with_discoveries = 0
    for seed in range(20):
        preference = generator.dirichlet(np.full(8, 0.5), size=24)  # documents differ, labels do not
        experts = np.concatenate([generator.choice(8, size=(10, 1), p=p) for p in preference])
        labels = generator.permutation([label for label in DOMAINS for _ in range(6)]).tolist()
        run = plant(lengths=[10] * 24, labels=labels, routers=[planted.Router(experts, 8)])
        frame = analyze(run, "specialization", permutations=400, draws=20, seed=seed).df()
        with_discoveries += bool(((frame["q"] < 0.05) & (frame["lift"] > 1)).any())
    # At 5 % a seed, 5 or more of 20 happen once in 390 times.
    assert with_discoveries <= 4


def test_p_agrees_with_every_permutation_counted(plant: Plant, planted: ModuleType) -> None:
    lengths, labels = [2, 3, 4, 3, 2, 5], ["a", "a", "a", "b", "b", "b"]
    experts = np.random.default_rng(11).integers(0, 3, (sum(lengths), 1))
    run = plant(lengths=lengths, labels=labels, routers=[planted.Router(experts, 3)])
    frame = _keyed(analyze(run, "specialization", permutations=4000).df())
    document = np.repeat(np.arange(6), lengths)

    def share(assigned: Sequence[str], label: str, expert: int) -> float:
        mine = np.isin(document, [d for d in range(6) if assigned[d] == label])
        return float((experts[mine, 0] == expert).mean())

    every = list(permutations(labels))
    for label in ("a", "b"):
        for expert in range(3):
            row = frame.loc[(0, "mlp", label, expert)]
            observed = share(labels, label, expert)
            shuffled = np.array([share(shuffle, label, expert) for shuffle in every])
            exact = (shuffled >= observed - 1e-12).mean()
            assert row["p"] == pytest.approx(exact, abs=4 * np.sqrt(max(exact * (1 - exact), 0.01) / 4000))
            assert row["null"] == pytest.approx(shuffled.mean(), abs=5 * shuffled.std() / np.sqrt(4000) + 1e-9)
            assert row["value"] == pytest.approx(observed)


def test_q_is_the_smallest_rate_at_which_the_pair_is_called(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(3)
    experts = generator.integers(0, 6, (60, 1))
    experts[:10] = 0
    run = plant(lengths=[5] * 12, labels=["a", "b", "c"] * 4, routers=[planted.Router(experts, 6)])
    frame = analyze(run, "specialization").df()
    p = sorted(frame["p"])
    for row in frame.itertuples():
        larger = [(rank, value) for rank, value in enumerate(p, start=1) if value >= row.p]
        assert row.q == pytest.approx(min([1.0, *(value * len(p) / rank for rank, value in larger)]))


@given(data=st.data())
@settings(max_examples=15)
def test_shares_and_lifts_equal_a_count_over_decisions(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=6))
    rest = data.draw(
        st.lists(st.sampled_from(["x", "y", "z", None]), min_size=len(lengths) - 2, max_size=len(lengths) - 2)
    )
    labels = ["x", "y", *rest]
    pair = st.permutations(range(4)).map(lambda order: order[:2])
    experts = np.array(data.draw(st.lists(pair, min_size=sum(lengths), max_size=sum(lengths))))
    run = plant(lengths=lengths, labels=labels, routers=[planted.Router(experts, 4)])
    frame = _keyed(analyze(run, "specialization", permutations=5, draws=5).df())
    of_token = [label for label, length in zip(labels, lengths, strict=True) for _ in range(length)]
    labelled = [set(chosen) for chosen, label in zip(experts.tolist(), of_token, strict=True) if label is not None]
    for label in {label for label in labels if label is not None}:
        mine = [set(chosen) for chosen, name in zip(experts.tolist(), of_token, strict=True) if name == label]
        for expert in range(4):
            row = frame.loc[(0, "mlp", label, expert)]
            share = sum(expert in chosen for chosen in mine) / len(mine)
            overall = sum(expert in chosen for chosen in labelled) / len(labelled)
            assert row["value"] == pytest.approx(share)
            assert row["lift"] == pytest.approx(share / overall if overall else 1.0)
            assert row["n"] == len(mine)


@pytest.mark.parametrize("labels", [["only", "only", None], [None, None, None]])
def test_fewer_than_two_labels_are_refused(plant: Plant, planted: ModuleType, labels: list[str | None]) -> None:
    run = plant(lengths=[2, 2, 2], labels=labels, routers=[planted.Router(np.zeros((6, 1), int), 2)])
    with pytest.raises(InputError, match="fewer than two labels"):
        analyze(run, "specialization")
