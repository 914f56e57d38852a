"""Long work: started here, followed here, and gone on with when the tab is closed."""

from __future__ import annotations

import time
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import ALL, Input, Output, State, dcc, html

from moescope.core.errors import InputError, MoescopeError
from moescope.core.pages import Page, pages
from moescope.dashboard import cards, notices
from moescope.dashboard.browser import HIDDEN, attributes, in_browser, named
from moescope.dashboard.services import Services, services_of
from moescope.dashboard.url_state import ViewState, decode
from moescope.dashboard.work import Job
from moescope.dashboard.work_kinds import KINDS, Field, Kind, checked, command_line
from moescope.dashboard.work_model import on_model
from moescope.store.run import Run
from moescope.store.store import Store

_EVERY_MS = 700
_MARKS = {
    "waiting": ("◌", "gray"), "running": ("▶", "blue"), "done": ("✓", "green"), "failed": ("✕", "red"),
    "cancelled": ("■", "yellow"),
}  # fmt: skip
_MINUTE = 60


def layout(run: Run | None, state: ViewState) -> Any:
    """A form for each kind of work, and the list of what was started."""
    first = KINDS[0].name
    return html.Div(
        [
            dcc.Store(id={"defaults": "work"}, data={"do": first}),
            dcc.Store(id="work-slice"),
            dcc.Store(id="work-wanted", data=["do", "edits"]),
            dcc.Store(id="work-model", data=str(run.info["model"]) if run is not None else "demo"),
            dcc.Interval(id="work-clock", interval=_EVERY_MS),
            html.Div(
                dmc.SegmentedControl(
                    id={"url": "do"}, value=first, data=[{"value": kind.name, "label": kind.title} for kind in KINDS],
                    size="sm", **named("Kind of work"),
                ),
                className="work-kinds",
            ),
            html.Div(
                [html.Div(id="work-form"), html.Div(_jobs_section())],
                className="two-columns",
            ),
        ],
    )  # fmt: skip


def callbacks(app: dash.Dash, store: Store) -> None:
    """Address → form; start; the clock → the list of jobs; cancel."""
    services = services_of(app)
    in_browser(
        app, "slice", Output("work-slice", "data"), Input("url", "search"), State("work-wanted", "data"),
        State("work-slice", "data"),
    )  # fmt: skip

    @app.callback(Output("work-form", "children"), Input("work-slice", "data"), State("work-model", "data"))
    def show_form(address: str | None, model: str) -> Any:
        if address is None:
            raise dash.exceptions.PreventUpdate
        state = decode(address)
        return form(_kind(state.given("do", KINDS[0].name)), model, ";".join(state.edits), services)

    @app.callback(
        Output("work-command", "children"),
        Input({"work": ALL}, "value"),
        Input({"work": ALL}, "checked"),
        State({"work": ALL}, "id"),
        State("work-slice", "data"),
    )
    def show_command(values: list[Any], ticks: list[Any], ids: list[dict[str, str]], address: str | None) -> str:
        if not ids:
            raise dash.exceptions.PreventUpdate
        kind = _kind(decode(address).given("do", KINDS[0].name))
        return command_line(kind, store, _filled(kind, values, ticks, ids))

    @app.callback(
        Output("work-answer", "children"),
        Output("work-jobs", "children", allow_duplicate=True),
        Output("work-clock", "disabled", allow_duplicate=True),
        Input("work-start", "n_clicks"),
        State({"work": ALL}, "value"),
        State({"work": ALL}, "checked"),
        State({"work": ALL}, "id"),
        State("work-slice", "data"),
        prevent_initial_call=True,
    )
    def start(clicks: int | None, values: list[Any], ticks: list[Any], ids: list[dict[str, str]], address: str) -> Any:
        if not clicks:
            raise dash.exceptions.PreventUpdate
        kind = _kind(decode(address).given("do", KINDS[0].name))
        try:
            job = begin(services, kind, _filled(kind, values, ticks, ids))
        except MoescopeError as refused:
            return notices.refusal(refused), dash.no_update, dash.no_update
        return dmc.Text(f"Job {job.number} is in the queue; it goes on when this tab is closed.", size="sm"), *_now(
            services
        )

    @app.callback(
        Output("work-jobs", "children"),
        Output("work-clock", "disabled"),
        Input("work-clock", "n_intervals"),
    )
    def follow(_ticks: int | None) -> Any:
        return _now(services)

    @app.callback(
        Output("work-jobs", "children", allow_duplicate=True),
        Input({"cancel": ALL}, "n_clicks"),
        prevent_initial_call=True,
    )
    def cancel(clicks: list[int | None]) -> Any:
        if not any(clicks):
            raise dash.exceptions.PreventUpdate
        services.work.cancel(int(dash.ctx.triggered_id["cancel"]))
        return jobs(services.work.jobs())


def begin(services: Services, kind: Kind, values: dict[str, Any]) -> Job:
    """Put one kind of work into the queue. Raises `InputError` where something is wrong that can be seen at once."""
    if not services.writable:
        raise InputError("the store is open for reading only", found=services.why_not or None)
    given = checked(kind, values, services.store)
    model = str(given["model"])

    return services.work.start(
        f"{kind.title}: {given['name'] or model}",
        lambda job: on_model(services.models, model, job, lambda live: kind.do(live, services.store, given)),
    )


