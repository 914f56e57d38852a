"""What a simulator's cards say at each position of its slider, as plain data for the browser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from moescope.dashboard import numbers
from moescope.dashboard.records import Router, layer_of
from moescope.dashboard.url_state import ViewState, link
from moescope.store.run import Run

_BUSIEST = """
    WITH load AS (
        SELECT layer, block, expert, sum(tokens)::BIGINT AS n
        FROM loads
        WHERE run_id = $run AND expert >= 0
        GROUP BY layer, block, expert
    )
    SELECT layer, block, arg_max(expert, (n, -expert))
    FROM load
    GROUP BY layer, block
"""


class Card(TypedDict, total=False):
    """One card: its name, the number, what stands behind it, and where its tokens are."""

    label: str
    value: str
    detail: str
    href: str


class Cards(TypedDict):
    """All cards of a simulator.

    choice: parameter of the address that picks among the curves, with its default; empty where there is one curve.
    at: choice → position of the slider → cards.
    words: position → the position in words.
    marks: position → (x axis, place on it) of the marker in the figure.
    """

    choice: tuple[str, str]
    at: dict[str, dict[str, list[Card]]]
    words: dict[str, str]
    marks: dict[str, list[tuple[str, str | float]]]


@dataclass(frozen=True)
class Range:
    """Positions of a slider.

    Attributes:
        least, most, step: of the positions.
        default: the value that stands for no value in the address.
        marks: position and word of each mark.
        power: a position p stands for the value 2^p.
        steps: a position p stands for the p-th of these.
    """

    least: float
    most: float
    step: float
    default: float
    marks: tuple[tuple[float, str], ...]
    power: bool = False
    steps: tuple[int, ...] | None = None

    def position(self, text: str) -> float:
        """Where the slider stands for a value written in the address; the default where it cannot be read."""
        try:
            value = float(text) if text else float(self.default)
        except ValueError:
            value = float(self.default)
        if not math.isfinite(value):
            value = float(self.default)
        if self.steps:
            return float(min(range(len(self.steps)), key=lambda i: abs((self.steps or ())[i] - value)))
        if self.power:
            value = math.log2(value) if value >= 1 else 0.0
        return min(max(value, self.least), self.most)


def interval(row: Mapping[str, Any], form: Any) -> str:
    """`[low, high]` of a row in a form of writing; empty where there is none."""
    low, high = row.get("ci_low"), row.get("ci_high")
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    return f"[{form(low)}, {form(high)}]"


def percent(value: float | None) -> str:
    """A share as `12.4 %`."""
    return numbers.share(value, 1.0)


def bounds(value: float) -> str:
    """A share inside an interval, without its sign."""
    return f"{100 * value:.1f}"


def share_interval(row: Mapping[str, Any]) -> str:
    """`[11.9, 12.8] %`."""
    text = interval(row, bounds)
    return f"{text} %" if text else ""


def size(value: float | None) -> str:
    """Bytes with a unit of a thousand.

    Example:
        >>> size(1_536_000)
        '1.54 MB'
    """
    if value is None or not math.isfinite(value):
        return numbers.MISSING
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g} B"


def busiest(run: Run, known: list[Router]) -> dict[tuple[int, str], tuple[str, str]]:
    """Router → name of its busiest expert and a link to that expert's tokens."""
    places = {(router.layer, router.block): router for router in known}
    found = {}
    for layer, block, expert in run.sql(_BUSIEST).fetchall():
        router = places.get((layer, block))
        if router is not None:
            here = ViewState(run=run.name, layer=layer_of(router, known), expert=int(expert))
            found[layer, block] = router.expert_name(int(expert)), link("/tokens", here)
    return found


def joined(*parts: str) -> str:
    """Parts of a detail that are there."""
    return " · ".join(part for part in parts if part)
