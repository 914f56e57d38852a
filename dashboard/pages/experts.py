"""How the work is shared among experts, layer by layer, and one expert in detail."""

from __future__ import annotations

import re
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.core.pages import Page, pages
from moescope.dashboard import notices
from moescope.dashboard.browser import in_browser
from moescope.dashboard.expert_card import expert_card
from moescope.dashboard.expert_table import expert_table
from moescope.dashboard.records import find_router, layer_of, routers
from moescope.dashboard.side_panel import side_panel
from moescope.dashboard.url_state import Layer, ViewState, decode, link
from moescope.store.run import Run
from moescope.store.store import Store

_TYPED = re.compile(r"L?\s*(\d{1,5})(?:\s+([a-z]+(?:\.\d+)?))?\s*(?:[·.,:/\s-]\s*E?|E)\s*(\d{1,6})", re.IGNORECASE)
_MINIMUM_HEIGHT = 300
_CLEAR = "rgba(0,0,0,0)"


def layout(run: Run, state: ViewState) -> Any:
    """The load map with a ranked table of experts beside it; an expert card opens at the side."""
    known = routers(run)
    if not known:
        return notices.empty(
            "No experts",
            f"{run.name} is a run of a dense model: none of its layers has a router, so there is no load to show. "
            "The token view shows its likelihoods and residual norms.",
        )
    router = find_router(run, state, known)
    box = dmc.TextInput(
        id="expert-box",
        placeholder="L3·E7",
        debounce=True,
        size="xs",
        w=110,
        inputProps={"aria-label": "Go to an expert, for instance L3·E7"},
    )
    return html.Div(
        [
            dcc.Store(id="expert-slice"),
            dcc.Store(id="expert-wanted", data=["layer", "expert"]),
            dcc.Store(id="expert-parts", data=["layer", "expert"]),
            html.Div(
                [
                    html.Div(
                        [
                            html.Div(id="load-heading", className="figure-heading"),
                            html.Div(
                                dmc.Skeleton(height=_MINIMUM_HEIGHT),
                                id="load-map",
                                style={"minHeight": _MINIMUM_HEIGHT},
                            ),
                        ],
                        className="wide-column",
                    ),
                    html.Div(
                        [
                            dmc.Group(
                                [
                                    dmc.Title("Experts by load", order=2, className="section-title"),
                                    dmc.Group([dmc.Text("Go to", className="muted"), box], gap=6),
                                ],
                                justify="space-between",
                                align="flex-start",
                                mb="xs",
                            ),
                            expert_table(
                                run, known, shown=router if state.layer is not None and state.expert is None else None
                            ),
                        ],
                        className="narrow-column",
                    ),
                ],
                className="two-columns",
            ),
            side_panel("expert-drawer"),
        ],
        className="has-detail",
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """The figure after the table; clicks and the typed box into the address; the card from the address."""
    in_browser(
        app,
        "slice",
        Output("expert-slice", "data"),
        Input("url", "search"),
        State("expert-wanted", "data"),
        State("expert-slice", "data"),
    )
    in_browser(app, "row_to_expert", Input("expert-grid", "cellClicked"))
    in_browser(app, "cell_to_expert", Input("load-graph", "clickData"))
    in_browser(app, "closed", Input("expert-drawer", "opened"), State("expert-parts", "data"))

    @app.callback(
        Output("load-map", "children"),
        Output("load-heading", "children"),
        Input("page-run", "data"),
        State("url", "pathname"),
    )
    def draw(name: str, path: str) -> tuple[Any, Any]:
        if path != "/experts":
            raise dash.exceptions.PreventUpdate
        return load_map(store.run(name))

    @app.callback(
        Output("expert-drawer", "opened"),
        Output("expert-drawer", "title"),
        Output("expert-drawer", "children"),
        Output("expert-grid", "selectedRows"),
        Input("expert-slice", "data"),
        State("page-run", "data"),
    )
    def show_card(address: str | None, name: str) -> tuple[bool, Any, Any, Any]:
        state = decode(address)
        if state.expert is None:
            return False, None, None, []
        run = store.run(name)
        known = routers(run)
        router = find_router(run, state, known)
        title = dmc.Text(router.expert_name(state.expert), className="detail-title")
        return (
            True,
            title,
            expert_card(run, router, known, state.expert),
            {"ids": [f"{layer_of(router, known)}:{state.expert}"]},
        )

    @app.callback(
        Output("go-to", "data"),
        Output("expert-box", "error"),
        Input("expert-box", "n_submit"),
        State("expert-box", "value"),
        State("page-run", "data"),
    )
    def go_to_typed(submits: int | None, typed: str | None, name: str) -> tuple[Any, Any]:
        if not submits or not (typed or "").strip():
            raise dash.exceptions.PreventUpdate
        try:
            return link("/experts", typed_expert(store.run(name), typed or "")), None
        except InputError as refused:
            return dash.no_update, str(refused.found or refused.expected or refused)


def load_map(run: Run) -> tuple[Any, Any]:
    """The load figure as a graph, and its finding with its n as text; a refusal where the run has no loads."""
    try:
        result = analyze(run, "load", allow_incomplete=True)
    except InputError as refused:
        return notices.refusal(refused), None
    figure = result.figure(titled=False)
    figure.update_layout(
        margin={"l": 56, "r": 8, "t": 32, "b": 44},
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        font_size=12,
        modebar={"bgcolor": _CLEAR, "color": "#868e96", "activecolor": "#1c7ed6"},
    )
    figure.update_xaxes(title_font_size=12)
    figure.update_yaxes(title_font_size=12)
    figure.update_traces(colorbar_title_font_size=12, selector={"type": "heatmap"})
    graph = dcc.Graph(
        id="load-graph",
        figure=figure,
        responsive=True,
        style={"height": max(_MINIMUM_HEIGHT, figure.layout.height or 0)},
        config={"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"]},
    )
    heading = dmc.Stack(
        [
            dmc.Title(result.title, order=2, className="section-title foreign"),
            dmc.Text(result.subtitle(), className="muted foreign"),
        ],
        gap=2,
    )
    how = dmc.Text(f"{result.definition} Click a cell for the expert's card.", className="muted")
    return [graph, how], heading


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
    Page("Experts", "/experts", "Routing", 20, "How each layer's work is shared among its experts.", layout, callbacks),
)
