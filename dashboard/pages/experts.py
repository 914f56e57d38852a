"""Every expert of the model by any measure, and each expert in detail."""

from __future__ import annotations

import re
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from moescope.core.errors import InputError, MoescopeError
from moescope.core.pages import Page, pages
from moescope.dashboard import notices
from moescope.dashboard.browser import HIDDEN, in_browser, named
from moescope.dashboard.expert_card import card_callbacks, expert_card
from moescope.dashboard.expert_compare import comparison
from moescope.dashboard.expert_controls import controls, rank_control
from moescope.dashboard.expert_table import check, expert_rows, expert_table, ranked, table_words
from moescope.dashboard.panel import panel
from moescope.dashboard.records import Router, find_router, layer_of, routers
from moescope.dashboard.services import services_of
from moescope.dashboard.side_panel import side_panel
from moescope.dashboard.url_state import Layer, ViewState, decode, link
from moescope.store.run import Run
from moescope.store.store import Store

_TYPED = re.compile(r"L?\s*(\d{1,5})(?:\s+([a-z]+(?:\.\d+)?))?\s*(?:[·.,:/\s-]\s*E?|E)\s*(\d{1,6})", re.IGNORECASE)
_LARGE = 64
_ASIDE = {"visibility": "hidden", "position": "fixed", "left": "-9999px", "width": "1000px"}
"""Out of sight and reach; the grid keeps a width, without which it complains."""
_SLICES = {
    "expert-slice": ["layer", "expert", "view"],
    "expert-table-slice": ["measure", "label", "other", "only", "rank"],
    "expert-pins-slice": ["pinned", "pins", "layer"],
}


