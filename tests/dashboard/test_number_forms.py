from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.dashboard import numbers


@pytest.mark.parametrize(
    ("n", "short", "full"),
    [
        (25_600_123, "25.6 M", "25,600,123"),
        (66_246, "66.2 k", "66,246"),
        (9_999, "9,999", "9,999"),
        (999_999, "1 M", "999,999"),
        (-25_600_123, "−25.6 M", "−25,600,123"),
        (3_200_000_000, "3.2 G", "3,200,000,000"),
        (0, "0", "0"),
        (None, "—", "—"),
        (math.nan, "—", "—"),
    ],
)
def test_counts(n: float | None, short: str, full: str) -> None:
    assert numbers.short_count(n) == short
    assert numbers.count(n) == full


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_a_share_of_more_than_nothing_is_never_0_and_of_less_than_all_never_100(part: int, whole: int) -> None:
    shown = numbers.share(min(part, whole), whole)
    assert shown not in {"0 %", "0.0 %", "−0.0 %"}
    assert (shown == "100.0 %") == (part >= whole)


@pytest.mark.parametrize("whole", [0, None, math.nan])
def test_a_share_of_nothing_is_missing(whole: float | None) -> None:
    assert numbers.share(1, whole) == "—"


def test_an_interval_stands_in_brackets() -> None:
    assert numbers.interval(0.412, 0.38, 0.447) == "0.412 [0.380, 0.447]"
    assert numbers.interval(-0.5, -1, 0.25, places=2) == "−0.50 [−1.00, 0.25]"
    assert numbers.interval(0.412, None, 0.447) == "0.412", "one end alone is no interval"
    assert numbers.interval(None, 0.1, 0.2) == "—"


def test_no_number_has_an_ascii_minus() -> None:
    for shown in (
        numbers.count(-5),
        numbers.decimal(-0.25),
        numbers.decimal(-3e-7),
        numbers.short_count(-5e6),
        numbers.share(-5, 100),
        numbers.share(-1, 10_000),
    ):
        assert "-" not in shown
        assert "−" in shown


@pytest.mark.parametrize(
    ("value", "places", "shown"),
    [
        (0.0003, 3, "0.0003"),
        (-0.0003, 3, "−0.0003"),
        (0.00049, 3, "0.00049"),
        (2.5e-7, 3, "2.5e−07"),
        (0.3, 0, "0.3"),
        (0.0, 3, "0.000"),
        (-0.0, 3, "0.000"),
        (0.0006, 3, "0.001"),
    ],
)
def test_a_number_is_not_rounded_to_a_false_zero(value: float, places: int, shown: str) -> None:
    assert numbers.decimal(value, places) == shown


@pytest.mark.parametrize(
    ("part", "shown"),
    [(-124, "−12.4 %"), (-0.5, ">−0.1 %"), (-999.9, "<−99.9 %"), (-1000, "−100.0 %"), (1100, "110.0 %")],
)
def test_a_negative_share_is_written_like_a_positive_one(part: float, shown: str) -> None:
    assert numbers.share(part, 1000) == shown
