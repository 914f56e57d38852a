"""Sparse autoencoders of the store: how good they are, what their latents fire on, and which experts write them."""

from __future__ import annotations

from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from moescope.core.errors import MoescopeError
from moescope.core.pages import Page, pages
from moescope.dashboard import cards, notices
from moescope.dashboard.browser import in_browser, named
from moescope.dashboard.features_page.feature_view import feature_view
from moescope.dashboard.features_page.latents import LatentLists, page
from moescope.dashboard.features_page.lists import latent_grid, sae_grid
from moescope.dashboard.features_page.readings import Reading, chosen_reading, sae_rows
from moescope.dashboard.features_page.tabs import TABS, tab
from moescope.dashboard.numbers import count
from moescope.dashboard.services import services_of
from moescope.dashboard.unrecorded import command, copied, quoted, unrecorded
from moescope.dashboard.url_state import ViewState, decode, link
from moescope.store.run import Run
from moescope.store.store import Store

_WANTED = ["run", "sae", "feature", "tab", "edits", "layer", "expert", "head", "token"]
_NAMES = dict(TABS)


def layout(run: Run, state: ViewState) -> Any:
    """The autoencoders of the store; below them the latents of the chosen one, or one latent."""
    rows = sae_rows(run.store)
    if not rows:
        return html.Div(
            dmc.Stack(
                [
                    dmc.Title("No SAE for this store yet", order=2, className="section-title"),
                    dmc.Text(
                        "A sparse autoencoder writes the vectors of one place in the model as a few of many latents. With one, this page "
                        "lists what each latent fires on, which experts write it, and lets you steer by it. Train one and read its "
                        "features in one go:",
                        className="muted",
                    ),
                    copied(command(run, "sae study {model} --site blocks.0.hook_mlp_out", model=True)),
                    dmc.Text(
                        "The store must not be open elsewhere meanwhile. `moescope sae import` takes a published one.",
                        className="muted",
                    ),
                ],
                gap="sm",
            ),
            className="empty left",
        )
    chosen_reading(rows, run, state)  # refuses an autoencoder that is not there
    return html.Div(
        [
            dcc.Store(id="features-run", data=run.name),
            dcc.Store(id="features-slice"),
            dcc.Store(id="features-wanted", data=_WANTED),
            dcc.Store(id="latents-search"),
            dcc.Store(id="latents-wanted", data=["q"]),
            dcc.Store(id={"defaults": "features"}, data={"tab": "latents"}),
            cards.section(
                "Autoencoders of this store",
                sae_grid(rows, state),
                note="They belong to the store, their numbers to the run that they were read or judged on.",
            ),
            html.Div(id="features-body", style={"minHeight": 600}),
        ],
        className="features-page",
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """The body from the address; rows of the list as they come into view."""
    in_browser(
        app,
        "slice",
        Output("features-slice", "data"),
        Input("url", "search"),
        State("features-wanted", "data"),
        State("features-slice", "data"),
    )
    in_browser(
        app,
        "slice",
        Output("latents-search", "data"),
        Input("url", "search"),
        State("latents-wanted", "data"),
        State("latents-search", "data"),
    )
    in_browser(app, "row_to_feature", Input("latent-grid", "cellClicked"), space="inside")
    in_browser(app, "search_again", Input("latents-search", "data"), space="inside")
    lists = LatentLists()

    @app.callback(Output("features-body", "children"), Input("features-slice", "data"), State("features-run", "data"))
    def show(address: str | None, name: str | None) -> Any:
        if address is None or name is None:
            raise dash.exceptions.PreventUpdate
        try:
            return body(store.run(name), decode(address))
        except MoescopeError as refused:
            return notices.refusal(refused)

    @app.callback(
        Output("latent-grid", "getRowsResponse"),
        Output("latent-count", "children"),
        Input("latent-grid", "getRowsRequest"),
        State("url", "search"),
        State("features-run", "data"),
    )
    def rows_of(request: dict[str, Any] | None, search: str | None, name: str | None) -> tuple[Any, Any]:
        if request is None or name is None:
            raise dash.exceptions.PreventUpdate
        state = decode(search)
        reading = chosen_reading(sae_rows(store), store.run(name), state)
        if reading is None or not reading.read or reading.run is None:
            return {"rowData": [], "rowCount": 0}, ""
        frame = lists.of(store.run(reading.run), reading, services_of(app).answers.revision)
        found = page(
            frame,
            text=state.q,
            sort=request.get("sortModel"),
            filters=request.get("filterModel"),
            start=int(request.get("startRow") or 0),
            end=int(request.get("endRow") or 100),
        )
        told = (
            f"{count(found.found)} of {count(len(frame))} latents"
            if found.found < len(frame)
            else f"{count(found.found)} latents"
        )
        return {"rowData": found.rows, "rowCount": found.found}, told


def body(run: Run, state: ViewState) -> Any:
    """What stands below the list of autoencoders.

    Raises:
        InputError: an autoencoder, latent or tab that is not there.
    """
    reading = chosen_reading(sae_rows(run.store), run, state)
    if reading is None:
        return None
    holder = run.store.run(reading.run) if reading.run is not None else None
    if holder is None:
        words = f"sae judge --sae {quoted(reading.name)} --model {{model}}"
        return unrecorded(
            f"Numbers of {reading.name}",
            "It was neither judged nor read on any run of this store: its quality and what its latents fire on would stand here.",
            command(run, words, model=True),
        )
    state = state.but(sae=reading.name)
    whose = _whose(reading, holder, run, state)
    if state.feature is not None:
        if not reading.read:
            return [whose, _unread(reading, holder)]
        return [whose, feature_view(holder, reading, state.feature, state)]
    name = state.given("tab", "latents")
    if name not in _NAMES:
        name = "latents"
    bar = dmc.SegmentedControl(
        id={"url": "tab"},
        data=[{"value": value, "label": label} for value, label in TABS],
        value=name,
        size="xs",
        **named("What to show of the autoencoder"),
    )
    parts: list[Any] = [whose, html.Div(bar, className="tab-row")]
    if name == "latents":
        title: list[Any] = ["Latents of ", html.Span(reading.name, className="foreign")]
        listed = latent_grid(holder, reading) if reading.read else _unread(reading, holder)
        parts.append(html.Section([html.H2(title, className="section-title"), listed], className="section"))
        return [*parts, *([tab(name, holder, reading)] if reading.read else [])]
    return [*parts, tab(name, holder, reading)]


def _whose(reading: Reading, holder: Run, run: Run, state: ViewState) -> Any:
    """Which autoencoder, read on which run."""
    words: list[Any] = [
        html.Span(reading.name, className="foreign strong"),
        f" at {reading.site}; every number below is from run ",
        html.Span(holder.name, className="foreign strong"),
    ]
    if holder.run_id != run.run_id:
        words += [
            ", not from ",
            html.Span(run.name, className="foreign strong"),
            ", on which it was not read. ",
            dmc.Anchor("Go to that run →", href=link("/features", state.but(run=holder.name)), size="sm"),
        ]
    else:
        words.append(".")
    return dmc.Text(words, className="muted numbers-of")


def _unread(reading: Reading, holder: Run) -> Any:
    return unrecorded(
        f"Latents of {reading.name}",
        "Its features were not read: the list would show what each latent fires on, how often, and what it goes with.",
        command(holder, f"sae read --sae {quoted(reading.name)} --run {{run}}"),
    )


pages.add(
    "features",
    Page(
        "Features",
        "/features",
        "Inside",
        41,
        "Sparse autoencoders: what their latents fire on, which experts write them, and what steering by them does.",
        layout,
        callbacks,
    ),
)
