"""Cells of tables: how numbers read."""

from __future__ import annotations

import math

import pytest

from moescope.core.html import cell


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (math.nan, "—"),
        (0, "0"),
        (1234567, "1,234,567"),
        (-1234, "−1,234"),
        (0.123456, "0.1235"),
        (-0.5, "−0.5"),
        (1234.5678, "1,235"),
        (123456.7, "123,457"),
        (1e-7, "1e−07"),
        (True, "True"),
        ("-text-", "-text-"),
        ("", ""),
    ],
)
def test_cell_reads_as_a_person_writes_it(value: object, text: str) -> None:
    assert cell(value) == text


def test_infinity_is_shown_not_crashed_on() -> None:
    assert cell(math.inf) == "inf"
    assert cell(-math.inf) == "−inf"
