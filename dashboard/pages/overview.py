"""What is in the store, what stands out in a run, and whether all of it was recorded."""

from __future__ import annotations

from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from moescope.core.analysis import analyses
from moescope.core.pages import Page, pages
from moescope.dashboard.browser import in_browser
from moescope.dashboard.overview import effects_list, findings_list, ledger, provenance, runs_grid
from moescope.dashboard.overview.anatomy_section import anatomy_section, layer_links
from moescope.dashboard.overview.value_cards import value_cards
from moescope.dashboard.panel import panel
from moescope.dashboard.records import routers
from moescope.dashboard.services import services_of
from moescope.dashboard.url_state import ViewState, decode, link
from moescope.store.run import Run
from moescope.store.store import Store

_ADDRESS = ["finding", "effect", "layer"]


def layout(run: Run, state: ViewState) -> Any:
    """Value cards, all runs, findings, the anatomy map, effects, the ledger and where the numbers come from."""
    info = run.info
    plain = ViewState(run=run.name)
    known = routers(run)
    return dmc.Stack(
        [
            dcc.Store(id="ov-run", data=run.name),
            dcc.Store(id="ov-wanted", data=_ADDRESS),
            dcc.Store(id="ov-slice"),
            dmc.SimpleGrid(value_cards(run, info, known, plain), cols={"base": 2, "sm": 3, "lg": 5}, spacing="md"),
            runs_grid.runs_grid(run),
            findings_list.findings_section(run),
            anatomy_section(run),
            html.Div(dmc.Skeleton(height=120), id="ov-effects-section"),
            ledger.ledger(run, known, plain),
            provenance.provenance(run, info, moe=bool(known)),
            ledger.anatomy(run, known, plain),
        ],
        gap="xl",
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """What comes after the page is shown: sizes and NLL, findings, effects, the panel of a chosen finding."""
    services = services_of(app)
    in_browser(
        app,
        "slice",
        Output("ov-slice", "data"),
        Input("url", "search"),
        State("ov-wanted", "data"),
        State("ov-slice", "data"),
    )
    in_browser(
        app,
        "ticked",
        Output("ov-compare", "children"),
        Output("ov-compare", "disabled"),
        Input("ov-runs", "selectedRows"),
        space="overview",
    )
    in_browser(app, "compare", Input("ov-compare", "n_clicks"), State("ov-runs", "selectedRows"), space="overview")
    in_browser(app, "reveal", Input("ov-finding-panel", "children"), space="overview")
    in_browser(app, "begin", Input("ov-plan", "data"), Input("ov-more", "n_clicks"), space="overview")
    in_browser(app, "cancel", Input("ov-cancel", "n_clicks"), State("ov-plan", "data"), space="overview")
    in_browser(
        app,
        "take",
        Output("ov-findings", "rowData"),
        Output("ov-held", "data"),
        Input("ov-part", "data"),
        State("ov-held", "data"),
        State("ov-plan", "data"),
        space="overview",
    )

    @app.callback(Output("ov-runs", "rowData"), Input("ov-run", "data"))
    def measure_runs(name: str | None) -> Any:
        return runs_grid.measured(store, _present(name))

    @app.callback(Output("ov-effects-section", "children"), Input("ov-run", "data"))
    def show_effects(name: str | None) -> Any:
        run = store.run(_present(name))
        return effects_list.effects_section(services.answers, run)

    @app.callback(Output("ov-plan", "data"), Input("ov-run", "data"))
    def plan_findings(name: str | None) -> Any:
        return findings_list.plan(store.run(_present(name)))

    @app.callback(Output("ov-part", "data"), Input("ov-next", "data"))
    def ask_some(following: dict[str, Any] | None) -> Any:
        if not following:
            raise dash.exceptions.PreventUpdate
        run = store.run(following["run"])
        return findings_list.step(services.answers, run, following["names"], following["at"]) | {
            "round": following["round"]
        }

    @app.callback(
        Output("ov-finding-panel", "children"),
        Output("ov-layer", "children"),
        Input("ov-slice", "data"),
        State("ov-run", "data"),
    )
    def show_chosen(address: str | None, name: str | None) -> tuple[Any, Any]:
        run, state = store.run(_present(name)), decode(address)
        return chosen_finding(run, state), layer_links(run, state.layer)


def chosen_finding(run: Run, state: ViewState) -> Any:
    """The panel of the finding that the address names, and a way to close it."""
    name = state.given("finding")
    if not name:
        return None
    analysis = analyses[name]
    given = {"effect": state.given("effect")} if name == "effect" and state.given("effect") else {}
    close = dmc.Anchor("Close", href=link("/", ViewState(run=run.name)), size="sm")
    identity = "finding" + "".join(c for c in name + state.given("effect") if c.isalnum())
    return html.Div(
        [
            html.Div([dmc.Text(analysis.summary, className="muted"), close], className="ov-finding-head"),
            panel(identity, name, [run], given=given, eager=True),
        ],
        className="ov-chosen",
    )


def _present(name: str | None) -> str:
    if not name:
        raise dash.exceptions.PreventUpdate
    return name


pages.add(
    "overview",
    Page(
        "Overview",
        "/",
        "Run",
        10,
        "What is in the store, what stands out, and whether all of it was recorded.",
        layout,
        callbacks,
    ),
)
