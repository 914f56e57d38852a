"""Affinity and transitions: closed forms, and plain counting on random traces."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
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


def _value(frame: Any, metric: str, column: str = "value") -> list[float]:
    return frame[frame["metric"] == metric][column].tolist()


def _sets(generator: np.random.Generator, tokens: int, n_experts: int, top_k: int) -> np.ndarray:
    return np.array([generator.permutation(n_experts)[:top_k] for _ in range(tokens)])


def _random_routers(planted: ModuleType, seed: int, tokens: int, shapes: list[tuple[int, int]]) -> list[Any]:
    generator = np.random.default_rng(seed)
    return [
        planted.Router(_sets(generator, tokens, n_experts, top_k), n_experts, layer=layer)
        for layer, (n_experts, top_k) in enumerate(shapes)
    ]


SHAPES = st.lists(st.integers(1, 6).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))), min_size=2, max_size=4)


def test_permutation_between_layers_tells_everything(plant: Plant, planted: ModuleType) -> None:
    experts, turn = 8, np.array([3, 1, 4, 0, 6, 2, 7, 5])
    first = np.tile(np.arange(experts), 8)
    routers = [planted.Router(chosen[:, None], experts, layer=i) for i, chosen in enumerate((first, turn[first]))]
    frame = analyze(plant(lengths=[16] * 4, routers=routers), "affinity").df()
    assert _value(frame, "mutual information") == pytest.approx([math.log2(experts)])
    assert _value(frame, "uncertainty coefficient") == pytest.approx([1.0])
    assert _value(frame, "affinity") == [1.0]
    assert _value(frame, "affinity", "null")[0] < 0.5


def test_constant_routing_tells_nothing(plant: Plant, planted: ModuleType) -> None:
    routers = [planted.Router(np.tile([2, 5], (12, 1)), 8, layer=layer) for layer in range(3)]
    frame = analyze(plant(lengths=[6, 6], routers=routers), "affinity").df()
    assert _value(frame, "mutual information") == [0.0, 0.0]
    assert frame[frame["metric"] == "uncertainty coefficient"]["value"].isna().all()
    assert _value(frame, "affinity") == [1.0, 1.0]
    assert _value(frame, "mutual information", "bias") == [0.0, 0.0]


def test_half_known_choice_has_one_bit_of_two(plant: Plant, planted: ModuleType) -> None:
    """The later choice is one of the two in the earlier one's half: I = 1 bit, H = 2 bits, affinity ½."""
    pairs = np.array([(a, b) for a in range(4) for b in range(4) if a // 2 == b // 2] * 3)
    routers = [planted.Router(pairs[:, [side]], 4, layer=side) for side in (0, 1)]
    frame = analyze(plant(lengths=[12, 12], routers=routers), "affinity").df()
    assert _value(frame, "mutual information") == pytest.approx([1.0])
    assert _value(frame, "uncertainty coefficient") == pytest.approx([0.5])
    assert _value(frame, "affinity") == pytest.approx([0.5])
    frame = analyze(plant(lengths=[12, 12], routers=routers), "affinity", top=2).df()
    assert _value(frame, "affinity") == pytest.approx([1.0])


def _pairs(first: list[int], second: list[int], kind: str) -> list[tuple[int, int]]:
    if kind == "all":
        return [(i, j) for i in first for j in second]
    if kind == "first":
        return [(first[0], second[0])]
    return list(zip(first, second, strict=False))


def _entropy(counts: Counter[Any]) -> float:
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


@given(
    shapes=SHAPES,
    seed=st.integers(0, 99),
    tokens=st.integers(2, 30),
    kind=st.sampled_from(["first", "all", "same_rank"]),
)
def test_information_is_what_counting_gives(
    plant: Plant, planted: ModuleType, shapes: list[tuple[int, int]], seed: int, tokens: int, kind: str
) -> None:
    routers = _random_routers(planted, seed, tokens, shapes)
    run = plant(lengths=[1] * tokens, routers=routers)
    frame = analyze(run, "affinity", pairs=kind, draws=5, shuffles=1).df()
    for number, (here, there) in enumerate(itertools.pairwise(routers)):
        joint: Counter[tuple[int, int]] = Counter()
        for first, second in zip(here.experts.tolist(), there.experts.tolist(), strict=True):
            joint.update(_pairs(first, second, kind))
        left, right = Counter[int](), Counter[int]()
        for (i, j), n in joint.items():
            left[i] += n
            right[j] += n
        mutual = _entropy(left) + _entropy(right) - _entropy(joint)
        assert _value(frame, "mutual information")[number] == pytest.approx(mutual, abs=1e-9)
        if _entropy(right) > 1e-9:
            share = mutual / _entropy(right)
            assert _value(frame, "uncertainty coefficient")[number] == pytest.approx(share, abs=1e-9)
        followed = sum(max(joint[i, j] for j in right) for i in left)
        assert _value(frame, "affinity")[number] == pytest.approx(followed / joint.total())
        if kind == "first":
            bias = (len(left) - 1) * (len(right) - 1) / (2 * tokens * math.log(2))
            assert _value(frame, "mutual information", "bias")[number] == pytest.approx(bias)


def test_independent_layers_are_at_their_null(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(4)
    routers = [planted.Router(generator.integers(8, size=(3000, 1)), 8, layer=layer) for layer in range(2)]
    row = analyze(plant(lengths=[100] * 30, routers=routers), "affinity").df().iloc[0]
    assert row["value"] == pytest.approx(row["null"], rel=0.4)
    assert row["null"] == pytest.approx(49 / (2 * 3000 * math.log(2)), rel=0.3)  # (E − 1)² / (2 N ln 2)
    assert row["bias"] == pytest.approx(49 / (2 * 3000 * math.log(2)))


def test_planted_dependence_is_above_its_null_and_inside_its_interval(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(5)
    first = generator.integers(4, size=2000)
    follows = generator.random(2000) < 0.8
    second = np.where(follows, first, generator.integers(4, size=2000))
    routers = [planted.Router(chosen[:, None], 4, layer=i) for i, chosen in enumerate((first, second))]
    frame = analyze(plant(lengths=[50] * 40, routers=routers), "affinity").df()
    stay, leave = 0.8 + 0.2 / 4, 0.2 / 4
    truth = 2 + stay * math.log2(stay) + 3 * leave * math.log2(leave)
    row = frame.iloc[0]
    assert row["ci_low"] < truth < row["ci_high"]
    assert row["ci_low"] > 5 * row["null"]
    assert frame.iloc[2]["ci_low"] < stay < frame.iloc[2]["ci_high"]


def test_shuffling_inside_documents_keeps_what_documents_share(plant: Plant, planted: ModuleType) -> None:
    """Two kinds of documents with experts of their own: all dependence is between documents."""
    generator = np.random.default_rng(6)
    kind = np.repeat(np.arange(20) % 2, 60)
    routers = [planted.Router((4 * kind + generator.integers(4, size=1200))[:, None], 8, layer=i) for i in (0, 1)]
    run = plant(lengths=[60] * 20, routers=routers)
    inside = analyze(run, "affinity", shuffle="document").df().iloc[0]
    assert inside["value"] == pytest.approx(inside["null"], rel=0.05)
    assert inside["value"] > 1.0
    assert analyze(run, "affinity").df().iloc[0]["null"] < 0.1


def test_steps_follow_block_and_distance(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(7)
    routers = [
        planted.Router(generator.integers(4, size=(20, 1)), 4, layer=layer, block=block)
        for layer in (0, 1, 3)
        for block in ("attn", "mlp")
    ]
    run = plant(lengths=[10, 10], routers=routers)
    every = analyze(run, "affinity").df()
    steps = list(every[every.metric == "affinity"][["layer", "block", "to_layer", "to_block"]].itertuples(index=False))
    assert [tuple(step) for step in steps][:2] == [(0, "attn", 0, "mlp"), (0, "mlp", 1, "attn")]
    only = analyze(run, "affinity", block="mlp", distance=2).df()
    assert only[["layer", "to_layer"]].drop_duplicates().to_numpy().tolist() == [[0, 3]]
    with pytest.raises(InputError, match=r"block 'none'.*'attn', 'mlp'"):
        analyze(run, "affinity", block="none")
    with pytest.raises(InputError, match="too few routers"):
        analyze(run, "affinity", distance=6)


def test_one_document_has_no_interval(plant: Plant, planted: ModuleType) -> None:
    routers = _random_routers(planted, 1, 9, [(4, 2), (5, 1)])
    frame = analyze(plant(lengths=[9], routers=routers), "affinity").df()
    assert frame["ci_low"].isna().all()
    assert frame["value"].notna().all()


def test_256_experts_and_many_documents_are_resampled_in_groups(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(2)
    routers = [planted.Router(_sets(generator, 300, 256, 2), 256, layer=layer) for layer in range(2)]
    result = analyze(plant(lengths=[2] * 150, routers=routers), "affinity", draws=20)
    assert "in 128 groups" in (result.interval or "")
    assert result.df()["ci_low"].notna().all()


@given(
    shapes=SHAPES,
    seed=st.integers(0, 99),
    tokens=st.integers(1, 20),
    kind=st.sampled_from(["first", "all", "same_rank"]),
)
def test_transitions_are_what_counting_gives(
    plant: Plant, planted: ModuleType, shapes: list[tuple[int, int]], seed: int, tokens: int, kind: str
) -> None:
    routers = _random_routers(planted, seed, tokens, shapes)
    frame = analyze(plant(lengths=[1] * tokens, routers=routers), "transitions", pairs=kind, draws=3).df()
    joint: Counter[tuple[int, int]] = Counter()
    for first, second in zip(routers[0].experts.tolist(), routers[1].experts.tolist(), strict=True):
        joint.update(_pairs(first, second, kind))
    begun, ended = Counter[int](), Counter[int]()
    for (i, j), n in joint.items():
        begun[i] += n
        ended[j] += n
    assert set(frame["expert"]) == set(begun)
    for row in frame.itertuples():
        assert row.value == pytest.approx(joint[row.expert, row.to_expert] / begun[row.expert])
        assert row.null == pytest.approx(ended[row.to_expert] / joint.total())
        assert row.n == begun[row.expert]
        if ended[row.to_expert]:
            assert row.lift == pytest.approx(row.value / row.null)


def test_transitions_name_the_layers_they_can_begin_at(plant: Plant, planted: ModuleType) -> None:
    routers = _random_routers(planted, 3, 8, [(4, 1), (4, 1), (4, 1)])
    run = plant(lengths=[4, 4], routers=routers)
    assert set(analyze(run, "transitions", layer=1).df()["to_layer"]) == {2}
    with pytest.raises(InputError, match=r"layer 2.*one of 0, 1"):
        analyze(run, "transitions", layer=2)


def test_flows_are_shares_of_tokens_over_the_threshold(plant: Plant, planted: ModuleType) -> None:
    """Eight tokens: 0→0 four times, 0→1, 1→1, 2→3 and 3→2 once; uniform is 1/16."""
    first, second = [0, 0, 0, 0, 0, 1, 2, 3], [0, 0, 0, 0, 1, 1, 3, 2]
    routers = [planted.Router(np.array(chosen)[:, None], 4, layer=i) for i, chosen in enumerate((first, second))]
    run = plant(lengths=[4, 4], labels=["a", "b"], routers=routers)
    frame = analyze(run, "flows").df()
    found = {(row.expert, row.to_expert): row for row in frame.itertuples()}
    assert {key: row.value for key, row in found.items()} == {
        (0, 0): 0.5, (0, 1): 0.125, (1, 1): 0.125, (2, 3): 0.125, (3, 2): 0.125
    }  # fmt: skip
    assert found[0, 0].times_uniform == 8
    assert found[0, 0].null == pytest.approx(5 / 8 * 4 / 8)
    assert found[0, 0].lift == pytest.approx(0.5 / (5 / 16))
    assert analyze(run, "flows", threshold=2).df()[["expert", "to_expert"]].to_numpy().tolist() == [[0, 0]]
    assert len(analyze(run, "flows", shown=2).df()) == 2
    only = analyze(run, "flows", label="a").df()
    assert only[["expert", "to_expert", "value", "n"]].to_numpy().tolist() == [[0, 0, 1.0, 4]]


def test_flows_refuse_what_they_cannot_follow(plant: Plant, planted: ModuleType) -> None:
    routers = _random_routers(planted, 3, 8, [(4, 1), (4, 1)])
    run = plant(lengths=[4, 4], labels=["a", None], routers=routers)
    with pytest.raises(InputError, match=r"label 'c'.*one of a"):
        analyze(run, "flows", label="c")
    with pytest.raises(InputError, match="threshold"):
        analyze(run, "flows", threshold=-1)
    with pytest.raises(InputError, match="two routers"):
        analyze(run, "flows", first_layer=1)
    with pytest.raises(InputError, match="no labels"):
        analyze(plant(lengths=[8], routers=routers), "flows", label="a")
    assert "No flow" in analyze(run, "flows", threshold=1000).title


@pytest.mark.parametrize("name", ["affinity", "transitions", "flows"])
def test_one_router_is_refused(plant: Plant, planted: ModuleType, name: str) -> None:
    run = plant(lengths=[4], routers=_random_routers(planted, 0, 4, [(4, 2)]))
    with pytest.raises(InputError, match="too few routers"):
        analyze(run, name)
