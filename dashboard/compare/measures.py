"""Every measure of both runs with the difference, as a grid."""

from __future__ import annotations

import math
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import MoescopeError
from moescope.dashboard import grids, notices
from moescope.dashboard.answers import Answers
from moescope.dashboard.url_state import Mode, ViewState, link
from moescope.routing.comparison.compare_measures import moved
from moescope.store.run import Run

_WHERE: dict[str, tuple[str, Mode | None]] = {
    "mean NLL": ("/tokens", "nll"),
    "next token predicted": ("/tokens", "nll"),
    "router entropy": ("/tokens", "entropy"),
    "router margin": ("/tokens", "margin"),
    "weight of the first choice": ("/tokens", "weight"),
    "residual norm": ("/tokens", "norm"),
    "CV of expert load": ("/experts", None),
    "attention to the first token": ("/phenomena", None),
}


def measures(answers: Answers, run: Run, other: Run) -> Any:
    """The finding in one sentence and the table of measures, or why there is none."""
    try:
        result = answers.ask({"analysis": "compare_measures", "runs": [run.name, other.name], "given": {}})
    except MoescopeError as reason:
        return notices.refusal(reason)
    units = {name.removeprefix("value[").removesuffix("]"): unit for name, unit in result.units.items()}
    rows = [_row(line, units, run, other) for line in result.table.to_pylist()]
    columns: list[dict[str, Any]] = [
        grids.text_column("metric", "Measure", minWidth=190, flex=2),
        grids.link_column("first", run.name, width=120, type="rightAligned", headerTooltip="first run"),
        grids.link_column("second", other.name, width=120, type="rightAligned", headerTooltip="other run"),
        {"field": "difference", "headerName": "Difference", "width": 115, "type": "rightAligned"},
        {"field": "interval", "headerName": "95 % interval of it", "width": 185, "type": "rightAligned"},
        grids.number_column("percent", "% of first", "+,.2f", width=100),
        {
            "field": "verdict",
            "headerName": "Interval",
            "width": 130,
            "cellClassRules": {"cmp-changed": {"function": "params.data.apart"}},
        },
        grids.text_column("unit", "Unit", width=130),
    ]
    grid = grids.grid("cmp-measures", columns, rows, height=360, row_id="params.data.metric", fit=None)
    grid.style["height"] += 14  # room for the bar that scrolls sideways on a narrow page
    notes = [dmc.Text(note, className="muted") for note in result.notes]
    return html.Div(
        [
            dmc.Text(result.title + ".", className="foreign cmp-finding"),
            grid,
            dmc.Text(f"Interval: {result.interval}.", className="muted", mt=6),
            *notes,
        ]
    )


def _row(line: dict[str, Any], units: dict[str, str], run: Run, other: Run) -> dict[str, Any]:
    low, high = line["ci_low"], line["ci_high"]
    judged = low is not None and low == low  # noqa: PLR0124  a NaN differs from itself
    relative = math.nan if line["relative"] is None else line["relative"]
    real = bool(moved(line["value"], relative))
    apart = judged and real and not low <= 0 <= high
    places = _places(line, judged=judged)
    path, mode = _WHERE.get(line["metric"], ("", None))
    hrefs = [link(path, ViewState(run=r.name, mode=mode)) if path else None for r in (run, other)]
    return {
        "metric": line["metric"],
        "first": _plain(line["value_a"]),
        "first_href": hrefs[0],
        "second": _plain(line["value_b"]),
        "second_href": hrefs[1],
        "difference": _signed(line["value"], places) if real else "0",
        "interval": f"{_signed(low, places)} to {_signed(high, places)}" if judged else "—",
        "percent": None if math.isnan(relative) else 100 * relative,
        "apart": apart,
        "verdict": ("● leaves 0 out" if apart else "○ holds 0") if judged else "—",
        "unit": units.get(line["metric"], ""),
    }


def _plain(value: float) -> str:
    return f"{value:,.4g}".replace("-", "−")


def _signed(value: float, places: int) -> str:
    return f"{value:+,.{places}f}".replace("-", "−")


def _places(line: dict[str, Any], *, judged: bool) -> int:
    """Decimals that show two digits of the interval's half-width, or three of the difference where there is none."""
    size = (line["ci_high"] - line["ci_low"]) / 20 if judged else abs(line["value"]) / 100
    return min(8, max(0, -math.floor(math.log10(size)))) if size > 0 else 3
