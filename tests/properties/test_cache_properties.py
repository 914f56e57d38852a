"""What must hold of caches and of tokens served together, whatever was asked for."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.routing.caching.replay import Rule, free_uses, replay
from moescope.routing.caching.steps import in_steps
from moescope.routing.caching.streams import Sequences, Stream

EXPERTS = 5
tokens = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=40)


def _one(asked: list[int]) -> tuple[Stream, Sequences]:
    ids = np.array(asked, np.uint16)[:, None]
    return Stream(0, "mlp", EXPERTS, ids, np.array([0, 1], np.int64)), Sequences(
        np.array([0, len(asked)]), np.array([0]), 1
    )


def _hits(asked: list[int], policy: str) -> list[int]:
    stream, sequences = _one(asked)
    return replay(stream, sequences, np.ones(1), Rule(policy), np.arange(1, EXPERTS + 1))[0].astype(int).tolist()  # type: ignore[arg-type]  # a policy


def _lru_by_list(asked: list[int], size: int) -> int:
    held: list[int] = []
    hits = 0
    for expert in asked:
        if expert in held:
            hits += 1
            held.remove(expert)
        elif len(held) == size:
            held.pop(0)
        held.append(expert)
    return hits


@given(tokens)
@settings(deadline=None)
def test_a_larger_lru_cache_holds_what_a_smaller_one_does(asked: list[int]) -> None:
    """LRU is a stack algorithm (Mattson et al. 1970): hits never fall with size, and at full size only first uses miss."""
    hits = _hits(asked, "lru")
    assert hits == sorted(hits)
    assert hits == [_lru_by_list(asked, size) for size in range(1, EXPERTS + 1)]
    assert hits[-1] == len(asked) - len(set(asked))


@given(tokens)
@settings(deadline=None)
def test_no_policy_hits_more_than_belady_s_where_each_token_asks_for_one(asked: list[int]) -> None:
    best = _hits(asked, "belady")
    for policy in ("lru", "fifo", "lfu"):
        assert all(hit <= most for hit, most in zip(_hits(asked, policy), best, strict=True))


@given(tokens)
@settings(deadline=None)
def test_free_uses_are_first_uses_of_what_finds_a_free_place(asked: list[int]) -> None:
    stream, sequences = _one(asked)
    free = free_uses(stream, sequences, np.ones(1))[0].astype(int).tolist()
    assert free == [min(size, len(set(asked))) for size in range(1, EXPERTS + 1)]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(0, 12),
)
@settings(deadline=None)
def test_a_step_asks_once_for_each_expert_of_its_tokens(rows: list[list[int]], batch: int, cut: int) -> None:
    cut = min(cut, len(rows))
    stream = Stream(0, "mlp", 4, np.array(rows, np.uint16), np.array([0, 2], np.int64))
    starts = np.array([0, cut, len(rows)])
    (made,), sequences = in_steps([stream], Sequences(starts, np.array([0, 1]), 2), batch)
    expected = []
    for part in (rows[:cut], rows[cut:]):
        steps = [part[start : start + batch] for start in range(0, len(part), batch)]
        expected += [list(dict.fromkeys(expert for row in step for expert in row)) for step in steps]
    assert [[int(e) for e in row if e < 4] for row in made.ids] == expected
    assert sequences.starts.tolist() == [0, -(-cut // batch), -(-cut // batch) - (-(len(rows) - cut) // batch)]
