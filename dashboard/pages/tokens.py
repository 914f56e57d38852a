"""The text of a run, token by token, coloured by what one layer did with it."""

from __future__ import annotations

import json
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html
from flask import Response, request

from moescope.core.errors import InputError
from moescope.core.pages import Page, pages
from moescope.dashboard import notices
from moescope.dashboard.browser import in_browser, named
from moescope.dashboard.palette import palette
from moescope.dashboard.records import routers
from moescope.dashboard.side_panel import side_panel
from moescope.dashboard.token_card import token_card
from moescope.dashboard.token_colours import painted
from moescope.dashboard.token_controls import controls, defaults, matches, offered_modes
from moescope.dashboard.token_heading import neighbours
from moescope.dashboard.token_path import token_path
from moescope.dashboard.token_table import table_rows, token_table
from moescope.dashboard.token_view import find_part, text_of
from moescope.dashboard.token_window import in_sight
from moescope.dashboard.unrecorded import command
from moescope.dashboard.url_state import Mode, ViewState, decode
from moescope.store.run import Run
from moescope.store.store import Store

_PLACE = ["only", "sequence", "label", "page"]
_FOCUS = ["layer", "expert", "piece", "sae", "feature"]
_PAINT = [*_PLACE, *_FOCUS, "mode", "pins", "other", "change"]
_HELP = (
    "Tokens. Arrow keys move, with Shift they select, Ctrl+C copies, Enter opens the token's card, "
    "N and P go from match to match, square brackets from sequence to sequence."
)
_STORES = (
    "token-part", "token-paint", "token-slice", "token-text", "token-table", "token-window", "token-chosen",
    "token-path-data", "token-neighbours",
)  # fmt: skip
_SLICES = {
    "token-part": [*_PLACE, "layer", "expert", "sae", "feature"],
    "token-paint": _PAINT,
    "token-slice": ["token"],
    "token-table": ["view", *_PLACE, *_FOCUS],
}


def layout(run: Run, state: ViewState) -> Any:
    """Controls, legend and the text or the table; a token card opens at the side."""
    known = routers(run)
    modes = offered_modes(run, known)
    if not modes:
        return notices.empty(
            "No tokens",
            f"{run.name} has no rows in the table tokens, so there is no text to show. Record with the probe tokens.",
            command=command(run, "profile {model} --probe tokens,routing", model=True),
        )
    return html.Div(
        [
            *[dcc.Store(id=name) for name in _STORES],
            *[dcc.Store(id=f"{name}-wanted", data=wanted) for name, wanted in _SLICES.items()],
            dcc.Store(id="token-parts", data=["token"]),
            dcc.Store(id={"defaults": "tokens"}, data=defaults(run, known, modes)),
            dcc.Store(id="token-palette", data=palette()),
            controls(run, known, modes),
            html.Div(id="token-notice"),
            html.Div([html.Div(id="token-heading"), matches()], className="heading-row"),
            html.Div(id="token-legend", className="legend-row"),
            html.Div(
                id="tokview",
                className="tokview mono",
                tabIndex="0",
                role="group",
                **named(_HELP),
            ),
            html.Div(id="token-rows", className="token-rows"),
            side_panel("token-drawer"),
        ],
        className="tokens-page",
        id="tokens-page",
        **_told(run, state, modes),
    )


def _told(run: Run, state: ViewState, modes: list[Mode]) -> dict[str, Any]:
    """What the page's own script and style sheet read from the page."""
    return {
        "data-run": run.name,
        "data-paint": ".".join(_PAINT),
        "data-view": state.given("view", "text"),
        "data-mode": state.mode or modes[0],
    }


