"""The findings of a report with their effect sizes, the largest first, each linked to where it is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moescope.core.html import cell
from moescope.report.document import Answer, Block, Cell, Grid, Heading, Paragraph
from moescope.routing.findings import DEFINITION, WORDS, Finding, finding, in_order

_COLUMNS = (
    "finding", "measure", "value", "95 % interval", "chance or control", "÷ chance", "distance", "against chance", "unit",
)  # fmt: skip
_JUDGED = ("value", "null", "ci_low", "ci_high")
_NUMERIC = frozenset((2, 3, 4, 5, 6))


def summary_blocks(answers: Sequence[Answer]) -> tuple[list[Block], list[dict[str, Any]]]:
    """The table of findings, and the same as data."""
    places = {id(answer.result): answer.anchor for answer in answers}
    found = in_order([finding(answer.result) for answer in answers])
    judged = [one for one in found if one.verdict != "unjudged"]
    unjudged = [one for one in found if one.verdict == "unjudged"]
    blocks: list[Block] = [Heading("Findings", "findings")]
    if judged:
        rows = [_row(one, places[id(one.result)]) for one in judged]
        blocks += [
            Paragraph("The furthest from chance first; the number is the one at the median distance.", "muted"),
            Grid(_COLUMNS, rows, _NUMERIC, sortable=True),
            Paragraph(DEFINITION, "muted"),
        ]
    if unjudged:
        blocks += [
            Heading("Without a chance level", "findings-without-chance", 2),
            Grid(("finding", "n"), [_plain(one, places[id(one.result)]) for one in unjudged], frozenset((1,))),
        ]
    if not found:
        blocks.append(Paragraph("No analysis has what it needs."))
    return blocks, [_data(one, places[id(one.result)]) for one in found]


def at_the_median(found: Finding) -> dict[str, Any] | None:
    """The row of the result's table that stands for the finding; None where it is not judged."""
    if found.metric is None:
        return None
    table = found.result.table
    far: list[tuple[float, int]] = []
    for place, row in enumerate(table.select(["metric", *_JUDGED]).to_pylist()):
        numbers = [math.nan if row[name] is None else float(row[name]) for name in _JUDGED]
        if row["metric"] == found.metric and all(map(math.isfinite, numbers)):
            far.append((_distance(*numbers), place))
    if not far:
        return None
    middle: dict[str, Any] = table.slice(sorted(far)[len(far) // 2][1], 1).to_pylist()[0]
    return middle


def _distance(value: float, null: float, low: float, high: float) -> float:
    """As findings are judged: in half-widths of the interval."""
    apart, half = abs(value - null), (high - low) / 2
    return 0.0 if apart == 0 else apart / half if half > 0 else math.inf


def _row(found: Finding, anchor: str) -> list[Cell]:
    middle = at_the_median(found) or {}
    ratio = found.ratio
    return [
        Cell(found.result.title, to=anchor),
        Cell(str(found.metric)),
        Cell(cell(found.value), found.value),
        Cell(span(middle.get("ci_low"), middle.get("ci_high"))),
        Cell(cell(found.null), found.null),
        Cell("—" if ratio is None else cell(ratio), ratio),
        Cell("—" if found.distance is None else f"{found.distance:,.1f}", found.distance),
        Cell(f"{WORDS[found.verdict]}, {found.beyond:,} of {found.cells:,}"),
        Cell(found.unit),
    ]


def _plain(found: Finding, anchor: str) -> list[Cell]:
    return [Cell(found.result.title, to=anchor), Cell(f"{found.result.n:,} {found.result.n_unit}", found.result.n)]


def _data(found: Finding, anchor: str) -> dict[str, Any]:
    middle = at_the_median(found) or {}
    return {
        "analysis": found.result.name,
        "section": anchor,
        "finding": found.result.title,
        "verdict": found.verdict,
        "metric": found.metric,
        "value": found.value,
        "ci_low": middle.get("ci_low"),
        "ci_high": middle.get("ci_high"),
        "null": found.null,
        "ratio": found.ratio,
        "distance": found.distance,
        "beyond": found.beyond,
        "cells": found.cells,
        "unit": found.unit,
        "n": found.result.n,
        "n_unit": found.result.n_unit,
    }


def span(low: Any, high: Any) -> str:
    """An interval for reading."""
    if low is None or high is None or low != low or high != high:  # noqa: PLR0124  a NaN differs from itself
        return "—"
    return f"{cell(low)} to {cell(high)}"
