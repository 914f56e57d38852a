"""Ask the store anything, in SQL: it is only ever read, and only so far."""

from __future__ import annotations

from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from moescope.core.errors import MoescopeError
from moescope.core.pages import Page, pages
from moescope.dashboard import notices
from moescope.dashboard.browser import HIDDEN, in_browser, named
from moescope.dashboard.services import services_of
from moescope.dashboard.sql.asking import Asking
from moescope.dashboard.sql.box import Limits, SqlBox
from moescope.dashboard.sql.chart import DRAWINGS, Choice
from moescope.dashboard.sql.chart_view import drawn
from moescope.dashboard.sql.examples import EXAMPLES, Example
from moescope.dashboard.sql.file_route import add_route
from moescope.dashboard.sql.files import MOST_BYTES, MOST_ROWS
from moescope.dashboard.sql.result_view import answer
from moescope.dashboard.sql.tables import rows_of, schema_of
from moescope.dashboard.url_state import ViewState, decode, link
from moescope.store.run import Run
from moescope.store.store import Store

_NAMES = {"bar": "Bars", "line": "Line", "scatter": "Points", "heat": "Heat map"}
_COLUMNS = (("x", "Across"), ("y", "Up"), ("z", "Colour"))


def layout(run: Run | None, state: ViewState) -> Any:
    """Editor, answer and chart; beside them examples, the schema and the history."""
    return html.Div(
        [
            dcc.Store(id={"defaults": "sql"}, data={"chart": "none", "x": "", "y": "", "z": ""}),
            dcc.Store(id="sql-ask"),
            dcc.Store(id="sql-again", data=0),
            dcc.Store(id="sql-told"),
            dcc.Store(id="sql-chart-wanted", data=["chart", "x", "y", "z"]),
            dcc.Store(id="sql-chart-slice"),
            dcc.Store(id="sql-run-id", data=run.run_id if run is not None else ""),
            dcc.Store(id="sql-schema"),
            dcc.Store(id="sql-counts"),
            html.Div([*_editor(), *_answer()], className="sql-main"),
            html.Aside(
                [_examples(run), *_schema(run), *_history()], className="sql-side", **named("Examples and schema")
            ),
        ],
        className="sql-page",
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """Address → query → answer and chart; cancel; the schema and its counts; files."""
    services = services_of(app)
    box = SqlBox(store, busy=lambda: services.work.busy() or services.models.status().state in ("loading", "busy"))
    asking = Asking(store, box)
    add_route(app.server, asking)
    _browser_side(app)

    @app.callback(
        Output("sql-result", "children"),
        Output("sql-told", "data"),
        *(Output({"url": name}, "data") for name, _ in _COLUMNS),
        Input("sql-ask", "data"),
        State("page-run", "data"),
        running=[(Output("sql-cancel", "disabled"), False, True)],
    )
    def show(ask: dict[str, Any] | None, name: str | None) -> tuple[Any, ...]:
        if ask is None:
            raise dash.exceptions.PreventUpdate
        if not ask["sql"].strip():
            return None, None, [], [], []
        try:
            outcome = asking.ask(ask, name)
        except MoescopeError as refused:
            return notices.refusal(refused), {"ask": ask, "failed": True}, [], [], []
        choices = list(dict.fromkeys(column.name for column in outcome.columns))
        told = {"ask": ask, "rows": len(outcome.rows), "more": outcome.more}
        return answer(outcome, store, run=name), told, choices, choices, choices

    @app.callback(
        Output("sql-figure", "children"),
        Output("sql-chart-columns", "hidden"),
        Input("sql-told", "data"),
        Input("sql-chart-slice", "data"),
        State("page-run", "data"),
    )
    def draw(told: dict[str, Any] | None, address: str | None, name: str | None) -> tuple[Any, bool]:
        state = decode(address)
        kind = next((kind for kind in DRAWINGS if kind == state.given("chart")), None)
        if told is None or told.get("failed") or kind is None:
            return None, kind is None
        choice = Choice(kind, state.given("x"), state.given("y"), state.given("z"))
        try:
            return drawn(asking.ask(told["ask"], name), choice, sql=told["ask"]["sql"]), False
        except MoescopeError as refused:
            return notices.refusal(refused), False

    @app.callback(Input("sql-cancel", "n_clicks"), State("sql-ask", "data"))
    def cancel(clicks: int | None, ask: dict[str, Any] | None) -> None:
        if clicks and ask:
            box.cancel(ask["who"])

    @app.callback(Output("sql-schema", "data"), Input("sql-run-id", "data"))
    def schema(_run: str) -> Any:
        return schema_of(store)

    @app.callback(Output("sql-counts", "data"), Input("sql-schema", "data"), State("page-run", "data"))
    def counts(_schema: Any, name: str | None) -> Any:
        return rows_of(store.run(name)) if name else {}


def _browser_side(app: dash.Dash) -> None:
    in_browser(
        app,
        "ask",
        Output("sql-ask", "data"),
        Input("url", "search"),
        Input("sql-again", "data"),
        State("sql-ask", "data"),
        space="sql",
    )
    in_browser(
        app,
        "text",
        Output("sql-text", "value"),
        Input("url", "search"),
        State("sql-run-id", "data"),
        State("sql-example-list", "data"),
        space="sql",
    )
    in_browser(app, "run", Input("sql-run", "n_clicks"), space="sql")
    in_browser(
        app,
        "file",
        Input("sql-csv", "n_clicks"),
        Input("sql-parquet", "n_clicks"),
        State("sql-ask", "data"),
        space="sql",
    )
    found, counted = Input("sql-find", "value"), State("sql-counts", "data")
    in_browser(app, "schema", Input("sql-schema", "data"), found, counted, space="sql")
    in_browser(
        app, "counts", Input("sql-counts", "data"), State("sql-schema", "data"), State("sql-find", "value"), space="sql"
    )
    in_browser(app, "begun", Input("sql-ask", "data"), State("sql-told", "data"), space="sql")
    in_browser(app, "told", Input("sql-told", "data"), State("sql-ask", "data"), space="sql")
    in_browser(app, "forget", Input("sql-forget", "n_clicks"), space="sql")
    in_browser(
        app,
        "slice",
        Output("sql-chart-slice", "data"),
        Input("url", "search"),
        State("sql-chart-wanted", "data"),
        State("sql-chart-slice", "data"),
    )


def _editor() -> list[Any]:
    limits = Limits()
    return [
        dmc.Textarea(
            id="sql-text",
            label="Query",
            placeholder="SELECT … FROM …",
            autosize=True,
            minRows=7,
            maxRows=24,
            spellCheck=False,
            classNames={"input": "sql-text"},
            inputProps={"aria-describedby": "sql-hint"},
        ),
        html.Div(id="sql-fields", className="sql-fields"),
        html.Div(
            [
                dmc.Button("Run", id="sql-run", size="sm"),
                dmc.Button("Cancel", id="sql-cancel", size="sm", variant="default", disabled=True),
                html.Span(id="sql-clock", className="muted", role="timer"),
                html.Span(
                    [
                        dmc.Kbd("Ctrl"), " ", dmc.Kbd("Enter"),
                        f" runs it. One SELECT, which only reads; at most {limits.seconds:.0f} s, and the first 1,000 rows are shown.",
                    ],
                    id="sql-hint",
                    className="muted",
                ),
            ],
            className="sql-buttons",
        ),
    ]  # fmt: skip


def _answer() -> list[Any]:
    kinds = [{"value": "none", "label": "No chart"}, *({"value": kind, "label": _NAMES[kind]} for kind in DRAWINGS)]
    most = f"Whole result, up to {MOST_ROWS:,} rows or {MOST_BYTES // 10**6} MB:"
    return [
        dcc.Loading(
            html.Div(id="sql-result", className="sql-result"),
            delay_show=150,
            overlay_style={"visibility": "visible", "opacity": 0.5},
            custom_spinner=html.Span(),
        ),
        html.Div(
            [
                html.Div(
                    [
                        dmc.Text(most, className="muted"),
                        dmc.Button("CSV", id="sql-csv", size="compact-sm", variant="default"),
                        dmc.Button("Parquet", id="sql-parquet", size="compact-sm", variant="default"),
                        html.Span(id="sql-file-told", className="muted foreign", role="status"),
                    ],
                    className="sql-buttons",
                ),
                html.Div(
                    [
                        dmc.SegmentedControl(
                            id={"url": "chart"}, data=kinds, value="none", size="xs", **named("Chart")
                        ),
                        html.Div(
                            [
                                dmc.Select(
                                    id={"url": name},
                                    label=label,
                                    data=[],
                                    value="",
                                    size="xs",
                                    w=170,
                                    placeholder="chosen for you" if name != "z" else "none",
                                    searchable=True,
                                    clearable=True,
                                )
                                for name, label in _COLUMNS
                            ],
                            id="sql-chart-columns",
                            className="sql-chart-columns",
                            hidden=True,
                        ),
                    ],
                    className="sql-chart-controls",
                ),
                html.Div(id="sql-figure"),
            ],
            id="sql-after",
            hidden=True,
        ),
    ]


def _examples(run: Run | None) -> Any:
    return html.Div(
        [
            dmc.Title("Examples", order=2, className="section-title"),
            # Dash takes line breaks out of the links it makes, and a remark in the query would swallow the rest.
            dcc.Store(id="sql-example-list", data=[{"title": e.title, "href": example_link(e, run)} for e in EXAMPLES]),
            html.Ul(id="sql-examples", className="sql-examples"),
        ]
    )


def example_link(example: Example, run: Run | None) -> str:
    """The address that shows and runs an example."""
    return link("/sql", ViewState(run=run.name if run is not None else None).with_rest(sql=example.sql, **example.view))


def _schema(run: Run | None) -> list[Any]:
    note = "A click puts a name into the query."
    note += " Counts are rows of this run." if run is not None else ""
    return [
        html.Div(
            [
                dmc.Title("Schema", order=2, className="section-title"),
                dmc.Text(note, className="muted"),
                dmc.TextInput(
                    id="sql-find", size="xs", placeholder="Find a table or column", **named("Find a table or column")
                ),
                html.Div(id="sql-tables", className="sql-tables"),
            ]
        )
    ]


def _history() -> list[Any]:
    return [
        html.Div(
            [
                html.Div(
                    [
                        dmc.Title("This session", order=2, className="section-title"),
                        dmc.Button(
                            "Forget",
                            id="sql-forget",
                            leftSection=html.Span("✕", **HIDDEN),
                            size="compact-xs",
                            variant="subtle",
                        ),
                    ],
                    className="sql-session-heading",
                ),
                html.Ol(id="sql-session", className="sql-session"),
            ]
        )
    ]


pages.add(
    "sql",
    Page("SQL", "/sql", "Run", 12, "Ask the store anything; it is only ever read.", layout, callbacks, needs_run=False),
)
