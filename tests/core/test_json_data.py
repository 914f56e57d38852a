"""JSON that every reader takes, and that says what was given."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.core.json_data import to_json

finite = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
data = st.recursive(finite, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def _refuse(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


@given(data)
def test_data_reads_back_as_it_was(value: Any) -> None:
    assert json.loads(to_json(value), parse_constant=_refuse) == value


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_null_however_deep(number: float) -> None:
    found = json.loads(to_json({"a": [1, (number, {"b": number})]}), parse_constant=_refuse)
    assert found == {"a": [1, [None, {"b": None}]]}


def test_what_json_does_not_know_becomes_its_text() -> None:
    assert json.loads(to_json({"at": datetime(2026, 11, 22), 7: 1})) == {"at": "2026-11-22 00:00:00", "7": 1}


def test_characters_stay_readable() -> None:
    assert to_json("日本 ü") == '"日本 ü"'
