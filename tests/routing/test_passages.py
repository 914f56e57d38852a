"""Passages: windows of equal length ranked by mean NLL, with their text and their busiest experts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
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


def _kind(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    return frame[frame["kind"] == f"{kind} predicted"]


def test_planted_windows_come_first_at_each_end(plant: Plant) -> None:
    nll = np.full(32, 2.0)
    nll[8:12], nll[20:24] = 9.0, 0.25
    run = plant(lengths=[16, 16], labels=["hard", "easy"], nll=nll)
    result = analyze(run, "passages", length=4, top=2)
    worst, best = (_kind(result.df(), kind).iloc[0] for kind in ("worst", "best"))
    assert (worst["sequence_id"], worst["position"], worst["value"], worst["label"]) == (0, 8, 9.0, "hard")
    assert (best["sequence_id"], best["position"], best["value"], best["label"]) == (1, 4, 0.25, "easy")
    assert result.n == 8
    assert "worst predicted 4 tokens cost 9.00 nats each (hard), the best 0.25 (easy)" in result.title


def test_text_joins_characters_that_are_spread_over_tokens(plant: Plant) -> None:
    euro = "€".encode()
    vocabulary = {1: b"price ", 2: euro[:1], 3: euro[1:2], 4: euro[2:], 5: b" <b>&", 6: euro[1:]}
    nll = np.array([0, 1, 1, 1, 1, 1, 5, 5, 5, 5.0])
    run = plant(lengths=[5, 5], ids=[1, 2, 3, 4, 5, 6, 2, 9, 5, 1], vocabulary=vocabulary, nll=nll)
    frame = analyze(run, "passages", length=5).df()
    assert _kind(frame, "best").iloc[0]["text"] == "price € <b>&"
    broken = _kind(frame, "worst").iloc[0]["text"]
    assert broken.endswith("[9] <b>&price ")
    assert "\ufffd" in broken


def test_routing_names_the_expert_most_tokens_chose_with_its_share(plant: Plant, planted: ModuleType) -> None:
    first = np.array([[3, 1], [3, 2], [1, 3], [2, 0]])  # expert 3 in three of four tokens
    second = np.array([[5], [4], [5], [4]])  # a tie: the lower id
    routers = [planted.Router(first, 8, layer=0), planted.Router(second, 8, layer=2, block="attn")]
    frame = analyze(plant(lengths=[4], routers=routers), "passages", length=4).df()
    assert frame["routing"][0] == "L0·E3 75%  L2 attn·E4 50%"


def test_share_is_of_the_windows_own_tokens(plant: Plant, planted: ModuleType) -> None:
    experts = np.array([[0]] * 4 + [[1]] * 4)
    nll = np.array([0, 1, 1, 1, 5, 5, 5, 5.0])
    frame = analyze(plant(lengths=[8], nll=nll, routers=[planted.Router(experts, 2)]), "passages", length=4).df()
    assert _kind(frame, "worst")["routing"].tolist() == ["L0·E1 100%"]
    assert _kind(frame, "best")["routing"].tolist() == ["L0·E0 100%"]


def test_dense_run_has_passages_without_routing(plant: Plant) -> None:
    frame = analyze(plant(lengths=[8]), "passages", length=4).df()
    assert frame["routing"].isna().all()
    assert len(frame) == 2


def test_tail_shorter_than_a_window_is_left_out(plant: Plant) -> None:
    nll = np.array([1, 1, 1, 1, 99, 99.0])
    frame = analyze(plant(lengths=[6], nll=nll), "passages", length=4).df()
    assert frame["value"].tolist() == [1.0, 1.0]
    assert frame["n"].tolist() == [3, 3]


def test_no_passage_is_both_best_and_worst_where_there_are_two(plant: Plant) -> None:
    nll = np.repeat(np.arange(5.0), 4)
    frame = analyze(plant(lengths=[4] * 5, nll=nll), "passages", length=4, top=6).df()
    assert _kind(frame, "worst")["sequence_id"].tolist() == [4, 3]
    assert _kind(frame, "best")["sequence_id"].tolist() == [0, 1]


def test_windows_in_which_nothing_was_predicted_are_not_ranked(plant: Plant) -> None:
    nll = np.array([0, 0, 0, 0, 0, 2.0])
    frame = analyze(plant(lengths=[1, 1, 1, 1, 2], nll=nll), "passages", length=1, top=6).df()
    assert not frame["value"].isna().any()
    assert set(frame["value"]) == {2.0}


def test_texts_shorter_than_a_window_are_refused_with_the_way_out(plant: Plant) -> None:
    with pytest.raises(InputError, match="no passage of 32 tokens") as refused:
        analyze(plant(lengths=[5, 7]), "passages")
    assert "smaller length" in str(refused.value)


@given(data=st.data())
def test_ranking_equals_cutting_and_sorting(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(2, 9), min_size=2, max_size=5))
    length, top = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    tokens = sum(lengths)
    nll = np.array(data.draw(st.lists(st.integers(0, 40), min_size=tokens, max_size=tokens)), float) / 8
    pair = st.permutations(range(4)).map(lambda order: order[:2])
    experts = np.array(data.draw(st.lists(pair, min_size=tokens, max_size=tokens)))
    windows = []
    start = 0
    for sequence, size in enumerate(lengths):
        for first in range(0, size - length + 1, length):
            values = [nll[start + p] for p in range(first, first + length) if p > 0]
            chosen = Counter(e for p in range(first, first + length) for e in experts[start + p].tolist())
            expert, times = min(chosen.items(), key=lambda item: (-item[1], item[0]))
            routing = f"L0·E{expert} {times / length:.0%}"
            windows.append((math.fsum(values) / len(values), start + first, sequence, first, len(values), routing))
        start += size
    run = plant(lengths=lengths, nll=nll, routers=[planted.Router(experts, 4)])
    if not windows:
        with pytest.raises(InputError):
            analyze(run, "passages", length=length, top=top)
        return
    frame = analyze(run, "passages", length=length, top=top).df()
    shown = min(top, max(1, len(windows) // 2))
    for kind, ordered in (("worst", sorted(windows, key=lambda w: (-w[0], w[1]))), ("best", sorted(windows))):
        found = list(_kind(frame, kind)[["value", "sequence_id", "position", "n", "routing"]].itertuples(index=False))
        assert len(found) == shown
        for row, (value, _, sequence, first, n, routing) in zip(found, ordered, strict=False):
            assert row.value == pytest.approx(value, abs=1e-6)
            assert (row.sequence_id, row.position, row.n, row.routing) == (sequence, first, n, routing)
