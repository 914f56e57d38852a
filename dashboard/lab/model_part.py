"""The bar that says what the model is doing, and chooses, loads, stops and unloads it."""

from __future__ import annotations

from typing import Any

import dash
from dash import Input, Output, State, ctx, html

from moescope.core.errors import InputError
from moescope.dashboard import notices
from moescope.dashboard.browser import HIDDEN
from moescope.dashboard.model_host import ModelHost
from moescope.dashboard.model_requests import Status
from moescope.dashboard.services import Services

_ICONS = {"none": "○", "unloaded": "○", "loading": "◌", "ready": "●", "busy": "◐", "failed": "✕"}


def callbacks(app: dash.Dash, services: Services) -> None:
    """Status into the bar; its buttons."""

    @app.callback(
        Output("lab-model", "children"),
        Output("lab-stop", "disabled"),
        Output("lab-unload", "disabled"),
        Output("lab-model-key", "data"),
        Input("lab-tick", "n_intervals"),
        Input("lab-stamp", "data"),
        State("lab-model-key", "data"),
    )
    def show(_ticks: int | None, _stamp: Any, key: str | None) -> tuple[Any, ...]:
        status = services.models.status()
        seconds = f" {status.seconds:.0f}" if status.state in ("loading", "busy") else ""
        now = f"{status.state}{status.source}{status.words}{status.waiting}{status.name}{seconds}"
        if now == key:
            raise dash.exceptions.PreventUpdate
        return told(status), status.state not in ("loading", "busy"), status.name is None, now

    @app.callback(
        Output("lab-stamp", "data"),
        Input("lab-load", "n_clicks"),
        Input("lab-stop", "n_clicks"),
        Input("lab-unload", "n_clicks"),
        State("lab-source", "value"),
        prevent_initial_call=True,
    )
    def press(load: int | None, stop: int | None, unload: int | None, source: str | None) -> Any:
        if not (load or stop or unload):
            raise dash.exceptions.PreventUpdate
        host, pressed = services.models, ctx.triggered_id
        if pressed == "lab-stop":
            host.stop()
            return dash.no_update
        if pressed == "lab-unload":
            host.unload()
            return dash.no_update
        if not (source or "").strip():
            raise InputError("the model has no name", fix="write demo, a folder, a .gguf file or a Hub id")
        host.choose(str(source).strip())
        return f"loaded {load}"


def choose_demo(host: ModelHost, run_model: str | None) -> None:
    """Take the bundled model where none is chosen and the run is of it: it needs no download, and no click."""
    if host.source is None and run_model == "demo":
        host.choose("demo")


def told(status: Status) -> Any:
    """The status in a line, or what went wrong."""
    icon = html.Span(f"{_ICONS[status.state]} ", **HIDDEN)
    if status.state == "failed" and status.problem is not None:
        return notices.refusal(status.problem)
    waiting = f" · {status.waiting} waiting" if status.waiting else ""
    about = f"{status.memory / 1e6:,.0f} MB of weights on {status.device}" if status.name else ""
    name = html.Span(status.source or "", className="foreign strong")
    if status.state == "none":
        return [icon, html.Span("No model is loaded")]
    if status.state == "unloaded":
        return [icon, name, html.Span(" · loads when it is first asked", className="muted")]
    if status.state == "loading":
        what = html.Span(status.words if " for " in status.words else status.source or "", className="foreign strong")
        return [icon, html.Span("Loading "), what, html.Span(f" · {status.seconds:.0f} s{waiting}", className="muted")]
    if status.state == "busy" and status.seconds >= 1:
        words = html.Span(status.words, className="foreign")
        return [
            icon,
            name,
            html.Span(" · busy with "),
            words,
            html.Span(f" · {status.seconds:.0f} s{waiting}", className="muted"),
        ]
    return [icon, name, html.Span(f" · ready · {about}", className="muted", title=status.name or "")]
