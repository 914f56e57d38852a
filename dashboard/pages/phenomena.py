"""Massive activations, super experts, sinks and retrieval heads, and the chain between them."""

from __future__ import annotations

import math
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from moescope.core.errors import InputError
from moescope.core.pages import Page, pages
from moescope.dashboard import notices
from moescope.dashboard.answers import Answers
from moescope.dashboard.browser import in_browser
from moescope.dashboard.phenomena_page import answers_shown, sections
from moescope.dashboard.phenomena_page.head_card import head_card
from moescope.dashboard.phenomena_page.head_scores import Head, find_head
from moescope.dashboard.phenomena_page.recorded import recorded
from moescope.dashboard.records import routers
from moescope.dashboard.services import services_of
from moescope.dashboard.side_panel import side_panel
from moescope.dashboard.url_state import ViewState, decode
from moescope.store.run import Run
from moescope.store.store import Store

_SLICES = {
    "head": ["layer", "head", "edits", "sae", "feature", "expert"],
    "token": ["token"],
    "scores": ["measure", "condition"],
}


def layout(run: Run, state: ViewState) -> Any:
    """The chain on top, then its links from the first to the last; a head's card opens at the side."""
    has = recorded(run)
    if has.nothing:
        return sections.nothing(run)
    stores: list[Any] = [dcc.Store(id=f"phenomena-{name}") for name in _SLICES]
    stores += [dcc.Store(id=f"phenomena-{name}-wanted", data=wanted) for name, wanted in _SLICES.items()]
    return html.Div(
        [
            *stores,
            dcc.Store(id="phenomena-run", data=run.name),
            dcc.Store(id="head-parts", data=["head"]),
            dcc.Store(id={"defaults": "phenomena"}, data={"by": "position"}),
            sections.chain(run, has),
            sections.massive(run, has),
            sections.super_experts(run, has, moe=bool(routers(run))),
            sections.heads(run, has, state),
            side_panel("head-drawer"),
        ],
        className="has-detail phenomena-page",
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """Verdicts and tables after the page is there; clicks into the address; the card from the address."""
    for name in _SLICES:
        in_browser(
            app,
            "slice",
            Output(f"phenomena-{name}", "data"),
            Input("url", "search"),
            State(f"phenomena-{name}-wanted", "data"),
            State(f"phenomena-{name}", "data"),
        )
    in_browser(app, "row_to_head", Input("head-grid", "cellClicked"), space="inside")
    in_browser(app, "closed", Input("head-drawer", "opened"), State("head-parts", "data"))
    _filled(app, store)

    @app.callback(
        Output("head-drawer", "opened"),
        Output("head-drawer", "title"),
        Output("head-drawer", "children"),
        Input("phenomena-head", "data"),
        State("phenomena-run", "data"),
    )
    def show_head(address: str | None, name: str | None) -> tuple[bool, Any, Any]:
        if address is None or name is None:
            raise dash.exceptions.PreventUpdate
        state = decode(address)
        if state.head is None:
            return False, None, None
        run = store.run(name)
        try:
            head = find_head(run, state)
        except InputError as refused:
            return True, dmc.Text(f"H{state.head}", className="detail-title"), notices.refusal(refused)
        if head is None:
            return False, None, None
        group = _group(services_of(app).answers, run, head)
        title = dmc.Text(head.name, className="detail-title")
        return True, title, head_card(run, head, state.but(run=run.name), group)


def _filled(app: dash.Dash, store: Store) -> None:
    """Callbacks that fill in tables and text."""

    @app.callback(Output("chain-verdicts", "children"), Input("phenomena-run", "data"))
    def tell(name: str | None) -> Any:
        if name is None:
            raise dash.exceptions.PreventUpdate
        return answers_shown.chain_verdicts(services_of(app).answers, name)

    @app.callback(Output("super-experts", "children"), Input("phenomena-run", "data"))
    def judge(name: str | None) -> Any:
        if name is None:
            raise dash.exceptions.PreventUpdate
        return answers_shown.super_expert_table(services_of(app).answers, name)

    @app.callback(Output("head-table", "children"), Input("phenomena-scores", "data"), State("phenomena-run", "data"))
    def lead(address: str | None, name: str | None) -> Any:
        if address is None or name is None:
            raise dash.exceptions.PreventUpdate
        return answers_shown.head_table(services_of(app).answers, name, decode(address))

    @app.callback(Output("massive-token", "children"), Input("phenomena-token", "data"), State("phenomena-run", "data"))
    def show_token(address: str | None, name: str | None) -> Any:
        if address is None or name is None:
            raise dash.exceptions.PreventUpdate
        token = decode(address).token
        return None if token is None else answers_shown.token_shown(store.run(name), token)


def _group(answers: Answers, run: Run, head: Head) -> list[int] | None:
    """Query heads that read the same key-value head; None where no run of the model tells."""
    rows = answers.ask({"analysis": "head_map", "runs": [run.name], "given": {}}).table.to_pylist()
    mine = [row for row in rows if (row["layer"], row["block"]) == (head.layer, head.block)]
    group = next((row["group"] for row in mine if row["head"] == head.head), None)
    return None if group is None or math.isnan(group) else [row["head"] for row in mine if row["group"] == group]


pages.add(
    "phenomena",
    Page(
        "Phenomena",
        "/phenomena",
        "Inside",
        40,
        "Massive activations, super experts, sinks and heads: where they are, and what depends on them.",
        layout,
        callbacks,
    ),
)