def callbacks(app: dash.Dash, store: Store) -> None:
    """Address → text, colours, table, card; controls → address; text and colours → the view in the browser."""
    _in_the_browser(app)

    @app.callback(
        Output("token-text", "data"),
        Output("token-notice", "children"),
        Output("token-neighbours", "data"),
        Input("token-part", "data"),
        State("page-run", "data"),
    )
    def read(address: str | None, name: str) -> tuple[Any, Any, Any]:
        if address is None:
            raise dash.exceptions.PreventUpdate
        run, state = store.run(name), decode(address)
        try:
            beside = neighbours(run, state) if state.sequence is not None else None
            return text_of(run, find_part(run, state)), None, beside
        except InputError as refused:
            return None, notices.refusal(refused), None

    def colours() -> Response:
        """What colours the tokens; asked for by the view itself as soon as the address changes."""
        try:
            state = decode(request.query_string.decode())
            found = painted(store.run(state.run or ""), state).colours
        except InputError:  # the page itself says so
            found = None
        return Response(json.dumps(found), mimetype="application/json")

    app.server.add_url_rule("/tokens/colours", "token-colours", colours)

    @app.callback(
        Output("token-legend", "children"),
        Output("token-heading", "children"),
        Output({"url": "page"}, "total"),
        Input("token-paint", "data"),
        State("page-run", "data"),
    )
    def describe(address: str | None, name: str) -> tuple[Any, Any, int]:
        if address is None:
            raise dash.exceptions.PreventUpdate
        return painted(store.run(name), decode(address).but(run=name))[1:]

    @app.callback(
        Output("token-chosen", "data"),
        Input("token-window", "data"),
        State("page-run", "data"),
    )
    def see(asked: dict[str, Any] | None, name: str) -> Any:
        if asked is None:
            raise dash.exceptions.PreventUpdate
        return in_sight(store.run(name), asked)

    @app.callback(
        Output("token-drawer", "opened"),
        Output("token-drawer", "title"),
        Output("token-drawer", "children"),
        Output("token-path-data", "data"),
        Input("token-slice", "data"),
        State("page-run", "data"),
        State("token-paint", "data"),
    )
    def show_card(address: str | None, name: str, view: str | None) -> tuple[bool, Any, Any, Any]:
        token = decode(address).token
        if token is None:
            return False, None, None, None
        run, state = store.run(name), decode(view).but(run=name, token=token)
        title = dmc.Text(f"Token {token:,}", className="detail-title")
        try:
            return True, title, token_card(run, state), {"token": token, "rows": token_path(run, token, state)}
        except InputError as refused:
            return True, title, notices.refusal(refused), None

    @app.callback(Output("token-rows", "children"), Input("token-table", "data"), State("page-run", "data"))
    def show_table(address: str | None, name: str) -> Any:
        if address is None or decode(address).given("view") != "table":
            return None
        try:
            return token_table(store.run(name), decode(address))
        except InputError as refused:
            return notices.refusal(refused)

    @app.callback(
        Output("token-grid", "getRowsResponse"),
        Input("token-grid", "getRowsRequest"),
        State("token-table", "data"),
        State("page-run", "data"),
        prevent_initial_call=True,
    )
    def rows(asked: dict[str, Any] | None, address: str | None, name: str) -> Any:
        if asked is None:
            raise dash.exceptions.PreventUpdate
        return table_rows(store.run(name), decode(address), asked)


def _in_the_browser(app: dash.Dash) -> None:
    for target in _SLICES:
        wanted = State(f"{target}-wanted", "data")
        name, space = ("part", "tokens") if target == "token-part" else ("slice", "moescope")
        in_browser(
            app, name, Output(target, "data"), Input("url", "search"), wanted, State(target, "data"), space=space
        )
    in_browser(app, "closed", Input("token-drawer", "opened"), State("token-parts", "data"))
    in_browser(app, "show", Input("token-text", "data"), State("token-palette", "data"), space="tokens")
    in_browser(app, "paint", Input("token-paint", "data"), State("page-run", "data"), space="tokens")
    in_browser(app, "find", Input({"url": "q"}, "value"), space="tokens")
    in_browser(app, "select", Input("token-slice", "data"), space="tokens")
    in_browser(app, "chosen", Input("token-chosen", "data"), space="tokens")
    in_browser(app, "beside", Input("token-neighbours", "data"), space="tokens")
    in_browser(app, "path", Input("token-path-data", "data"), space="tokens")
    in_browser(app, "arranged", Input({"url": "view"}, "value"), Input({"url": "mode"}, "value"), space="tokens")


pages.add(
    "tokens",
    Page(
        "Tokens",
        "/tokens",
        "Routing",
        30,
        "The text of the run, token by token, coloured by what a layer did with it.",
        layout,
        callbacks,
    ),
)
