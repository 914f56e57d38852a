"""The frame round every page: navigation, the run picker, the state of the run, light and dark."""

from __future__ import annotations

import logging
import shlex
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from moescope.core.errors import InputError, MoescopeError
from moescope.core.pages import Page, pages
from moescope.dashboard import notices
from moescope.dashboard.browser import HIDDEN, attributes, in_browser, named
from moescope.dashboard.first_paint import first_paint
from moescope.dashboard.navigation import navigation
from moescope.dashboard.palette_entries import fixed_entries, run_entries
from moescope.dashboard.records import find_run
from moescope.dashboard.services import services_of
from moescope.dashboard.squeezed import squeeze
from moescope.dashboard.url_state import ViewState, decode, link
from moescope.store.run import Run
from moescope.store.store import Store

_LOG = logging.getLogger("moescope.dashboard")
_STATUS = {"complete": ("✓", "green"), "incomplete": ("▲", "yellow"), "running": ("◌", "blue"), "failed": ("✕", "red")}
_THEME = {
    "fontFamily": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    "fontFamilyMonospace": "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace",
    "primaryShade": 8,
    "defaultRadius": 8,
    "breakpoints": {"lg": "68.75em"},
    "fontSizes": {"xs": "12px", "sm": "13px", "md": "14px"},
    "cursorType": "pointer",
}


def layout(store: Store) -> Any:
    """The frame, with the navigation; the address fills the rest."""
    shell = dmc.AppShell(
        [
            dmc.AppShellHeader(_header(store)),
            dmc.AppShellNavbar(html.Div(navigation(), id="navigation", className="navigation")),
            dmc.AppShellMain(_main()),
        ],
        header={"height": 48},
        navbar={"width": {"base": 56, "lg": 216}, "breakpoint": 0},
        padding=0,
    )
    stores = [dcc.Store(id=name) for name in ("frame-key", "active", "go-to", "panels-seen", "palette-run")]
    return dmc.MantineProvider(
        [
            dcc.Location(id="url", refresh=False),
            *stores,
            dcc.Store(id="palette-fixed", data=fixed_entries()),
            html.A("Skip to the content", href="#content", className="skip"),
            html.Div(id="lost", className="lost", role="alert", **attributes(data_store=shlex.quote(str(store.path)))),
            shell,
        ],
        theme=_THEME,
        defaultColorScheme="auto",
    )


def _header(store: Store) -> Any:
    search = html.Button(
        [html.Span("Search"), html.Kbd("Ctrl K")],
        id="palette-button",
        type="button",
        className="palette-button",
        **named("Search pages, experts, tokens, analyses (Ctrl K)"),
    )
    back = html.Button(
        html.Span("↶", **HIDDEN),
        id="undo",
        type="button",
        className="icon-button",
        title="Back to the view before (u)",
        **named("Undo: back to the view before"),
    )
    picker = dmc.Select(
        id="run-picker",
        data=[],
        value=None,
        searchable=True,
        allowDeselect=False,
        size="xs",
        className="run-picker",
        placeholder="no runs",
        inputProps={"aria-label": "Run"},
        nothingFoundMessage="no such run",
    )
    scheme = dmc.ColorSchemeToggle(
        id="scheme", lightIcon="☀", darkIcon="☾", variant="default", size="md", **named("Light or dark")
    )
    name = dmc.Text(
        store.path.name, className="muted foreign store-name", attributes={"root": {"title": str(store.path)}}
    )
    left = dmc.Group([dmc.Text("moescope", className="brand"), name], gap="sm", wrap="nowrap")
    right = dmc.Group([search, back, html.Div(id="run-status"), picker, scheme], gap="sm", wrap="nowrap")
    return dmc.Group([left, right], justify="space-between", h="100%", px="md", wrap="nowrap")


