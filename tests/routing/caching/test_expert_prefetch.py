"""The analysis `expert_prefetch`: predictors counted by hand, an LRU cache with prefetching kept in a list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.caching.expert_prefetch import _replay
from moescope.routing.caching.predictors import predicted_experts
from moescope.routing.caching.streams import Sequences, Stream, layer_streams
from moescope.routing.trace import read_trace
from moescope.store.run import Run

Plant = Callable[..., Run]


def by_list(guesses: list[list[int]], tokens: list[list[int]], size: int) -> tuple[int, int]:
    """Hits, and experts brought in by prefetching, with one LRU cache kept as a list, the last used at its end."""
    cache: list[int] = []
    hits = fetched = 0
    for guess, token in zip(guesses, tokens, strict=True):
        fetched += sum(expert not in cache for expert in guess)
        for expert in guess:
            cache = [other for other in cache if other != expert][-(size - 1) :] if size > 1 else []
            cache.append(expert)
        hits += sum(expert in cache for expert in token)
        for expert in token:
            cache = [other for other in cache if other != expert][-(size - 1) :] if size > 1 else []
            cache.append(expert)
    return hits, fetched


@given(
    seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), width=st.integers(0, 4)
)
def test_prefetching_cache_is_what_a_list_would_do(seed: int, lengths: list[int], width: int) -> None:
    generator, total = np.random.default_rng(seed), sum(lengths)
    ids = np.argsort(generator.random((total, 7)) * np.arange(1, 8), axis=1)[:, :2].astype(np.uint16)
    guess = np.argsort(generator.random((total, 7)), axis=1)[:, :width].astype(np.uint16)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    sequences = Sequences(starts, np.arange(len(lengths)), len(lengths))
    found = _replay(Stream(0, "mlp", 7, ids, np.array([0, 2])), guess, sequences)
    for row, (begin, end) in enumerate(pairwise(starts)):
        expected = [by_list(guess[begin:end].tolist(), ids[begin:end].tolist(), size) for size in range(1, 8)]
        assert found.hits[row].tolist() == [hits for hits, _ in expected]
        assert found.fetched[row].tolist() == [fetched for _, fetched in expected]
        right = sum(e in g for g, t in zip(guess[begin:end].tolist(), ids[begin:end].tolist(), strict=True) for e in t)
        assert found.foreseen[row] == right


@pytest.mark.parametrize("predictor", ["token", "previous_layer", "popularity"])
def test_predictors_expect_what_counting_by_hand_gives(plant: Plant, planted: ModuleType, predictor: Any) -> None:
    generator = np.random.default_rng(3)
    first = np.argsort(generator.random((60, 5)), axis=1)[:, :2]
    second = np.argsort(generator.random((60, 6)) * [1, 2, 3, 1, 2, 3], axis=1)[:, :3]
    routers = [planted.Router(first, 5, layer=0), planted.Router(second, 6, layer=1)]
    trace = read_trace(plant(lengths=[30, 30], routers=routers, ids=generator.integers(0, 4, 60).tolist()))
    seen, asked = np.arange(30), np.arange(30, 60)
    guess = predicted_experts(
        trace, layer_streams(trace), 1, predictor=predictor, calibration=seen, evaluation=asked, width=2
    )
    popular = Counter(second[:30].ravel().tolist())
    for row, token in zip(guess.tolist(), asked.tolist(), strict=True):
        score = {expert: 1e-6 * popular[expert] / 90 for expert in range(6)}
        keys = {"token": [trace.token_id], "previous_layer": list(first.T), "popularity": []}[predictor]
        for column in keys:
            here = Counter()
            for t in seen.tolist():
                known = [trace.token_id[t]] if predictor == "token" else first[t].tolist()
                here.update(second[t].tolist() * known.count(column[token]))
            for expert, count in here.items():
                score[expert] += count / here.total()
        best = sorted(score.values(), reverse=True)
        assert [score[expert] for expert in row] == pytest.approx([best[1], best[0]], abs=1e-6)


def test_token_lookup_router_is_foreseen_from_token_ids(plant: Plant, planted: ModuleType) -> None:
    """Each of 50 token ids chooses its own two experts: every choice is foreseen, and a cache of k serves it."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 50, 1200)
    lookup = np.argsort(generator.random((50, 16)), axis=1)[:, :2]
    run = plant(lengths=[60] * 20, ids=ids.tolist(), routers=[planted.Router(lookup[ids], 16)])
    result = analyze(run, "expert_prefetch")
    frame = result.df()
    whole = frame[frame["layer"].isna()]
    recall = whole[whole["metric"] == "recall"].set_index("predictor")
    assert recall["value"]["token"] == 1.0
    assert set(recall["null"]) == {2 / 16}
    served = whole[(whole["metric"] == "hit rate") & (whole["size"] == 2)].set_index("predictor")
    assert served["value"]["token"] == 1.0
    assert served["on_demand"]["token"] == 0.0
    assert served["prefetched"]["token"] == pytest.approx(served["on_demand"]["none"], abs=0.1)
    assert "token-id table (recall 100%)" in result.title


def test_first_layer_has_no_layer_before_and_takes_the_popular(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(1)
    first = np.argsort(generator.random((400, 8)), axis=1)[:, :2]
    routers = [planted.Router(first, 8, layer=0), planted.Router((first + 3) % 8, 8, layer=1)]
    run = plant(lengths=[40] * 10, routers=routers)
    frame = analyze(run, "expert_prefetch").df()
    recall = frame[frame["metric"] == "recall"].set_index(["predictor", "layer"])["value"]
    assert recall["previous_layer", 0] == recall["popularity", 0]
    assert recall["previous_layer", 1] == 1.0
    assert recall["popularity", 1] == pytest.approx(2 / 8, abs=0.1)


def test_layers_that_differ_and_bytes(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(2)
    routers = [
        planted.Router(generator.integers(0, 3, (40, 1)), 3, layer=0),
        planted.Router(np.argsort(generator.random((40, 9)), axis=1)[:, :4], 9, layer=1),
    ]
    frame = analyze(plant(lengths=[10] * 4, routers=routers), "expert_prefetch", expert_bytes=10).df()
    rates = frame[frame["metric"] == "hit rate"]
    assert rates["bytes"].tolist() == pytest.approx((10 * (rates["prefetched"] + rates["on_demand"])).tolist())
    assert set(rates[rates["layer"] == 0]["size"]) == {3}
    assert set(rates[rates["layer"] == 1]["size"]) == set(range(4, 10))


def test_what_is_missing_is_refused_or_left_out(plant: Plant, planted: ModuleType) -> None:
    chosen = np.random.default_rng(0).integers(0, 4, (20, 1))
    with pytest.raises(InputError, match="at least two documents"):
        analyze(plant(lengths=[20], routers=[planted.Router(chosen, 4)]), "expert_prefetch")
    run = plant(lengths=[10, 10], ids=[-1] * 20, routers=[planted.Router(chosen, 4)])
    with pytest.raises(InputError, match="no token ids"):
        analyze(run, "expert_prefetch", predictor="token")
    result = analyze(run, "expert_prefetch")
    assert set(result.df()["predictor"]) == {"none", "previous_layer", "popularity"}
    assert any("no token ids" in note for note in result.notes)
