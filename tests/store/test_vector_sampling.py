"""The sample of tokens: its hash against arithmetic on Python's whole numbers, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.store.vector_sampling import sampled, token_hash

SEEDS = st.integers(-(2**63), 2**64 - 1)
SEQUENCES, POSITIONS = st.integers(0, 2**62), st.integers(0, 2**40)


def mixed(x: int) -> int:
    """The output function of SplitMix64, modulo 2^64 by hand."""
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def by_hand(seed: int, sequence: int, position: int) -> int:
    return mixed((mixed((mixed(seed % 2**64) + sequence) % 2**64) + position) % 2**64)


def test_the_mixing_function_is_splitmix64() -> None:
    """The first outputs of the generator seeded with 0, as its authors' code gives them."""
    state = [n * 0x9E3779B97F4A7C15 % 2**64 for n in range(3)]
    assert [mixed(x) for x in state] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(SEEDS, st.lists(st.tuples(SEQUENCES, POSITIONS), min_size=1, max_size=9))
def test_the_hash_is_the_one_defined(seed: int, tokens: list[tuple[int, int]]) -> None:
    sequence, position = (np.array(column) for column in zip(*tokens, strict=True))
    assert token_hash(seed, sequence, position).tolist() == [by_hand(seed, s, p) for s, p in tokens]


@given(SEEDS, st.floats(0, 1), st.floats(0, 1), st.lists(st.tuples(SEQUENCES, POSITIONS), min_size=1, max_size=9))
def test_a_token_is_kept_where_its_hash_is_under_the_share(
    seed: int, share: float, other: float, tokens: list[tuple[int, int]]
) -> None:
    sequence, position = (np.array(column) for column in zip(*tokens, strict=True))
    kept = sampled(share, seed, sequence, position)
    assert kept.tolist() == [by_hand(seed, s, p) < share * 2**64 for s, p in tokens]
    more = sampled(max(share, other), seed, sequence, position)
    assert not (kept & ~more).any(), "a smaller share is a part of a larger one"


@pytest.mark.parametrize("share", [0.01, 0.25, 0.9])
def test_the_sample_is_as_large_as_asked_for_whichever_way_tokens_run(share: float) -> None:
    n = 200_000
    for sequence, position in [(np.arange(n), 0), (5, np.arange(n)), (np.arange(n) // 512, np.arange(n) % 512)]:
        kept = int(sampled(share, 1, sequence, position).sum())
        assert abs(kept - share * n) < 5 * (n * share * (1 - share)) ** 0.5


def test_another_seed_is_another_sample() -> None:
    first, second = (sampled(0.5, seed, 3, np.arange(20_000)) for seed in (0, 1))
    assert 0.48 < float((first == second).mean()) < 0.52
