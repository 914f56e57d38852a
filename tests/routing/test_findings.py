"""How far a result lies from chance: distances by hand, verdicts at their edges, and the order of a list."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moescope.core.result import Result
from moescope.routing.findings import finding, in_order


def _result(rows: list[dict[str, Any]], name: str = "made", **fields: Any) -> Result:
    return Result(
        "Title", pa.Table.from_pylist(rows), "definition", {"value": "share"}, len(rows), "rows", name=name, **fields
    )


def _rows(values: list[float], *, null: float = 0.0, half: float = 1.0, metric: str = "m") -> list[dict[str, Any]]:
    return [
        {"metric": metric, "value": v, "null": null, "ci_low": v - half, "ci_high": v + half, "n": 1} for v in values
    ]


def test_distance_is_the_median_in_half_widths() -> None:
    found = finding(_result(_rows([3.0, -5.0, 8.0], null=1.0, half=2.0)))
    assert (found.distance, found.beyond, found.cells) == (3.0, 2, 3)
    assert (found.value, found.null, found.ratio) == (-5.0, 1.0, None), "the number at the median distance"
    assert found.verdict == "beyond"
    assert found.unit == "share"


def test_ratio_is_value_over_chance() -> None:
    assert finding(_result(_rows([0.6], null=0.2, half=0.1))).ratio == pytest.approx(3.0)


def test_the_first_measure_with_a_chance_level_is_judged() -> None:
    without = [{"metric": "first", "value": 1.0, "null": None, "ci_low": 0.5, "ci_high": 1.5, "n": 1}]
    found = finding(_result([*without, *_rows([4.0], metric="second"), *_rows([900.0], metric="third")]))
    assert (found.metric, found.distance, found.cells) == ("second", 4.0, 1)


@pytest.mark.parametrize("missing", ["null", "ci_low", "ci_high"])
def test_without_chance_or_interval_nothing_is_judged(missing: str) -> None:
    rows = [{k: v for k, v in row.items() if k != missing} for row in _rows([9.0, 9.0])]
    assert finding(_result(rows)).verdict == "unjudged"
    gone = [row | {missing: math.nan} for row in _rows([9.0, 9.0])]
    assert finding(_result(gone)).verdict == "unjudged"


def _binomial_tail(beyond: int, cells: int) -> float:
    """Enumerated, not computed by formula: every set of at least `beyond` of the cells."""
    return sum(
        0.05**size * 0.95 ** (cells - size)
        for size in range(beyond, cells + 1)
        for _ in combinations(range(cells), size)
    )


@pytest.mark.parametrize("cells", [1, 2, 5, 12])
def test_verdict_in_part_is_what_chance_would_hardly_give(cells: int) -> None:
    for beyond in range(cells + 1):
        values = [5.0] * beyond + [0.0] * (cells - beyond)
        verdict = finding(_result(_rows(values))).verdict
        if 2 * beyond >= cells:
            assert verdict == "beyond"
        else:
            assert verdict == ("partly" if beyond and _binomial_tail(beyond, cells) < 0.05 else "within"), (
                beyond,
                cells,
            )


def test_pure_chance_is_within_chance() -> None:
    generator = np.random.default_rng(0)
    verdicts = [finding(_result(_rows(list(generator.normal(size=200)), half=1.96))).verdict for _ in range(100)]
    assert verdicts.count("within") >= 90


def test_an_interval_without_width_gives_no_distance_and_stands_last_of_its_group() -> None:
    flat = finding(_result(_rows([3.0], half=0.0), "flat"))
    assert (flat.verdict, flat.distance) == ("beyond", None)
    assert finding(_result(_rows([0.0], half=0.0))).verdict == "within", "exactly chance"
    far, near = finding(_result(_rows([9.0]), "far")), finding(_result(_rows([2.0]), "near"))
    chance, silent = (
        finding(_result(_rows([0.5]), "chance")),
        finding(_result([{"metric": "m", "value": 1.0}], "silent")),
    )
    assert [f.result.name for f in in_order([silent, flat, chance, near, far])] == [
        "far",
        "near",
        "flat",
        "chance",
        "silent",
    ]


@pytest.mark.parametrize("names", [("control_low", "control_high"), ("null_low", "null_high")])
def test_a_number_among_its_controls_is_not_beyond_chance(names: tuple[str, str]) -> None:
    """The interval [2, 4] leaves the controls' mean of 0 out, but one control went as far as 5."""
    low, high = names
    near = [row | {low: -1.0, high: 5.0} for row in _rows([3.0])]
    assert finding(_result(near)).verdict == "within"
    for bounds in ((-1.0, 1.0), (3.5, 5.0), (None, None)):
        found = finding(_result([row | dict(zip(names, bounds, strict=True)) for row in _rows([3.0])]))
        assert (found.verdict, found.beyond) == ("beyond", 1), bounds
    inside = [row | {low: 0.5, high: 0.6} for row in _rows([0.7])]
    assert finding(_result(inside)).verdict == "within", "outside its controls, but the interval holds their mean"


def test_the_median_of_an_even_number_of_distances_lies_between_the_two_in_the_middle() -> None:
    assert finding(_result(_rows([2.0, 4.0, 1.0, 9.0]))).distance == 3.0
