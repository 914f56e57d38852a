"""Replays of one stream: published truths, and agreement with caches kept in lists, one size at a time."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moescope.routing.caching.hit_rates import replay_all
from moescope.routing.caching.replay import POLICIES, Rule, free_uses, replay
from moescope.routing.caching.streams import Sequences, Stream

SINGLE = [[0], [1], [0], [2], [0], [1]]
PAIRS = [[0, 1], [2, 1], [0, 3], [0, 1], [2, 3], [0, 1]]


def stream_of(tokens: Any, experts: int, bounds: list[int] | None = None) -> Stream:
    ids = np.asarray(tokens, dtype=np.uint16)
    return Stream(0, "mlp", experts, ids, np.array(bounds or [0, ids.shape[1]], dtype=np.int64))


def sequences_of(lengths: list[int]) -> Sequences:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Sequences(starts, np.arange(len(lengths)), len(lengths))


def both(tokens: Any, experts: int, rule: Rule, sizes: list[int]) -> list[tuple[int, int]]:
    """Hits with and without preload at some sizes, one sequence."""
    stream, sequences = stream_of(tokens, experts), sequences_of([len(tokens)])
    every = np.arange(1, experts + 1)
    hits = replay(stream, sequences, np.ones(1), rule, every)[0]
    free = free_uses(stream, sequences, np.ones(1))[0]
    return [(int(hits[size - 1] + free[size - 1]), int(hits[size - 1])) for size in sizes]


@pytest.mark.parametrize("policy", POLICIES)
def test_one_expert_a_token_gives_the_published_hits_under_every_policy(policy: Any) -> None:
    """FIFO, which is not of the paper, gives up expert 0 for 2 and so misses it once more."""
    at_two = (3, 1) if policy == "fifo" else (4, 2)
    assert both(SINGLE, 3, Rule(policy), [1, 2, 3]) == [(1, 0), at_two, (6, 3)]


@pytest.mark.parametrize(
    ("rule", "at_two", "at_three"),
    [
        (Rule("lru"), (4, 2), (9, 6)),
        (Rule("look_ahead", horizon=2), (6, 4), (10, 7)),
        (Rule("look_ahead", horizon=4), (5, 3), (10, 7)),
        (Rule("belady"), (5, 3), (9, 6)),
        (Rule("belady", in_tokens=False), (5, 3), (9, 6)),
    ],
)
def test_two_experts_a_token_give_the_published_hits(rule: Rule, at_two: Any, at_three: Any) -> None:
    assert both(PAIRS, 4, rule, [2, 3]) == [at_two, at_three]


@pytest.mark.parametrize("policy", POLICIES)
def test_constant_routing_always_hits_once_loaded(policy: Any) -> None:
    hits = both([[3, 1]] * 50, 4, Rule(policy), [2, 3, 4])
    assert hits == [(100, 98)] * 3


def test_round_robin_defeats_lru_and_fifo_and_not_belady() -> None:
    experts, turns = 8, 500
    tokens = [[t % experts] for t in range(experts * turns)]
    for policy in ("lru", "fifo"):
        assert [hit for _, hit in both(tokens, experts, Rule(policy), list(range(1, experts)))] == [0] * (experts - 1)
    belady = [hit / len(tokens) for _, hit in both(tokens, experts, Rule("belady"), [2, 4, 6])]
    assert belady == pytest.approx([(size - 1) / (experts - 1) for size in (2, 4, 6)], abs=0.003)


def test_sticky_routing_hits_in_a_cache_of_one_as_often_as_it_repeats() -> None:
    generator, experts, stay = np.random.default_rng(0), 8, 0.6
    moves, fresh = generator.random(20_000) >= stay, generator.integers(0, experts, 20_000)
    ids = np.zeros(20_000, int)
    for t in range(1, 20_000):
        ids[t] = fresh[t] if moves[t] else ids[t - 1]
    repeated = int((ids[1:] == ids[:-1]).sum())
    assert both(ids[:, None], experts, Rule("lru"), [1]) == [(repeated + 1, repeated)]
    assert repeated / 20_000 == pytest.approx(stay + (1 - stay) / experts, abs=0.01)


def _trace(seed: int, experts: int, top_k: int, lengths: list[int], *, null: int = 0) -> NDArray[np.uint16]:
    """Decisions with ties and repeats: few experts are likely, some rarely chosen."""
    generator = np.random.default_rng(seed)
    liking = generator.normal(size=experts + null) * 2
    noise = generator.gumbel(size=(sum(lengths), experts + null))
    return np.argsort(-(liking + noise), axis=1)[:, :top_k].astype(np.uint16)


SHAPES = st.sampled_from([(1, 1), (5, 1), (4, 2), (9, 3), (6, 6), (16, 4)])
LENGTHS = st.lists(st.integers(1, 14), min_size=1, max_size=4)


@given(seed=st.integers(0, 10**6), shape=SHAPES, lengths=LENGTHS, horizon=st.integers(1, 8), null=st.integers(0, 2))
def test_every_policy_at_every_size_is_what_a_list_would_do(
    brute: ModuleType, seed: int, shape: tuple[int, int], lengths: list[int], horizon: int, null: int
) -> None:
    experts, top_k = shape
    ids = _trace(seed, experts, top_k, lengths, null=null)
    stream, sequences = stream_of(ids, experts), sequences_of(lengths)
    weight, sizes = np.ones(len(lengths)), np.arange(1, experts + 1)
    parts = np.split(ids.tolist(), sequences.starts[1:-1])
    for rule in [Rule(policy, horizon) for policy in POLICIES] + [Rule("belady", in_tokens=False)]:
        found = replay(stream, sequences, weight, rule, sizes)
        for row, part in enumerate(parts):
            expected = [
                brute.hits(part.tolist(), rule.policy, size, experts=experts, horizon=horizon, in_tokens=rule.in_tokens)
                for size in sizes
            ]
            assert found[row].tolist() == [hit for hit, _ in expected], rule
            assert free_uses(stream, sequences, weight)[row].tolist() == [free for _, free in expected]


@given(
    seed=st.integers(0, 10**6),
    lengths=LENGTHS,
    horizon=st.integers(1, 6),
    by_layer=st.booleans(),
    null=st.integers(0, 1),
)
def test_pool_of_layers_at_chosen_sizes_is_what_a_list_would_do(
    brute: ModuleType, seed: int, lengths: list[int], horizon: int, by_layer: bool, null: int
) -> None:
    """Two layers of 5 and 7 experts, 1 and 3 chosen."""
    first, second = _trace(seed, 5, 1, lengths), _trace(seed + 1, 7, 3, lengths, null=null)
    ids = np.concatenate([first, second + np.uint16(5)], axis=1)
    bounds = [0, 1, 4] if by_layer else [0, 4]
    stream, sequences = stream_of(ids, 12, bounds), sequences_of(lengths)
    sizes = np.array([1, 2, 4, 5, 9, 12])
    parts = np.split(ids.tolist(), sequences.starts[1:-1])
    for rule in [Rule(policy, horizon) for policy in POLICIES]:
        found = replay(stream, sequences, np.ones(len(lengths)), rule, sizes, threads=2)
        for row, part in enumerate(parts):
            expected = [
                brute.hits(part.tolist(), rule.policy, size, experts=12, horizon=horizon, step=bounds)[0]
                for size in sizes.tolist()
            ]
            assert found[row].tolist() == expected, rule


@given(seed=st.integers(0, 10**6), policy=st.sampled_from(["lru", "lfu", "look_ahead", "belady"]))
def test_stack_policies_never_lose_by_a_larger_cache(seed: int, policy: Any) -> None:
    ids = _trace(seed, 12, 3, [40])
    hits = replay(stream_of(ids, 12), sequences_of([40]), np.ones(1), Rule(policy, 5), np.arange(1, 13))[0]
    assert (np.diff(hits) >= 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_256_experts_and_long_sequences_agree_with_lists(brute: ModuleType, policy: Any) -> None:
    ids = _trace(7, 256, 8, [120, 1])
    sizes = np.arange(1, 257)
    found = replay(stream_of(ids, 256), sequences_of([120, 1]), np.ones(2), Rule(policy), sizes)
    for size in (1, 8, 37, 100, 256):
        assert found[0, size - 1] == brute.hits(ids[:120].tolist(), policy, size, experts=256)[0]
    assert not found[1].any()


@pytest.mark.parametrize("policy", POLICIES)
def test_all_experts_in_the_cache_leave_only_first_uses_as_misses(policy: Any) -> None:
    ids = _trace(3, 10, 2, [30, 20])
    (counts,) = replay_all([stream_of(ids, 10)], sequences_of([30, 20]), Rule(policy))
    distinct = [len(np.unique(part)) for part in np.split(ids, [30])]
    assert (counts.uses - counts.hits[:, -1]).tolist() == distinct
    assert (counts.uses - counts.hits[:, -1] - counts.free[:, -1]).tolist() == [0, 0]


def test_uniform_routing_hits_as_often_as_places_are_taken() -> None:
    """k of E at random, a full cache of C: C ÷ E for every policy without foresight."""
    generator = np.random.default_rng(1)
    ids = np.argsort(generator.random((30_000, 16)), axis=1)[:, :4]
    for policy in ("lru", "lfu", "fifo", "lifo"):
        hits = replay(stream_of(ids, 16), sequences_of([30_000]), np.ones(1), Rule(policy), np.arange(1, 17))[0]
        assert hits / ids.size == pytest.approx(np.arange(1, 17) / 16, abs=0.006)


@given(seed=st.integers(0, 10**6), shape=SHAPES, lengths=LENGTHS, horizon=st.integers(1, 6))
def test_plain_numpy_version_that_the_benchmark_times_agrees(
    in_numpy: ModuleType, seed: int, shape: tuple[int, int], lengths: list[int], horizon: int
) -> None:
    experts, top_k = shape
    ids = _trace(seed, experts, top_k, lengths)
    sequences = sequences_of(lengths)
    for policy in POLICIES:
        (counts,) = replay_all([stream_of(ids, experts)], sequences, Rule(policy, horizon))
        slow = in_numpy.hits_by_size(ids, experts, sequences.starts, policy, horizon=horizon)
        assert counts.hits.sum(0).tolist() == slow.tolist(), policy


@given(seed=st.integers(0, 10**6), horizon=st.integers(1, 4))
def test_expert_named_twice_by_a_token_is_tested_twice_and_held_once(
    brute: ModuleType, seed: int, horizon: int
) -> None:
    ids = np.random.default_rng(seed).integers(0, 4, (15, 3)).astype(np.uint16)
    for policy in POLICIES:
        found = replay(stream_of(ids, 4), sequences_of([15]), np.ones(1), Rule(policy, horizon), np.arange(1, 5))
        expected = [brute.hits(ids.tolist(), policy, size, experts=4, horizon=horizon)[0] for size in range(1, 5)]
        assert found[0].tolist() == expected, policy
