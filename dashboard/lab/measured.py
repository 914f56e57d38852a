"""How far a measurement of the lab is, and what it found."""

from __future__ import annotations

import dataclasses
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from moescope.core.errors import MoescopeError
from moescope.core.result import Result
from moescope.dashboard import notices
from moescope.dashboard.figure_look import GRAPH, dressed
from moescope.dashboard.lab.measuring import Measuring
from moescope.dashboard.numbers import MISSING, absent, decimal, share
from moescope.dashboard.panel import heading
from moescope.dashboard.services import Services
from moescope.dashboard.work import Job

_NAMES = {"delta_nll": "ΔNLL", "kl": "KL", "flips": "flips", "base_nll": "NLL, unedited"}


def callbacks(app: dash.Dash, services: Services, measuring: Measuring) -> None:
    """Progress while a job runs, its result when it is done, and Cancel."""

    @app.callback(
        Output("lab-progress", "children"),
        Output("lab-measured", "children"),
        Output("lab-save-note", "children"),
        Output("lab-save", "disabled"),
        Output("lab-job", "data", allow_duplicate=True),
        Input("lab-tick", "n_intervals"),
        Input("lab-job", "data"),
        prevent_initial_call="initial_duplicate",
    )
    def follow(_ticks: int | None, now: dict[str, Any] | None) -> tuple[Any, ...]:
        number = (now or {}).get("number", measuring.last)
        note = None if services.writable else f"Not in this store: {services.why_not or 'it is open for reading only'}."
        job = None if number is None else measuring.job(number)
        key = "none" if job is None else f"{job.number} {job.state} {job.done} {job.words}"
        if (now or {}).get("key") == key:
            raise dash.exceptions.PreventUpdate
        data = {"number": number, "key": key}
        if job is None:
            return None, None, note, not services.writable, data
        result = measuring.result(job.number)
        return _progress(job), None if result is None else found(result), note, not services.writable, data

    @app.callback(Output("lab-cancel", "disabled"), Input("lab-cancel", "n_clicks"), State("lab-job", "data"))
    def cancel(clicks: int | None, now: dict[str, Any] | None) -> bool:
        if not clicks or not now or now.get("number") is None:
            raise dash.exceptions.PreventUpdate
        services.work.cancel(int(now["number"]))
        return True


def _progress(job: Job) -> Any:
    """A line, with a bar and Cancel while it runs."""
    title = html.Span(job.title, className="foreign strong")
    if not job.over:
        share_done = 100 * job.done / job.total if job.total else 0
        return html.Div(
            [
                html.Div([title, html.Span(f" · {job.state} · {job.words}", className="muted foreign")]),
                dmc.Progress(value=share_done, size="sm", **{"aria-label": "Progress"}),
                html.Button("Cancel", id="lab-cancel", type="button", className="lab-button"),
            ],
            className="lab-progress",
        )
    if job.problem is not None:
        problem = job.problem
        return notices.refusal(problem) if isinstance(problem, MoescopeError) else notices.unexpected(problem)
    more: list[Any] = [dmc.Anchor(" Compare it with the unedited run", href=job.link, size="sm")] if job.link else []
    return html.Div([title, html.Span(f" · {job.state}", className="muted"), *more])


def found(result: Result) -> Any:
    """The finding, its numbers in a table, and its figure."""
    figure = dressed(result.figure(titled=False)) if result.has_figure else None
    graph = (
        dcc.Graph(figure=figure, config=GRAPH, responsive=True, style={"height": figure.layout.height or 320})
        if figure is not None
        else None
    )
    # The id of an effect leads nowhere here: what the controls wrote is not kept.
    shown = dataclasses.replace(result, notes=tuple(note for note in result.notes if not note.startswith("Effect ")))
    without = result.df().query("kind == 'target'").ci_low.isna().all()
    note = (
        html.P("No intervals: they resample texts, and there is one.", className="muted lab-note") if without else None
    )
    return html.Div([heading(shown), _table(result), note, graph], className="lab-found")


def _table(result: Result) -> Any:
    frame = result.df()
    target = frame[frame.kind == "target"]
    rows = []
    for line in target.itertuples():
        drawn = frame[(frame.kind == "control") & (frame.metric == line.metric)].value
        apart = frame[(frame.kind == "difference") & (frame.metric == line.metric)]
        controls = f"{_number(drawn.min(), line)} to {_number(drawn.max(), line)}" if len(drawn) else MISSING
        over = _interval(next(apart.itertuples()), line) if len(apart) else MISSING
        cells = [
            _NAMES.get(line.metric, line.metric.replace("_", " ")),
            _interval(line, line),
            controls,
            over,
            f"{line.n:,}",
        ]
        rows.append(
            html.Tr(
                [html.Th(cells[0], scope="row"), *[html.Td(cell, className="number") for cell in cells[1:]]],
                **{"data-metric": line.metric, "data-value": repr(float(line.value))},
            )
        )
    names = ["measure", "edited − base", "controls, lowest to highest", "beyond their mean", "n"]
    head = html.Thead(html.Tr([html.Th(name, scope="col") for name in names]))
    return html.Div(html.Table([head, html.Tbody(rows)], className="lab-grid"), className="lab-scroll")


def _interval(row: Any, line: Any) -> str:
    if absent(row.ci_low) or absent(row.ci_high):
        return _number(row.value, line)
    return f"{_number(row.value, line)} [{_number(row.ci_low, line)}, {_number(row.ci_high, line)}]"


def _number(value: float, line: Any) -> str:
    """Flips in percent, the rest with four decimals; neither rounded to a false zero."""
    value = float(value)
    if absent(value):
        return MISSING
    small = 0 < abs(value) < 0.00005
    size = share(abs(value), 1) if line.metric == "flips" else "<0.0001" if small else decimal(abs(value), 4)
    if value >= 0:
        return size
    return f">−{size[1:]}" if size.startswith("<") else f"<−{size[1:]}" if size.startswith(">") else f"−{size}"
