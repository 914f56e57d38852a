"""Text and JSON pass through unchanged but for what they are meant to change."""

from __future__ import annotations

import json
import math
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from moescope.core.json_data import to_json
from moescope.core.text import undirected


def test_marks_of_direction_are_shown_and_no_other_sign_is_touched() -> None:
    """Those are the explicit ones of Unicode's bidirectional algorithm (UAX 9, section 2)."""
    explicit = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    implicit = {"\u200e", "\u200f", "\u061c"}
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        sign = chr(code)
        marks = sign in implicit or unicodedata.bidirectional(sign) in explicit
        assert undirected(sign) == ("\ufffd" if marks else sign), hex(code)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_data_is_json_in_its_own_letters_with_null_for_what_is_not_finite(data: object) -> None:
    def finite(value: object) -> object:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, list):
            return [finite(item) for item in value]
        return {key: finite(item) for key, item in value.items()} if isinstance(value, dict) else value

    assert json.loads(to_json(data)) == finite(data)


def test_json_keeps_letters_as_they_are() -> None:
    assert to_json({"é": "→"}) == '{"é": "→"}'
