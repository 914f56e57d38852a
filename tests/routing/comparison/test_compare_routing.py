"""Two runs compared: alignment, a reading brute force, closed-form floors, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.comparison.set_overlap import random_floor
from moescope.store.run import Run

Plant = Callable[..., Run]
METRICS = ("agreement", "top-1 agreement", "saturation", "Jaccard", "selection shift", "weighted overlap")


def _routers(planted: ModuleType, layers: list[tuple[int, int, int]], tokens: int, seed: int) -> list[list[Any]]:
    """For each layer (E, k, k') a router of each run; weights descend."""
    generator = np.random.default_rng(seed)
    runs: list[list[Any]] = [[], []]
    for layer, (size, *ks) in enumerate(layers):
        for run, k in zip(runs, ks, strict=True):
            chosen = np.stack([generator.permutation(size)[:k] for _ in range(tokens)])
            weights = np.sort(generator.uniform(0.1, 1, chosen.shape), axis=1)[:, ::-1].astype(np.float32)
            run.append(planted.Router(chosen, size, layer=layer, weights=weights))
    return runs


def _brute(first: Any, second: Any, tokens: list[int]) -> dict[str, float]:
    sums = dict.fromkeys(METRICS, 0.0)
    for token in tokens:
        a, b = first.experts[token].tolist(), second.experts[token].tolist()
        both, either = set(a) & set(b), set(a) | set(b)
        wa = {e: float(w) / float(sum(first.weights[token])) for e, w in zip(a, first.weights[token], strict=True)}
        wb = {e: float(w) / float(sum(second.weights[token])) for e, w in zip(b, second.weights[token], strict=True)}
        sums["agreement"] += set(a) == set(b)
        sums["top-1 agreement"] += a[0] == b[0]
        sums["saturation"] += len(both) / len(b)
        sums["Jaccard"] += len(both) / len(either)
        sums["selection shift"] += 1 - len(both) / len(either)
        sums["weighted overlap"] += sum(min(wa[e], wb[e]) for e in both)
    return {metric: value / len(tokens) for metric, value in sums.items()}


@given(
    size=st.sampled_from([1, 2, 5, 256]),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    by=st.sampled_from(["layer", "label", "position"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=12)
def test_measures_agree_with_comparing_token_by_token(
    plant: Plant, planted: ModuleType, size: int, lengths: list[int], by: str, seed: int
) -> None:
    tokens, k = sum(lengths), min(2, size)
    layers = [(size, k, k), (size + 1, 1, min(3, size + 1))]
    first, second = _routers(planted, layers, tokens, seed)
    labels = ["ab"[number % 2] for number in range(len(lengths))]
    runs = [plant(lengths=lengths, labels=labels, routers=routers) for routers in (first, second)]
    frame = analyze(runs, "compare_routing", by=by, draws=3).df()
    position = [p for length in lengths for p in range(length)]
    label = [name for length, name in zip(lengths, labels, strict=True) for _ in range(length)]
    group_of = {
        "layer": [None] * tokens,
        "label": label,
        "position": [2 ** int(math.log2(p + 1)) - 1 for p in position],
    }[by]
    assert len(frame) == len(layers) * len(METRICS) * len(set(group_of))
    for a, b in zip(first, second, strict=True):
        for group in set(group_of):
            part = frame[frame["layer"] == a.layer]
            part = part if group is None else part[part[by] == group]
            inside = [t for t in range(tokens) if group_of[t] == group]
            assert dict(zip(part["metric"], part["value"], strict=True)) == pytest.approx(
                _brute(a, b, inside), abs=1e-6
            )
            assert set(part["n"]) == {len(inside)}


@pytest.mark.parametrize(("size", "first", "second"), [(4, 2, 2), (5, 1, 3), (3, 3, 3), (6, 3, 2), (1, 1, 1)])
def test_floors_are_the_mean_over_all_choices(size: int, first: int, second: int) -> None:
    pairs = [(set(a), set(b)) for a in combinations(range(size), first) for b in combinations(range(size), second)]
    floor = random_floor(size, first, second)
    assert floor["saturation"] == pytest.approx(np.mean([len(a & b) / second for a, b in pairs]))
    assert floor["Jaccard"] == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in pairs]))
    assert floor["agreement"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    assert floor["top-1 agreement"] == pytest.approx(1 / size)


def test_saturation_of_random_routers_is_k_over_e_as_is_its_null(plant: Plant, planted: ModuleType) -> None:
    first, second = _routers(planted, [(8, 2, 2)], 2000, 5)
    runs = [plant(lengths=[100] * 20, routers=routers) for routers in (first, second)]
    row = analyze(runs, "compare_routing").df().query("metric == 'saturation'").iloc[0]
    assert row["floor"] == 0.25
    assert row["value"] == pytest.approx(0.25, abs=0.02)
    assert row["null"] == pytest.approx(0.25, abs=0.02)
    assert row["ci_low"] < row["value"] < row["ci_high"]


def test_shuffled_tokens_keep_what_loads_alone_give(plant: Plant, planted: ModuleType) -> None:
    """Nine tokens in ten go to expert 0 in both runs: shuffled tokens agree in 0.9² + 0.1² of cases, the floor is ½."""
    chosen = (np.arange(1000) % 10 == 9).astype(int)[:, None]
    runs = [plant(lengths=[100] * 10, routers=[planted.Router(chosen, 2)]) for _ in range(2)]
    row = analyze(runs, "compare_routing").df().query("metric == 'saturation'").iloc[0]
    assert row["value"] == row["ci_low"] == row["ci_high"] == 1
    assert row["null"] == pytest.approx(0.82, abs=0.03)
    assert row["floor"] == 0.5


def test_equal_choices_in_another_order_agree(plant: Plant, planted: ModuleType) -> None:
    first = planted.Router(np.array([[0, 1], [2, 3]]), 4)
    second = planted.Router(np.array([[1, 0], [2, 3]]), 4)
    runs = [plant(lengths=[2], routers=[router]) for router in (first, second)]
    frame = analyze(runs, "compare_routing").df().set_index("metric")["value"]
    assert frame["agreement"] == frame["saturation"] == 1
    assert frame["top-1 agreement"] == 0.5


def test_sequences_are_found_by_content_in_another_order(plant: Plant, planted: ModuleType) -> None:
    router = planted.Router(np.array([[0], [1], [2], [3], [3]]), 4)
    first = plant(lengths=[2, 3], routers=[router], ids=[5, 6, 7, 8, 9])
    other = planted.Router(np.array([[2], [3], [3], [0], [1]]), 4)
    second = plant(lengths=[3, 2], routers=[other], ids=[7, 8, 9, 5, 6])
    for number in (0, 1):
        second.store.connection.execute(
            "UPDATE sequences SET content_hash = ? WHERE run_id = ? AND sequence_id = ?",
            [f"{1 - number:064x}", second.run_id, number],
        )
    result = analyze([first, second], "compare_routing")
    assert result.n == 5
    assert result.df().query("metric == 'agreement'")["value"].item() == 1


def test_partial_alignment_is_said(plant: Plant, planted: ModuleType) -> None:
    first = plant(lengths=[3, 2], routers=[planted.Router(np.zeros((5, 1), int), 2)], ids=[1, 2, 3, 4, 5])
    second = plant(lengths=[3], routers=[planted.Router(np.zeros((3, 1), int), 2)], ids=[1, 2, 9])
    result = analyze([first, second], "compare_routing")
    assert result.n == 2
    assert any(
        "2 tokens align, of 5" in note and "1 at the same place differ in token id" in note for note in result.notes
    )


def test_other_texts_are_refused_unless_paired_by_number(plant: Plant, planted: ModuleType) -> None:
    runs = [plant(lengths=[2], routers=[planted.Router(np.zeros((2, 1), int), 2)]) for _ in range(2)]
    runs[1].store.connection.execute("UPDATE sequences SET content_hash = 'other' WHERE run_id = ?", [runs[1].run_id])
    with pytest.raises(InputError, match=r"no sequence of one run is in the other.*1 sequences, 2 tokens.*align"):
        analyze(runs, "compare_routing")
    assert analyze(runs, "compare_routing", align_by="sequence").n == 2


def test_runs_without_stored_ids_are_paired_by_number(plant: Plant, planted: ModuleType) -> None:
    runs = [plant(lengths=[2], routers=[planted.Router(np.zeros((2, 1), int), 2)]) for _ in range(2)]
    for table, column in (("sequences", "content_hash"), ("tokens", "token_id")):
        runs[1].store.connection.execute(f"UPDATE {table} SET {column} = NULL WHERE run_id = ?", [runs[1].run_id])
    result = analyze(runs, "compare_routing")
    assert result.n == 2
    assert any("no token ids" in note for note in result.notes)


def test_another_vocabulary_is_refused(plant: Plant, planted: ModuleType) -> None:
    router = planted.Router(np.zeros((2, 1), int), 2)
    runs = [plant(lengths=[2], routers=[router], ids=ids) for ids in ([1, 2], [3, 4])]
    with pytest.raises(InputError, match=r"no token in common.*2 tokens at equal places have different ids"):
        analyze(runs, "compare_routing")


def test_routers_of_other_sizes_are_left_out_or_refused(plant: Plant, planted: ModuleType) -> None:
    zeros = np.zeros((2, 1), int)
    first = plant(lengths=[2], routers=[planted.Router(zeros, 2), planted.Router(zeros, 4, layer=1)])
    second = plant(lengths=[2], routers=[planted.Router(zeros, 2), planted.Router(zeros, 8, layer=1)])
    result = analyze([first, second], "compare_routing")
    assert set(result.df()["layer"]) == {0}
    assert any("2 routers are left out" in note for note in result.notes)
    other = plant(lengths=[2], routers=[planted.Router(zeros, 3)])
    with pytest.raises(InputError, match="L0 of 3"):
        analyze([first, other], "compare_routing")


def test_labels_must_be_there_to_be_told_apart(plant: Plant, planted: ModuleType) -> None:
    runs = [plant(lengths=[2], routers=[planted.Router(np.zeros((2, 1), int), 2)]) for _ in range(2)]
    with pytest.raises(InputError, match="has no labels"):
        analyze(runs, "compare_routing", by="label")


def test_missing_weights_drop_the_weighted_overlap_only(plant: Plant, planted: ModuleType) -> None:
    runs = [plant(lengths=[2], routers=[planted.Router(np.zeros((2, 1), int), 2)]) for _ in range(2)]
    runs[0].store.connection.execute("UPDATE routing SET weights = NULL WHERE run_id = ?", [runs[0].run_id])
    result = analyze(runs, "compare_routing")
    assert set(result.df()["metric"]) == set(METRICS) - {"weighted overlap"}
    assert any("Weighted overlap is left out" in note for note in result.notes)


@pytest.mark.parametrize("by", ["layer", "label", "position"])
def test_figure_shows_hostile_labels_as_text(plant: Plant, planted: ModuleType, by: str) -> None:
    labels = list(planted.HOSTILE)
    chosen = (np.arange(3 * len(labels)) % 256)[:, None]
    routers = [planted.Router(chosen, 256, layer=layer) for layer in range(3)]
    runs = [plant(lengths=[3] * len(labels), labels=labels, routers=routers) for _ in range(2)]
    result = analyze(runs, "compare_routing", by=by, draws=2)
    assert "<script" not in result.figure().to_json()
    assert f"n = {result.n}" in result.figure().layout.title.subtitle.text
