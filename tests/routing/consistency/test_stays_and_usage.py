"""Repetition, residency and window usage against their definitions, closed forms and planted routers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]
REAL = Path("/work/shared/data/deepseek_v2_lite_routing")
QUICK = {"draws": 3, "shuffles": 1}


def _values(run: Run, name: str, column: str = "value", **parameters: Any) -> dict[Any, float]:
    """Metric → value, or (metric, length or window) → value."""
    frame = analyze(run, name, **(QUICK | parameters)).df()
    extra = next((c for c in ("length", "window") if c in frame), None)
    keys = (
        frame["metric"]
        if extra is None
        else [m if pd.isna(x) else (m, int(x)) for m, x in zip(frame["metric"], frame[extra], strict=True)]
    )
    return dict(zip(keys, frame[column], strict=True))


@st.composite
def traces(draw: st.DrawFn) -> dict[str, Any]:
    """Sequences, labels, phases and routers of different E and k."""
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    routers = []
    for _ in range(draw(st.integers(1, 2))):
        n_experts = draw(st.sampled_from([1, 2, 4, 256]))
        top_k = draw(st.integers(1, min(n_experts, 3)))
        few = st.lists(st.integers(0, min(n_experts, 6) - 1), min_size=top_k, max_size=top_k, unique=True)
        routers.append((draw(st.lists(few, min_size=sum(lengths), max_size=sum(lengths))), n_experts))
    return {
        "lengths": lengths,
        "labels": [draw(st.sampled_from(["a", "b", None])) for _ in lengths],
        "documents": sorted(draw(st.integers(0, 2)) for _ in lengths),
        "decode": draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths))),
        "routers": routers,
    }


def _planted(plant: Plant, planted: ModuleType, drawn: dict[str, Any]) -> Run:
    routers = [planted.Router(np.array(c), n, layer=i) for i, (c, n) in enumerate(drawn["routers"])]
    return plant(routers=routers, **{key: drawn[key] for key in ("lengths", "labels", "documents", "decode")})


def _sequences(drawn: dict[str, Any]) -> list[range]:
    return [range(*ends) for ends in pairwise(np.cumsum([0, *drawn["lengths"]]).tolist())]


def _repeats(pairs: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    """The five measures over pairs of choices."""
    k = [len(later) for _, later in pairs]
    shared = [len(set(a) & set(b)) for a, b in pairs]
    return {
        "first choice repeated": sum(a[0] == b[0] for a, b in pairs) / len(pairs),
        "any expert shared": sum(s > 0 for s in shared) / len(pairs),
        "experts kept": sum(shared) / sum(k),
        "replacement rate": sum(len(set(b) - set(a)) for a, b in pairs) / sum(k),
        "Jaccard": sum(s / len(set(a) | set(b)) for s, (a, b) in zip(shared, pairs, strict=True)) / len(pairs),
    }


@given(drawn=traces(), lag=st.integers(1, 3))
def test_repetition_follows_the_definition(plant: Plant, planted: ModuleType, drawn: Any, lag: int) -> None:
    run = _planted(plant, planted, drawn)
    places = [(t - lag, t) for tokens in _sequences(drawn) for t in tokens if t - lag in tokens]
    if not places:
        with pytest.raises(InputError, match="lag"):
            analyze(run, "repetition", lag=lag)
        return
    pairs = [[(chosen[a], chosen[b]) for a, b in places] for chosen, _ in drawn["routers"]]
    model = _values(run, "repetition", by="model", lag=lag)
    assert model == pytest.approx(_repeats([pair for layer in pairs for pair in layer]))
    frame = analyze(run, "repetition", lag=lag, **QUICK).df()
    for number, layer in enumerate(pairs):
        rows = frame[frame["layer"] == number].set_index("metric")
        assert rows["value"].to_dict() == pytest.approx(_repeats(layer))
        assert set(rows["n"]) == {len(layer)}
    phases = analyze(run, "repetition", by="phase", lag=lag, **QUICK).df()
    for name, generated in (("prefill", False), ("decode", True)):
        mine = [(c[a], c[b]) for c, _ in drawn["routers"] for a, b in places if drawn["decode"][b] == generated]
        rows = phases[phases["phase"] == name].set_index("metric")["value"].to_dict()
        assert rows == (pytest.approx(_repeats(mine)) if mine else {})


def _runs(tokens: range, chosen: list[list[int]], n_experts: int) -> list[int]:
    lengths = []
    for expert in range(n_experts):
        length = 0
        for token in [*tokens, None]:
            if token is not None and expert in chosen[token]:
                length += 1
            elif length:
                lengths.append(length)
                length = 0
    return lengths


@given(drawn=traces())
def test_residency_follows_the_definition(plant: Plant, planted: ModuleType, drawn: Any) -> None:
    run, frames = _planted(plant, planted, drawn), {}
    frames["layer"] = analyze(run, "residency", lengths="2,3,5", **QUICK).df()
    for number, (chosen, n_experts) in enumerate(drawn["routers"]):
        runs = [length for tokens in _sequences(drawn) for length in _runs(tokens, chosen, n_experts)]
        rows = frames["layer"][frames["layer"]["layer"] == number]
        stay = rows[rows["metric"] == "mean stay"]
        assert stay["value"].item() == pytest.approx(sum(runs) / len(runs))
        assert stay["n"].item() == len(runs)
        lasting = rows.set_index("length")["value"]
        for least in (2, 3, 5):
            assert lasting[least] == pytest.approx(sum(length >= least for length in runs) / len(runs))
    if any(drawn["labels"]):
        labels = analyze(run, "residency", by="label", **QUICK).df().query("metric == 'mean stay'")
        for label, value in zip(labels["label"], labels["value"], strict=True):
            runs = [
                length
                for chosen, n in drawn["routers"]
                for tokens, mine in zip(_sequences(drawn), drawn["labels"], strict=True)
                if mine == label
                for length in _runs(tokens, chosen, n)
            ]
            assert value == pytest.approx(sum(runs) / len(runs))


@given(drawn=traces())
def test_window_usage_follows_the_definition(plant: Plant, planted: ModuleType, drawn: Any) -> None:
    run = _planted(plant, planted, drawn)
    frame = analyze(run, "window_usage", by="layer", windows="1,2,3,5", **QUICK).df()
    for number, (chosen, n_experts) in enumerate(drawn["routers"]):
        rows = frame[frame["layer"] == number].set_index(["metric", "window"])["value"]
        for width in (1, 2, 3, 5):
            used, new = [], []
            for tokens in _sequences(drawn):
                for first in range(tokens.start, tokens.stop - width + 1):
                    union = {expert for token in range(first, first + width) for expert in chosen[token]}
                    used.append(len(union))
                    if first + width < tokens.stop:
                        new.append(len(set(chosen[first + width]) - union))
            if used:
                assert rows["distinct experts", width] == pytest.approx(np.mean(used))
                assert rows["share of experts used", width] == pytest.approx(np.mean(used) / n_experts)
            if new:
                assert rows["new experts", width] == pytest.approx(np.mean(new))
            assert (("distinct experts", width) in rows.index) == bool(used)
            assert (("new experts", width) in rows.index) == bool(new)


@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 2), (5, 1), (6, 3), (3, 3), (1, 1)])
def test_chance_of_repetition_is_that_of_all_pairs_of_choices(
    plant: Plant, planted: ModuleType, n_experts: int, top_k: int
) -> None:
    """Every set with every set, the first of each being any of its members."""
    sets = list(combinations(range(n_experts), top_k))
    ordered = [(first, *(e for e in one if e != first)) for one in sets for first in one]
    expected = _repeats([(list(a), list(b)) for a in ordered for b in ordered])
    run = plant(lengths=[3], routers=[planted.Router(np.tile(np.arange(top_k), (3, 1)), n_experts)])
    assert _values(run, "repetition", "null") == pytest.approx(expected)


def test_mixtral_levels_of_chance(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[3], routers=[planted.Router(np.array([[0, 1]] * 3), 8)])
    null = _values(run, "repetition", "null")
    assert null["first choice repeated"] == 0.125
    assert round(null["any expert shared"], 3) == 0.464
    assert null["replacement rate"] == 0.75


def test_chance_of_runs_and_of_usage_is_that_of_every_possible_sequence(plant: Plant, planted: ModuleType) -> None:
    """All 3^4 sequences of four tokens over three experts, each as likely as another."""
    ids = np.array(np.meshgrid(*[range(3)] * 4, indexing="ij")).reshape(4, -1).T
    run = plant(lengths=[4] * len(ids), routers=[planted.Router(ids.reshape(-1, 1), 3)])
    for name, parameters in (("residency", {"lengths": "2,3,4"}), ("window_usage", {"windows": "1,2,3,4"})):
        value, null = (_values(run, name, column, **parameters) for column in ("value", "null"))
        assert value == pytest.approx(null)
    repeats = [_values(run, "repetition", column, by="model") for column in ("value", "null")]
    assert repeats[0] == pytest.approx(repeats[1])


def test_constant_routing_stays_for_the_whole_sequence(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[10, 20], routers=[planted.Router(np.tile([3, 1], (30, 1)), 16)])
    stays = _values(run, "residency")
    assert stays["mean stay"] == 15
    assert stays["runs of at least", 16] == 0.5
    assert _values(run, "repetition")["experts kept"] == 1
    usage = _values(run, "window_usage", windows="8")
    assert usage == {("share of experts used", 8): 2 / 16, ("distinct experts", 8): 2, ("new experts", 8): 0}


def test_round_robin_never_repeats_and_uses_everything(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[64], routers=[planted.Router((np.arange(64) % 8)[:, None], 8)])
    assert _values(run, "repetition")["first choice repeated"] == 0
    assert _values(run, "repetition", lag=8)["first choice repeated"] == 1
    assert _values(run, "residency")["mean stay"] == 1
    usage = _values(run, "window_usage", windows="4,8,16")
    assert [usage["distinct experts", w] for w in (4, 8, 16)] == [4, 8, 8]
    assert [usage["new experts", w] for w in (4, 8, 16)] == [1, 0, 0]


def test_shuffles_keep_load_and_lose_order(plant: Plant, planted: ModuleType) -> None:
    """One expert takes most tokens: it repeats by load alone, and shuffles say how much."""
    generator = np.random.default_rng(1)
    chosen = np.where(generator.random(6000) < 0.8, 0, generator.integers(1, 8, 6000))
    run = plant(lengths=[300] * 20, routers=[planted.Router(chosen[:, None], 8)])
    row = analyze(run, "repetition", draws=100, shuffles=5).df().iloc[0]
    by_load = float((np.bincount(chosen) / 6000) @ (np.bincount(chosen) / 6000))
    assert row["null"] == 1 / 8
    assert row["null_shuffled"] == pytest.approx(by_load, abs=0.01)
    assert row["null_shuffled_in_sequence"] == pytest.approx(by_load, abs=0.01)
    assert row["ci_low"] < row["null_shuffled_in_sequence"] < row["ci_high"]
    stay, usage = (_values(run, name, c) for name in ("residency", "window_usage") for c in ("value",))
    for name, found in (("residency", stay), ("window_usage", usage)):
        control = _values(run, name, "null_shuffled_in_sequence", shuffles=5)
        key = "mean stay" if name == "residency" else ("distinct experts", 16)
        assert found[key] == pytest.approx(control[key], rel=0.03)


def test_shuffle_within_sequences_keeps_what_one_expert_a_sequence_gives(plant: Plant, planted: ModuleType) -> None:
    chosen = np.repeat(np.arange(10) % 5, 30)[:, None]
    run = plant(lengths=[30] * 10, labels=["a", "b"] * 5, routers=[planted.Router(chosen, 5)])
    row = analyze(run, "repetition", **QUICK).df().iloc[0]
    assert row["value"] == row["null_shuffled_in_sequence"] == 1
    assert row["null_shuffled"] < 0.5
    assert row["null_shuffled_in_label"] < 0.5


def test_expert_named_twice_counts_once_everywhere(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[4], routers=[planted.Router(np.array([[0, 0], [0, 0], [1, 1], [2, 2]]), 3)])
    assert _values(run, "residency")["mean stay"] == pytest.approx(4 / 3)
    assert _values(run, "window_usage", windows="2")["distinct experts", 2] == pytest.approx(5 / 3)
    assert _values(run, "repetition")["any expert shared"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("repetition", {"lag": 4}, "lag = 4"),
        ("repetition", {"by": "label"}, "no labels"),
        ("residency", {"lengths": "two"}, "parameter 'lengths'"),
        ("residency", {"by": "label"}, "no labels"),
        ("window_usage", {"windows": "5,9"}, "windows = 5 and 9"),
        ("window_usage", {"windows": "-1"}, "parameter 'windows'"),
    ],
)
def test_bad_input_is_refused_by_name(
    plant: Plant, planted: ModuleType, name: str, parameters: dict[str, Any], words: str
) -> None:
    run = plant(lengths=[4], routers=[planted.Router(np.array([[0], [1], [1], [2]]), 3)])
    with pytest.raises(InputError, match=words):
        analyze(run, name, **parameters)


@pytest.mark.skipif(not REAL.exists(), reason="the real trace is not here")
def test_real_trace_repeats_beyond_load(store: Store) -> None:
    """Mean run length and replacement rate say the same of interior tokens: k runs begin a sequence, the rest replace."""
    run = store.import_trace(REAL / "law.parquet", name="law", n_experts=64)
    repeats = analyze(run, "repetition", by="model", draws=100, shuffles=1).df().set_index("metric")
    replaced = repeats.loc["replacement rate"]
    assert replaced["ci_high"] < replaced["null_shuffled_in_sequence"] < replaced["null"]
    stay = analyze(run, "residency", by="model", **QUICK).df().set_index("metric").loc["mean stay"]
    tokens, sequences, layers = 8327, 33, 26
    begun = 6 * layers * (sequences + (tokens - sequences) * replaced["value"])
    assert stay["n"] == round(begun)
    assert stay["value"] == pytest.approx(tokens * 6 * layers / begun)
    two = _values(run, "window_usage", windows="2")["distinct experts", 2]
    assert two == pytest.approx(6 * (1 + replaced["value"]))
