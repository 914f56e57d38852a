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
    head=st.none() | whole,
    sae=st.none() | text,
    feature=st.none() | whole,
    edits=st.lists(st.sampled_from(["ablate layer=3 experts=5,9", "mask_head layer=2 heads=1"]), max_size=4).map(tuple),
    other=st.none() | text,
    rest=st.dictionaries(st.sampled_from(["tab", "slots", "sql"]), text).map(lambda d: tuple(sorted(d.items()))),
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


def test_what_no_field_reads_is_kept_for_the_page_or_ignored() -> None:
    assert decode("?tab=x&layer=2&__proto__=1&A=1") == ViewState(layer=Layer(2), rest=(("tab", "x"),))
    assert decode("?slots=4").whole("slots", 9) == 4
    assert decode("").whole("slots", 9) == 9
    with pytest.raises(InputError, match="slots"):
        decode("?slots=many").whole("slots", 9)


def test_the_selection_is_what_pages_share() -> None:
    state = decode("?run=a&layer=2&expert=1&mode=nll&q=x&tab=y&edits=ablate+layer=3+experts=5;top_k+k=1")
    assert encode(state.selection()) == "?run=a&layer=2&expert=1&edits=ablate+layer=3+experts=5;top_k+k=1"


def test_own_parameters_are_changed_and_removed() -> None:
    state = decode("?tab=y").with_rest(slots=4, tab=None)
    assert state.rest == (("slots", "4"),)


def test_parameters_without_a_value_are_the_default() -> None:
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