def form(kind: Kind, model: str, edits: str, services: Services) -> Any:
    """What to fill in for one kind of work, and the command that does the same."""
    if not services.writable:
        return notices.refusal(
            InputError(
                "this store is open for reading only, so nothing can be recorded into it",
                found=services.why_not or None,
            )
        )
    fields = [
        Field("model", "Model", model, note='"demo", a Hub id, a folder, or a .gguf file'),
        Field(
            "data", "Texts", None, note="a .jsonl, .csv, .parquet or .txt file or a folder; empty for the bundled texts"
        ),
        *([Field("name", "Name", None, note="empty for a name of its own")] if kind.named else []),
        *kind.fields,
    ]
    values = {field.name: edits if field.name == "edit" and edits else field.default for field in fields}
    return cards.section(
        kind.title,
        dmc.Stack(
            [
                dmc.SimpleGrid([_input(field, values[field.name]) for field in fields], cols={"base": 1, "sm": 2}),
                dmc.Group([dmc.Button("Start", id="work-start"), html.Div(id="work-answer", **attributes(aria_live="polite"))]),
                dmc.Text("The same on the command line, while the dashboard is closed:", className="muted"),
                dmc.Code(command_line(kind, services.store, values), id="work-command", block=True, className="foreign work-command"),
            ],
            gap="md",
        ),
        note=kind.about,
    )  # fmt: skip


def jobs(started: list[Job]) -> Any:
    """The list of jobs, newest first."""
    if not started:
        return dmc.Text("Nothing was started since the dashboard was opened.", className="muted")
    return dmc.Stack([_job(job) for job in started], gap="sm")


def _now(services: Services) -> tuple[Any, bool]:
    return jobs(services.work.jobs()), not services.work.busy()


def _kind(name: str) -> Kind:
    return next((kind for kind in KINDS if kind.name == name), KINDS[0])


def _filled(kind: Kind, values: list[Any], ticks: list[Any], ids: list[dict[str, str]]) -> dict[str, Any]:
    """What was filled in, by field."""
    switches = {field.name for field in kind.fields if field.form == "switch"}
    return {
        one["work"]: bool(tick) if one["work"] in switches else value
        for one, value, tick in zip(ids, values, ticks, strict=True)
    }


def _jobs_section() -> Any:
    return cards.section(
        "Jobs", html.Div(id="work-jobs", **attributes(aria_live="polite")), note="One at a time, in order."
    )


def _input(field: Field, value: Any) -> Any:
    shared: dict[str, Any] = {"id": {"work": field.name}, "label": field.label, "description": field.note or None}
    if field.form != "switch":
        shared["inputWrapperOrder"] = ["label", "input", "description"]
    if field.form == "switch":
        return dmc.Switch(checked=bool(value), **shared)
    if field.form == "several":
        return dmc.MultiSelect(data=list(field.options), value=value, **shared)
    if field.form == "number":
        return dmc.NumberInput(value=value, min=field.least, allowDecimal=False, **shared)
    return dmc.TextInput(value=value or "", **shared)


def _job(job: Job) -> Any:
    glyph, colour = _MARKS[job.state]
    head = dmc.Group(
        [
            dmc.Text(f"{job.number}. {job.title}", className="strong foreign"),
            dmc.Badge([html.Span(glyph, **HIDDEN), f" {job.state}"], color=colour, variant="light", className="status"),
        ],
        justify="space-between",
    )
    rows: list[Any] = [head]
    if job.state == "running":
        share = 100 * job.done / job.total if job.total else 0
        rows.append(
            dmc.Progress(
                value=share,
                striped=not job.total,
                animated=not job.total,
                **named(f"{share:.0f} % of {job.title} done"),
            )
        )
        rows.append(dmc.Text(" · ".join(_progress(job, share)), className="muted foreign"))
    if job.problem is not None:
        problem = job.problem
        rows.append(notices.refusal(problem) if isinstance(problem, MoescopeError) else notices.unexpected(problem))
    if not job.over:
        rows.append(
            dmc.Group(dmc.Button("Cancel", id={"cancel": job.number}, variant="default", size="xs", **named(f"Cancel job {job.number}")))
        )  # fmt: skip
    elif job.begun is not None and job.ended is not None:
        rows.append(dmc.Text(f"took {_span(job.ended - job.begun)}", className="muted"))
    if job.state == "cancelled" and job.begun is not None:
        rows.append(
            dmc.Text("What was recorded before is kept; a run goes on with “Go on with a stopped run”.", size="sm")
        )
    if job.link:
        rows.append(dcc.Link("Show the result →", href=job.link, className="job-link"))
    return dmc.Paper(dmc.Stack(rows, gap=6), withBorder=True, className="card")


def _progress(job: Job, share: float) -> list[str]:
    spent = time.time() - (job.begun or time.time())
    parts = [f"{share:.0f} %"] if job.total else []
    parts += [job.words] if job.words else []
    parts += [f"{_span(spent)} so far"]
    if job.total and share >= 1:
        parts.append(f"about {_span(spent * (100 - share) / share)} left")
    return parts


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), _MINUTE)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


pages.add(
    "work",
    Page(
        "Work", "/work", "Change", 51, "Recordings, sweeps and trainings, started here and done one at a time.", layout,
        callbacks, needs_run=False,
    ),
)  # fmt: skip
