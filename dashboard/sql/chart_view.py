"""The chart of a query's answer on the page."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import dcc

from moescope.dashboard.figure_look import GRAPH, dressed
from moescope.dashboard.sql.chart import Choice, chart_of
from moescope.dashboard.sql.outcome import Outcome

# The tool bar may save the picture here: no panel's buttons stand below.
_CONFIG: Any = {**GRAPH, "modeBarButtonsToRemove": [b for b in GRAPH["modeBarButtonsToRemove"] if b != "toImage"]}


def drawn(outcome: Outcome, choice: Choice, *, sql: str) -> Any:
    """Heading and graph; raises `InputError` for what cannot be drawn."""
    result = chart_of(outcome, choice, sql=sql)
    figure = dressed(result.figure(titled=False))
    return dmc.Stack(
        [
            dmc.Title(result.title, order=2, className="section-title foreign", id="sql-chart-title"),
            dmc.Text(result.subtitle(), className="muted"),
            dcc.Graph(
                id="sql-graph",
                figure=figure,
                responsive=True,
                style={"height": figure.layout.height},
                config=_CONFIG,
            ),
        ],
        gap=2,
    )
