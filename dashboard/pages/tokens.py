"""The text of a run, token by token, coloured by what one layer did with it."""

from __future__ import annotations

from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

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
from moescope.dashboard.token_view import find_part, text_of
from moescope.dashboard.url_state import ViewState, decode
from moescope.store.run import Run
from moescope.store.store import Store

_PART = ["sequence", "label", "page"]
_PAINT = [*_PART, "layer", "mode", "expert", "piece", "pins"]


def layout(run: Run, state: ViewState) -> Any:
    """Controls, legend and the text; a token card opens at the side."""
    known = routers(run)
    modes = offered_modes(run, known)
    if not modes:
        return notices.empty(
            "No tokens",
            f"{run.name} has no rows in the table tokens, so there is no text to show. Record with the probe tokens.",
        )
    return html.Div(
        [
            *[
                dcc.Store(id=name)
                for name in ("token-part", "token-paint", "token-slice", "token-text", "token-colours")
            ],
            dcc.Store(id="part-wanted", data=_PART),
            dcc.Store(id="paint-wanted", data=_PAINT),
            dcc.Store(id="token-wanted", data=["token"]),
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
                **named("Tokens. Arrow keys move, Enter opens the token's card."),
            ),
            side_panel("token-drawer"),
        ],
        className="tokens-page",
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """Address → text, colours, card; controls → address; text and colours → the view in the browser."""
    for target, wanted in (
        ("token-part", "part-wanted"),
        ("token-paint", "paint-wanted"),
        ("token-slice", "token-wanted"),
    ):
        in_browser(
            app, "slice", Output(target, "data"), Input("url", "search"), State(wanted, "data"), State(target, "data")
        )
    in_browser(app, "closed", Input("token-drawer", "opened"), State("token-parts", "data"))
    in_browser(
        app,
        "show",
        Input("token-text", "data"),
        Input("token-colours", "data"),
        State("token-palette", "data"),
        space="tokens",
    )
    in_browser(app, "find", Input({"url": "q"}, "value"), space="tokens")
    in_browser(app, "select", Input("token-slice", "data"), space="tokens")

    @app.callback(
        Output("token-text", "data"),
        Output("token-notice", "children"),
        Input("token-part", "data"),
        State("page-run", "data"),
    )
    def read(address: str | None, name: str) -> tuple[Any, Any]:
        if address is None:
            raise dash.exceptions.PreventUpdate
        run = store.run(name)
        try:
            return text_of(run, find_part(run, decode(address))), None
        except InputError as refused:
            return None, notices.refusal(refused)

    @app.callback(
        Output("token-colours", "data"),
        Output("token-legend", "children"),
        Output("token-heading", "children"),
        Output({"url": "page"}, "total"),
        Input("token-paint", "data"),
        State("page-run", "data"),
    )
    def paint(address: str | None, name: str) -> tuple[Any, Any, Any, int]:
        if address is None:
            raise dash.exceptions.PreventUpdate
        return painted(store.run(name), decode(address))

    @app.callback(
        Output("token-drawer", "opened"),
        Output("token-drawer", "title"),
        Output("token-drawer", "children"),
        Input("token-slice", "data"),
        State("page-run", "data"),
        State("token-paint", "data"),
    )
    def show_card(address: str | None, name: str, view: str | None) -> tuple[bool, Any, Any]:
        token = decode(address).token
        if token is None:
            return False, None, None
        state = decode(view).but(run=name, token=token)
        return True, dmc.Text(f"Token {token:,}", className="detail-title"), token_card(store.run(name), state)


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