def _main() -> Any:
    waiting = html.Div(
        [dmc.Skeleton(height=30, width=180), dmc.Skeleton(height=16, width=420), dmc.Skeleton(height=260, mt="md")],
        className="waiting",
        **HIDDEN,
    )
    return html.Div(
        [
            html.Div(id="chips", className="chips", role="group", **named("Selection")),
            html.Div(id="run-bar"),
            html.Div(id="failure", role="alert"),
            html.Div(waiting, id="page", className="page"),
        ],
        className="content",
        id="content",
        tabIndex="-1",
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """Register what the frame does; pages register their own."""
    first_paint(app, store)
    squeeze(app.server)
    why_not = services_of(app).why_not
    in_browser(
        app,
        "frame_key",
        Output("frame-key", "data"),
        Input("url", "pathname"),
        Input("url", "search"),
        State("frame-key", "data"),
        State("active", "data"),
    )
    in_browser(app, "settle", Input("active", "data"))
    in_browser(app, "pick_run", Input("run-picker", "value"), State("active", "data"))
    in_browser(app, "go_to", Input("go-to", "data"))
    control = {"url": dash.ALL}
    defaults = State({"defaults": dash.ALL}, "data")
    in_browser(app, "fill", Output(control, "value"), Input("url", "search"), State(control, "id"), defaults)
    in_browser(app, "control", Input(control, "value"), State(control, "id"), defaults)
    in_browser(app, "forget_failure", Output("failure", "children"), Input("url", "search"), Input("url", "pathname"))
    address = [Input("url", "pathname"), Input("url", "search")]
    links = {"nav": dash.ALL}
    outputs = [Output(links, "href"), Output(links, "active")]
    in_browser(app, "links", *outputs, *address, Input("active", "data"), State(links, "id"), space="frame")
    in_browser(app, "chips", *address, space="frame")
    in_browser(app, "known", Input("palette-fixed", "data"), Input("palette-run", "data"), space="palette")

    @app.callback(
        Output("page", "children"),
        Output("palette-run", "data"),
        Output("run-bar", "children"),
        Output("run-status", "children"),
        Output("run-picker", "data"),
        Output("run-picker", "value"),
        Output("active", "data"),
        Input("frame-key", "data"),
        State("url", "search"),
    )
    def show(key: dict[str, str] | None, search: str | None) -> tuple[Any, ...]:
        if key is None:
            raise dash.exceptions.PreventUpdate
        return frame(store, key["path"], search, why_not=why_not)


def frame(store: Store, path: str, search: str | None, *, why_not: str = "") -> tuple[Any, ...]:
    """What the frame shows for an address: page, what the palette finds, bar, status, the run picker's choices and value, title."""
    state, run, problem = _read(store, search)
    page = next((p for p in pages if p.path == path), None)
    content = _content(store, page, path, state, run, problem)
    names = [r.name for r in store.runs()]
    bar = (
        None
        if run is None or run.complete
        else notices.incomplete(run.name, run.status, link("/", ViewState(run=run.name)) + "#coverage")
    )
    active = {"run": run.name if run else "", "title": f"{page.name if page else 'Not found'} · moescope"}
    found = run_entries(store, run)
    return content, found, bar, _status(store, run, why_not), names, run.name if run else None, active


def report_failure(error: Exception) -> None:
    """Show what went wrong in a callback, and leave the rest of the page, and what was typed, as it is."""
    if isinstance(error, MoescopeError):
        dash.set_props("failure", {"children": notices.refusal(error)})
        return
    _LOG.error("a view could not be made", exc_info=error)
    dash.set_props("failure", {"children": notices.unexpected(error)})


def _read(store: Store, search: str | None) -> tuple[ViewState, Run | None, MoescopeError | None]:
    """State, run and, where the address asks for what cannot be, the reason; the frame then shows the run of an empty address."""
    try:
        state = decode(search)
        run = find_run(store, state)
    except InputError as refused:
        return ViewState(), find_run(store, ViewState()), refused
    return state.but(run=run.name if run else None), run, None


def _content(
    store: Store, page: Page | None, path: str, state: ViewState, run: Run | None, problem: MoescopeError | None
) -> Any:
    if page is None:
        return notices.refusal(InputError(f"there is no page {path}", fix="choose one in the navigation"))
    heading = dmc.Box(
        [dmc.Title(page.name, order=1, className="page-title"), dmc.Text(page.subtitle, className="muted")],
        className="heading",
    )
    if problem is not None:
        return [heading, notices.refusal(problem)]
    if run is None and page.needs_run:
        command = notices.RECORD_COMMAND.format(path=shlex.quote(str(store.path)))
        return [
            heading,
            notices.empty(
                "This store has no runs yet",
                "Record one, and its pages appear here. The bundled demo model takes a few "
                "minutes. The store must not be open elsewhere meanwhile: stop this app first.",
                command=command,
            ),
        ]
    try:
        body = page.layout(run, state)
    except MoescopeError as refused:
        body = notices.refusal(refused)
    return [heading, dcc.Store(id="page-run", data=run.name if run else None), body]


def _status(store: Store, run: Run | None, why_not: str) -> Any:
    parts: list[Any] = []
    if store.read_only:
        words = why_not or "The store is open for reading only: nothing can be recorded or saved from here."
        parts.append(
            dmc.Badge(
                [html.Span("⊘", **HIDDEN), " read-only"],
                color="gray",
                variant="light",
                className="status",
                attributes={"root": {"title": words}},
            )
        )
    if run is not None:
        icon, colour = _STATUS[run.status]
        parts.append(
            dmc.Badge([html.Span(icon, **HIDDEN), f" {run.status}"], color=colour, variant="light", className="status")
        )
    return dmc.Group(parts, gap=6, wrap="nowrap") if parts else None
