from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.core.errors import InputError
from moescope.dashboard.url_state import MODES, Layer, ViewState, decode, encode, link

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
whole = st.integers(0, 10**15 - 1)
layers = st.builds(Layer, st.integers(0, 99999), st.sampled_from([None, "mlp", "attn", "mlp.1", "attn.12"]))
states = st.builds(
    ViewState,
    run=st.none() | text,
    layer=st.none() | layers,
    expert=st.none() | st.integers(-999, 10**9 - 1),
    label=st.none() | text,
    sequence=st.none() | whole,
    piece=st.none() | whole,
    token=st.none() | whole,
    mode=st.none() | st.sampled_from(MODES),
    pins=st.lists(st.integers(-9, 999), max_size=8, unique=True).map(tuple),
    q=st.just("") | text,
    page=st.integers(1, 10**6),
)


@given(states)
def test_a_link_reproduces_the_view(state: ViewState) -> None:
    assert decode(encode(state)) == state


@given(states)
def test_a_link_is_one_line_of_plain_ascii(state: ViewState) -> None:
    written = encode(state)
    assert written.isascii()
    assert not set(written) & set(" <>\"'\n\r\t")


def test_the_plain_view_has_no_parameters_and_defaults_are_left_out() -> None:
    assert encode(ViewState()) == ""
    assert encode(ViewState(page=1, q="", pins=(), expert=0)) == "?expert=0"
    assert link("/tokens", ViewState(layer=Layer(3, "attn"))) == "/tokens?layer=3.attn"


def test_parameters_of_other_programs_are_ignored() -> None:
    assert decode("?utm_source=x&layer=2&__proto__=1") == ViewState(layer=Layer(2))
    assert decode("") == decode(None) == decode("?") == ViewState()


@pytest.mark.parametrize(
    "search",
    [
        "?layer=x",
        "?layer=-1",
        "?layer=1.2.3",
        "?layer=3.<b>",
        "?expert=7.5",
        "?expert=1e3",
        "?sequence=-1",
        "?token=abc",
        "?token=" + "9" * 40,
        "?page=0",
        "?mode=rainbow",
        "?pins=1.2.3.4.5.6.7.8.9",
        "?pins=a",
        "?piece=٣",
    ],
)
def test_an_impossible_value_is_refused_by_name(search: str) -> None:
    name = search[1:].split("=", maxsplit=1)[0]
    with pytest.raises(InputError, match=name):
        decode(search)