def layout(run: Run, state: ViewState) -> Any:
    """The atlas with a ranked table of experts beside it, below it for a large model; a card opens at the side."""
    known = routers(run)
    if not known:
        return notices.empty(
            "No experts",
            f"{run.name} is a run of a dense model: none of its layers has a router, so there is no load to show. "
            "The token view shows its likelihoods and residual norms.",
        )
    find_router(run, state, known)
    check(_search(state))
    large = max(router.experts for router in known) > _LARGE
    stores = [dcc.Store(id=name) for name in _SLICES] + [
        dcc.Store(id=f"{name}-wanted", data=wanted) for name, wanted in _SLICES.items()
    ]
    rows = expert_rows(run, known)
    table = html.Div(
        [
            dcc.Store(id="expert-table-shown", data="?"),
            dmc.Group(
                [
                    html.Div(
                        [
                            dmc.Title("Experts ranked", order=2, className="section-title"),
                            html.Div(
                                table_words(len(rows), lowest=False),
                                id="expert-table-words",
                                className="muted",
                                role="status",
                            ),
                        ]
                    ),
                    rank_control(),
                ],
                justify="space-between",
                align="flex-start",
                mb="xs",
            ),
            expert_table(rows),
        ],
    )
    body = html.Div(
        [
            controls(run, known),
            html.Div(
                [html.Div(_atlas(run, known)), table],
                className="experts-columns stacked" if large else "two-columns experts-columns",
            ),
        ],
        id="expert-main",
        style=_ASIDE if _full(state) else {},
    )
    full = html.Div(id="expert-full", style={} if _full(state) else {"display": "none"})
    return html.Div(
        [*stores, html.Div(id="expert-pins"), body, full, side_panel("expert-drawer")],
        className="has-detail",
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """The address decides what is shown; clicks, keys and the typed box write it."""
    answers = services_of(app).answers
    for name in _SLICES:
        in_browser(
            app,
            "slice",
            Output(name, "data"),
            Input("url", "search"),
            State(f"{name}-wanted", "data"),
            State(name, "data"),
        )
    in_browser(app, "row_to_expert", Input("expert-grid", "cellClicked"))
    in_browser(app, "closed", Input("expert-drawer", "opened"), space="experts")
    in_browser(app, "follow", Output("atlas-line", "title"), Input("url", "search"), space="experts")
    in_browser(app, "label_shown", Output("atlas-label", "style"), Input({"url": "measure"}, "value"), space="experts")
    in_browser(app, "unpin", Input("experts-unpin", "n_clicks"), space="experts")
    card_callbacks(app, store)

    @app.callback(
        Output("expert-drawer", "opened"),
        Output("expert-drawer", "title"),
        Output("expert-drawer", "children"),
        Output("expert-full", "children"),
        Output("expert-full", "style"),
        Output("expert-main", "style"),
        Output("expert-grid", "selectedRows"),
        Input("expert-slice", "data"),
        State("page-run", "data"),
    )
    def show_card(address: str | None, name: str) -> tuple[Any, ...]:
        if address is None:
            raise dash.exceptions.PreventUpdate
        return card(store.run(name), decode(address))

    @app.callback(
        Output("expert-grid", "columnDefs"),
        Output("expert-grid", "rowData"),
        Output("expert-table-words", "children"),
        Output("expert-table-shown", "data"),
        Input("expert-table-slice", "data"),
        State("expert-table-shown", "data"),
        State("page-run", "data"),
    )
    def rank(address: str | None, shown: str, name: str) -> tuple[Any, Any, Any, str]:
        if address is None or address == shown:
            raise dash.exceptions.PreventUpdate
        run = store.run(name)
        try:
            columns, rows, words = ranked(answers, run, routers(run), address)
        except MoescopeError as refused:
            columns, rows, words = ranked(answers, run, routers(run), "")
            words = f"{words}, by load: {refused.problem}"
        return columns, rows, words, address

    @app.callback(Output("expert-pins", "children"), Input("expert-pins-slice", "data"), State("page-run", "data"))
    def pins(address: str | None, name: str) -> Any:
        if address is None:
            raise dash.exceptions.PreventUpdate
        run = store.run(name)
        return comparison(answers, run, address, routers(run))

    @app.callback(
        Output("go-to", "data"),
        Output("expert-box", "error"),
        Input("expert-box", "n_submit"),
        State("expert-box", "value"),
        State("page-run", "data"),
        State("url", "search"),
    )
    def go_to_typed(submits: int | None, typed: str | None, name: str, search: str | None) -> tuple[Any, Any]:
        if not submits or not (typed or "").strip():
            raise dash.exceptions.PreventUpdate
        try:
            found = typed_expert(store.run(name), typed or "")
        except InputError as refused:
            return dash.no_update, str(refused.found or refused.expected or refused)
        return link("/experts", decode(search).but(run=found.run, layer=found.layer, expert=found.expert)), None


def card(run: Run, state: ViewState) -> tuple[Any, ...]:
    """What the page shows of the expert of an address: drawer open, its title, its card, the full card, what is hidden.

    A card that is put away stays where it is, out of sight: callbacks that wait for the address still find its parts.
    """
    stays = dash.no_update
    hidden = {"display": "none"}
    if state.expert is None:
        return False, stays, stays, stays, hidden, {}, []
    known = routers(run)
    router = find_router(run, state, known)
    selected = {"ids": [f"{layer_of(router, known)}:{state.expert}"]}
    if _full(state):
        back = dmc.Anchor("← All experts", href=link("/experts", ViewState(run=run.name)), size="sm")
        heading = dmc.Title(router.expert_name(state.expert), order=2, className="detail-title")
        full = html.Div(
            [dmc.Group([heading, back], gap="md"), expert_card(run, router, known, state.expert, wide=True)]
        )
        return False, stays, stays, full, {}, _ASIDE, selected
    title = dmc.Text(router.expert_name(state.expert), className="detail-title")
    return True, title, expert_card(run, router, known, state.expert), stays, hidden, {}, selected


def _full(state: ViewState) -> bool:
    return state.expert is not None and state.given("view") == "card"


def _search(state: ViewState) -> str:
    return link("", ViewState(rest=state.rest))


def _atlas(run: Run, known: list[Router]) -> Any:
    """The map with its line to read a cell from, and what marks the cell."""
    height = max(300, min(710, 200 + 28 * len(known)))
    shown = panel(
        "atlas",
        "expert_atlas",
        [run],
        wanted={"measure": "measure", "sort": "sort", "label": "label", "other": "other"},
        click="expert",
        height=height,
    )
    marks = [html.Div(className=f"atlas-{name}", **HIDDEN) for name in ("row", "column", "cell", "selected")]
    return html.Div(
        [
            html.Div(
                "Point at a cell, or focus the map: arrow keys move, Enter opens the card.",
                id="atlas-line",
                className="atlas-line foreign",
                role="status",
            ),
            html.Div(
                [shown, *marks],
                id="atlas",
                className="atlas",
                tabIndex="0",
                role="group",
                **named("Map of experts: arrow keys move the cell, Enter opens its card"),
            ),
        ]
    )


def typed_expert(run: Run, typed: str) -> ViewState:
    """What `L3·E7`, `L3E7`, `3.7` or `L3 attn·E7` means in a run.

    Raises:
        InputError: it is no expert's name, or the run has no such expert.
    """
    match = _TYPED.fullmatch(typed.strip())
    if match is None:
        raise InputError(f"{typed!r} is not the name of an expert", expected="a layer and an expert: L3·E7")
    layer, block, expert = match.groups()
    state = ViewState(run=run.name, layer=Layer(int(layer), block.lower() if block else None), expert=int(expert))
    find_router(run, state, routers(run))
    return state


pages.add(
    "experts",
    Page(
        "Experts",
        "/experts",
        "Routing",
        20,
        "Every expert by any measure; one expert in detail, with its tokens.",
        layout,
        callbacks,
    ),
)
