"""How routers decide: balance, consistency, specialization, paths, and what serving the model would cost."""

from __future__ import annotations

from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from moescope.core.errors import MoescopeError
from moescope.core.pages import Page, pages
from moescope.dashboard import notices
from moescope.dashboard.browser import in_browser, named
from moescope.dashboard.panel_tools import part
from moescope.dashboard.records import choices, routers
from moescope.dashboard.routing_page import body, way_tokens
from moescope.dashboard.routing_page.simulators import simulator_callbacks
from moescope.dashboard.routing_page.tabs import TABS
from moescope.dashboard.services import services_of
from moescope.dashboard.side_panel import side_panel
from moescope.dashboard.url_state import ViewState, decode
from moescope.store.run import Run
from moescope.store.store import Store

_ASKED: dict[int, set[tuple[str, str]]] = {}


def layout(run: Run, state: ViewState) -> Any:
    """The row of tabs and the chosen one."""
    if not routers(run) or not run.rows("routing"):
        return body.empty_state(run)
    chosen = body.chosen(run, state)
    return html.Div(
        [
            dcc.Store(id="routing-slice"),
            dcc.Store(id="routing-wanted", data=["tab"]),
            dcc.Store(id="routing-shown", data=chosen.name),
            dcc.Store(id="way-slice"),
            dcc.Store(id="way-wanted", data=["way"]),
            dcc.Store(id="way-parts", data=["way"]),
            html.Nav(
                body.tab_links(run, state, chosen.name), className="tab-links", **named("Questions about routing")
            ),
            html.Div(body.tab_body(run, state, chosen, _asked(run)), id="routing-tab"),
            side_panel("way-drawer"),
        ],
        className="has-detail",
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """Tabs, panels that are asked for, simulators, and the tokens of a way."""
    for target, wanted in (("routing-slice", "routing-wanted"), ("way-slice", "way-wanted")):
        in_browser(
            app, "slice", Output(target, "data"), Input("url", "search"), State(wanted, "data"), State(target, "data")
        )
    in_browser(app, "tab", Input("routing-slice", "data"), space="routing")
    in_browser(app, "way", Input(part("routing-path-map", "graph"), "clickData"), space="routing")
    in_browser(app, "closed", Input("way-drawer", "opened"), State("way-parts", "data"))
    simulator_callbacks(app, store, services_of(app).answers)

    @app.callback(
        Output("routing-tab", "children"),
        Output("routing-shown", "data"),
        Input("routing-slice", "data"),
        State("routing-shown", "data"),
        State("url", "search"),
        State("page-run", "data"),
    )
    def show(address: str | None, shown: str | None, search: str | None, name: str | None) -> tuple[Any, Any]:
        if address is None or name is None or (decode(address).given("tab") or TABS[0].name) == shown:
            raise dash.exceptions.PreventUpdate
        run = store.run(name)
        try:
            state = decode(search)
            tab = body.chosen(run, state)
            return body.tab_body(run, state, tab, _asked(run)), tab.name
        except MoescopeError as refused:
            return notices.refusal(refused), decode(address).given("tab")

    @app.callback(
        Output(body.place(dash.MATCH, "slot"), "children"),
        Input(body.place(dash.MATCH, "compute"), "n_clicks"),
        State("page-run", "data"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def compute(clicks: int | None, name: str, search: str | None) -> Any:
        if not clicks:
            raise dash.exceptions.PreventUpdate
        analysis = dash.callback_context.inputs_list[0]["id"]["routing"]
        run = store.run(name)
        shown = next(each for tab in TABS for each in tab.panels if each.analysis == analysis)
        _ASKED.setdefault(id(store), set()).add((run.run_id, analysis))
        return body.made(run, decode(search), shown, choices(run), eager=True)

    @app.callback(
        Output("way-drawer", "opened"),
        Output("way-drawer", "title"),
        Output("way-drawer", "children"),
        Input("way-slice", "data"),
        State("page-run", "data"),
    )
    def show_way(address: str | None, name: str | None) -> tuple[bool, Any, Any]:
        way = decode(address).given("way")
        if not way or name is None:
            return False, None, None
        run = store.run(name)
        try:
            title, card = way_tokens.way_card(run, way)
        except MoescopeError as refused:
            title, card = "No such way", notices.refusal(refused)
        return True, dmc.Text(title, className="detail-title"), card

    @app.callback(
        Output("path-list", "children"),
        Input(part("routing-paths", "ask"), "data"),
        State("page-run", "data"),
        prevent_initial_call=True,
    )
    def list_paths(ask: dict[str, Any] | None, name: str | None) -> Any:
        if not ask or name is None:
            raise dash.exceptions.PreventUpdate
        try:
            return way_tokens.path_table(services_of(app).answers.ask(ask), store.run(name))
        except MoescopeError:
            return None


def _asked(run: Run) -> set[str]:
    """Analyses of a run that someone has asked for although they take long."""
    return {analysis for run_id, analysis in _ASKED.get(id(run.store), set()) if run_id == run.run_id}


pages.add(
    "routing",
    Page(
        "Routing",
        "/routing",
        "Routing",
        21,
        "How routers decide: against chance, along the text and the layers, and what it would cost to serve.",
        layout,
        callbacks,
    ),
)
