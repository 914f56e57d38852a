"""A panel: one analysis on a page, computed when it comes into view, with its finding as its heading.

The figure is the one that the analysis draws for notebooks and reports; nothing here computes or draws a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import dash
import dash_mantine_components as dmc
from dash import ALL, MATCH, Input, Output, State, dcc, html

from moescope.core.errors import MoescopeError
from moescope.core.result import Result
from moescope.dashboard import notices, panel_tools
from moescope.dashboard.answers import Answers
from moescope.dashboard.browser import attributes, in_browser
from moescope.dashboard.figure_look import GRAPH, dressed, for_image
from moescope.dashboard.panel_tools import part
from moescope.store.run import Run
from moescope.store.store import Store

Click = Literal["expert", "head", "layer", "feature", "label", "token", "sequence"]
"""What a click on a mark of the figure selects: names such as `L3`, `E7`, `H2` are read from its axes and hover text."""

HEIGHT = 360


def panel(
    identity: str,
    analysis: str,
    runs: Sequence[Run],
    *,
    given: Mapping[str, Any] | None = None,
    wanted: Mapping[str, str] | None = None,
    click: Click | None = None,
    height: int = HEIGHT,
    eager: bool = False,
) -> Any:
    """A place for one analysis; it is asked for when it comes into view, and again when the address changes what it reads.

    Args:
        identity: unique on the page, in plain letters and digits.
        analysis: its name in the registry.
        runs: as many as the analysis takes.
        given: parameters that stay.
        wanted: parameter of the address → parameter of the analysis; left out where the address does not have it.
        click: what a click on the figure puts into the address.
        height: of the figure until its own is known, in pixels.
        eager: ask at once, in view or not.
    """
    spec = {
        "analysis": analysis,
        "runs": [run.name for run in runs],
        "given": dict(given or {}),
        "wanted": dict(wanted or {}),
        "click": click,
        "eager": eager,
        "height": height,
    }
    return html.Section(
        [
            dcc.Store(id=part(identity, "spec"), data=spec),
            dcc.Store(id=part(identity, "ask")),
            html.Div(id=part(identity, "heading"), className="panel-heading"),
            dcc.Loading(
                html.Div(
                    dmc.Skeleton(height=height),
                    id=part(identity, "body"),
                    className="panel-body",
                    style={"minHeight": height},
                ),
                delay_show=150,
                overlay_style={"visibility": "visible", "opacity": 0.5},
                custom_spinner=html.Div(
                    f"Computing {analysis.replace('_', ' ')} …", className="computing", role="status"
                ),
            ),
            panel_tools.tools(identity),
        ],
        className="panel",
        **attributes(data_panel=identity, data_analysis=analysis, data_runs="-".join(run.name for run in runs)),
    )


def panel_callbacks(app: dash.Dash, store: Store, answers: Answers) -> None:
    """Ask for what is in view, and show the answers."""
    in_browser(
        app,
        "ask",
        Output(part(ALL, "ask"), "data"),
        Input("url", "search"),
        Input("panels-seen", "data"),
        Input(part(ALL, "spec"), "data"),
        State(part(ALL, "ask"), "data"),
        space="panels",
    )
    in_browser(
        app,
        "clicked",
        Input(part(MATCH, "graph"), "clickData"),
        State(part(MATCH, "spec"), "data"),
        space="panels",
    )

    @app.callback(
        Output(part(MATCH, "heading"), "children"),
        Output(part(MATCH, "body"), "children"),
        Input(part(MATCH, "ask"), "data"),
        State(part(MATCH, "spec"), "data"),
    )
    def fill(ask: dict[str, Any] | None, spec: dict[str, Any] | None) -> tuple[Any, Any]:
        if ask is None or spec is None:
            raise dash.exceptions.PreventUpdate
        identity = dash.callback_context.inputs_list[0]["id"]["panel"]
        return shown(answers, identity, ask, spec["height"])

    panel_tools.callbacks(app, store, answers)


def shown(answers: Answers, identity: str, ask: Mapping[str, Any], height: int) -> tuple[Any, Any]:
    """Heading and body of a panel: the finding and its figure, or why there is none."""
    try:
        result = answers.ask(ask)
    except MoescopeError as refused:
        return None, notices.refusal(refused)
    return heading(result), body(identity, result, height, store=answers.store)


def heading(result: Result) -> Any:
    """The finding, with its n, as text, and what a reader must know before trusting it."""
    lines = [
        dmc.Title(result.title, order=2, className="section-title foreign"),
        dmc.Text(result.subtitle(), className="muted foreign"),
    ]
    if result.incomplete:
        partial = "The run is incomplete: these numbers rest on part of what it should hold."
        lines.append(notices.beside(partial, warning=True))
    if result.notes:
        lines.append(notices.beside(*result.notes))
    return dmc.Stack(lines, gap=2)


def body(identity: str, result: Result, height: int = HEIGHT, *, store: Store) -> Any:
    """The figure of a result as a graph, or its table where it has none."""
    if not result.has_figure:
        return html.Div(panel_tools.table(identity, result, store), className="panel-answer no-figure")
    whole = result.figure()
    figure = for_image(dressed(result.figure(titled=False)), whole)
    graph = dcc.Graph(
        id=part(identity, "graph"),
        figure=figure,
        responsive=True,
        style={"height": figure.layout.height or height},
        config=GRAPH,
    )
    return html.Div(graph, className="panel-answer")
