"""Local consistency against its definition, window by window and pair by pair, on small random traces."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.statistics import document_weights
from moescope.routing.consistency.segment_performance import basic_interval
from moescope.store.run import Run

Plant = Callable[..., Run]
Chosen = list[list[int]]


@st.composite
def traces(draw: st.DrawFn) -> dict[str, Any]:
    """Sequences, labels and routers of different E and k."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    routers = []
    for _ in range(draw(st.integers(1, 3))):
        n_experts = draw(st.sampled_from([1, 2, 3, 5, 256]))
        top_k = draw(st.integers(1, min(n_experts, 3)))
        few = st.lists(st.integers(0, n_experts - 1), min_size=top_k, max_size=top_k, unique=True)
        routers.append((draw(st.lists(few, min_size=sum(lengths), max_size=sum(lengths))), n_experts))
    return {
        "lengths": lengths,
        "labels": [draw(st.sampled_from(["a", "b", None])) for _ in lengths],
        "documents": sorted(draw(st.integers(0, 2)) for _ in lengths),
        "routers": routers,
        "segment": draw(st.integers(1, max(lengths))),
    }


def _planted(plant: Plant, planted: ModuleType, drawn: dict[str, Any]) -> Run:
    routers = [planted.Router(np.array(c), n, layer=i) for i, (c, n) in enumerate(drawn["routers"])]
    fields = {key: drawn[key] for key in ("lengths", "labels", "documents")}
    return plant(routers=routers, **fields)


def _windows(drawn: dict[str, Any], label: str | None = None) -> list[range]:
    """Tokens of every window; those of one label's sequences where one is asked for."""
    begins = np.cumsum([0, *drawn["lengths"]]).tolist()
    m = drawn["segment"]
    return [
        range(first, first + m)
        for (begin, end), mine in zip(pairwise(begins), drawn["labels"], strict=True)
        if label is None or mine == label
        for first in range(begin, end - m + 1)
    ]


def _best(windows: list[range], routers: list[tuple[Chosen, list[int]]]) -> tuple[float, float, int] | None:
    """SRP, ρ̂ and θ, counting (token, expert) pairs one by one; `routers`: what tokens choose, and experts looked at."""
    m = len(windows[0])
    best = None
    for threshold in range(m + 1):
        right = predicted = chosen = 0
        for window in windows:
            for decisions, experts in routers:
                for expert in experts:
                    times = sum(expert in decisions[token] for token in window)
                    chosen += times
                    if times >= threshold:
                        right += times
                        predicted += m
        if chosen == 0:
            return None
        f1 = Fraction(2 * right, predicted + chosen)
        if best is None or f1 > best[0]:
            best = (f1, Fraction(predicted, chosen), threshold)
    assert best is not None
    return float(best[0]), float(best[1]), best[2]


def _found(run: Run, pool: str, segment: int) -> list[tuple[float, float, float]]:
    frame = analyze(run, "local_consistency", pool=pool, segment=segment, draws=3, shuffles=1).df()
    columns = [frame.loc[frame["metric"] == name, "value"] for name in ("SRP", "relative size", "threshold")]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _same(found: tuple[float, ...], expected: tuple[float, ...] | None) -> bool:
    return found == pytest.approx([np.nan] * 3 if expected is None else list(expected), nan_ok=True)


@given(drawn=traces())
def test_model_layers_and_experts_follow_the_definition(plant: Plant, planted: ModuleType, drawn: Any) -> None:
    run, windows = _planted(plant, planted, drawn), _windows(drawn)
    everything = [(chosen, list(range(n))) for chosen, n in drawn["routers"]]
    assert _same(*_found(run, "model", drawn["segment"]), _best(windows, everything))
    for found, router in zip(_found(run, "layer", drawn["segment"]), everything, strict=True):
        assert _same(found, _best(windows, [router]))
    single = [(chosen, [expert]) for chosen, experts in everything for expert in experts]
    for found, router in zip(_found(run, "expert", drawn["segment"]), single, strict=True):
        assert _same(found, _best(windows, [router]))


@given(drawn=traces())
def test_labels_follow_the_definition(plant: Plant, planted: ModuleType, drawn: Any) -> None:
    labels = sorted({name for name in drawn["labels"] if name and _windows(drawn, name)})
    if not labels:
        return
    found = _found(_planted(plant, planted, drawn), "label", drawn["segment"])
    everything = [(chosen, list(range(n))) for chosen, n in drawn["routers"]]
    for one, label in zip(found, labels, strict=True):
        assert _same(one, _best(_windows(drawn, label), everything))


@given(
    counts=st.lists(
        st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=2, max_size=2), min_size=2, max_size=6
    ),
    draws=st.integers(1, 60),
)
def test_interval_is_the_reverse_bootstrap_over_documents(counts: Any, draws: int) -> None:
    histograms = np.array(counts)
    documents = histograms[histograms.sum((1, 2)) > 0]
    low, high = basic_interval(histograms, draws=draws, seed=7)
    if len(documents) < 2:
        assert np.isnan(low).all()
        return
    weights = document_weights(len(documents), draws=draws, seed=7)
    for group in range(2):
        values = []
        for weight in weights:
            total = sum(int(w) * documents[i, group] for i, w in enumerate(weight))
            values.append(_f1_of(total))
        values.sort()
        middle, tail = _f1_of(documents[:, group].sum(0)), round(draws * 0.025)
        if documents[:, group, 1:].sum() == 0:
            assert np.isnan(low[group])
            continue
        assert low[group] == pytest.approx(2 * middle - values[min(draws - tail, draws - 1)])
        assert high[group] == pytest.approx(2 * middle - values[tail])


def _f1_of(histogram: Any) -> float:
    """Best F1 of [m + 1] pairs."""
    m, best = len(histogram) - 1, 0.0
    chosen = sum(count * int(pairs) for count, pairs in enumerate(histogram))
    for threshold in range(m + 1):
        right = sum(count * int(pairs) for count, pairs in enumerate(histogram) if count >= threshold)
        predicted = sum(m * int(pairs) for count, pairs in enumerate(histogram) if count >= threshold)
        if predicted + chosen:
            best = max(best, 2 * right / (predicted + chosen))
    return best


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("srp_in_numpy", Path(__file__).parent / "numpy_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_numpy_version_agrees(plant: Plant, planted: ModuleType, reference: ModuleType) -> None:
    generator = np.random.default_rng(5)
    lengths = [70, 3, 64, 1, 20]
    starts = np.cumsum([0, *lengths])
    chosen = [generator.random((158, n)).argsort(axis=1)[:, :k] for n, k in ((16, 3), (256, 2))]
    routers = [(ids, n) for ids, n in zip(chosen, (16, 256), strict=True)]
    run = plant(lengths=lengths, routers=[planted.Router(c, n, layer=i) for i, (c, n) in enumerate(routers)])
    frame = analyze(run, "local_consistency", segments="4,16,64", draws=3, shuffles=0).df()
    expected = reference.srp(routers, starts, (4, 16, 64))
    rows = frame[frame["metric"] == "SRP"].set_index("segment")["value"]
    assert rows.to_dict() == pytest.approx(expected)
