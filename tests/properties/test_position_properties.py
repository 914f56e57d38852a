"""Words for positions mean what they say, and two of them overlap exactly where one token could be at both."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.core.errors import InputError
from moescope.core.positions import Positions, read_positions

spans = st.tuples(st.integers(0, 12), st.none() | st.integers(0, 12)).filter(
    lambda pair: pair[1] is None or pair[0] < pair[1]
)
words = (
    st.sampled_from(["all", "prompt", "generated"])
    | spans.map(lambda pair: f"{pair[0]}:{'' if pair[1] is None else pair[1]}")
    | st.integers(0, 5).map(lambda token: f"token:{token}")
)


def _holds(where: Positions, place: int, token: int, *, generated: bool) -> bool:
    """Whether a token is one of those meant."""
    if where.which == "span":
        return place >= where.start and (where.stop is None or place < where.stop)
    if where.which == "token":
        return token == where.token_id
    return where.which == "all" or generated == (where.which == "generated")


@given(words, words)
def test_positions_overlap_where_some_token_is_at_both(one: str, other: str) -> None:
    first, second = read_positions(one), read_positions(other)
    shared = any(
        _holds(first, place, token, generated=generated) and _holds(second, place, token, generated=generated)
        for place in range(14)
        for token in range(6)
        for generated in (False, True)
    )
    assert first.overlaps(second) == second.overlaps(first) == shared


@given(words)
def test_words_of_positions_are_read_back(word: str) -> None:
    assert str(read_positions(word)) == word
    assert read_positions(word).token_id == (int(word.split(":")[1]) if word.startswith("token:") else None)


def test_a_span_may_lack_either_end() -> None:
    assert read_positions(":4") == Positions("span", 0, 4)
    assert read_positions(":") == Positions("span", 0, None)
    assert Positions().start == 0


@pytest.mark.parametrize("word", ["", "3", "4:4", "5:2", "token:", "token:x", "-1:2", "some", "1:2:3"])
def test_words_that_name_no_token_are_refused(word: str) -> None:
    with pytest.raises(InputError, match="positions cannot be"):
        read_positions(word)
