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
from moescope.core.versions import VERSION
from moescope.dashboard import notices
from moescope.dashboard.browser import HIDDEN, in_browser, named
from moescope.dashboard.records import find_run
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
    """The frame, empty; the address fills it."""
    header = dmc.Group(
        [
            dmc.Group(
                [
                    dmc.Text("moescope", className="brand"),
                    dmc.Text(store.path.name, className="muted foreign store-name"),
                ],
                gap="sm",
            ),
            dmc.Group(
                [
                    html.Div(id="run-status"),
                    dmc.Select(
                        id="run-picker",
                        data=[],
                        value=None,
                        searchable=True,
                        allowDeselect=False,
                        size="xs",
                        w=220,
                        placeholder="no runs",
                        inputProps={"aria-label": "Run"},
                        nothingFoundMessage="no such run",
                    ),
                    dmc.ColorSchemeToggle(
                        lightIcon="☀", darkIcon="☾", variant="default", size="md", **named("Light or dark")
                    ),
                ],
                gap="sm",
            ),
        ],
        justify="space-between",
        h="100%",
        px="md",
        wrap="nowrap",
    )
    shell = dmc.AppShell(
        [
            dmc.AppShellHeader(header),
            dmc.AppShellNavbar(html.Div(id="navigation", className="navigation")),
            dmc.AppShellMain(
                html.Div(
                    [html.Div(id="run-bar"), html.Div(id="failure"), html.Div(id="page", className="page")],
                    className="content",
                )
            ),
        ],
        header={"height": 48},
        navbar={"width": {"base": 56, "lg": 216}, "breakpoint": 0},
        padding=0,
    )
    stores = [dcc.Store(id=name) for name in ("frame-key", "active", "go-to", "panels-seen")]
    return dmc.MantineProvider(
        [dcc.Location(id="url", refresh=False), *stores, shell], theme=_THEME, defaultColorScheme="auto"
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """Register what the frame does; pages register their own."""
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

    @app.callback(
        Output("page", "children"),
        Output("navigation", "children"),
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
        return frame(store, key["path"], search)


def frame(store: Store, path: str, search: str | None) -> tuple[Any, ...]:
    """Everything the frame shows for an address: page, navigation, bar, status, run picker's choices and value, title."""
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
    return content, _navigation(path, run), bar, _status(run), names, run.name if run else None, active


def report_failure(error: Exception) -> None:
    """Show what went wrong in a callback, and leave the rest of the page, and what was typed, as it is."""
    if isinstance(error, MoescopeError):
        dash.set_props("failure", {"children": notices.refusal(error)})
        return
    _LOG.error("a view could not be made", exc_info=error)
    dash.set_props("failure", {"children": notices.unexpected(error)})


def _read(store: Store, search: str | None) -> tuple[ViewState, Run | None, MoescopeError | None]:
    """State, run and, where the address asks for what cannot be, the reason; the frame then shows the newest run."""
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
    if run is None:
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
    return [heading, dcc.Store(id="page-run", data=run.name), body]


def _navigation(path: str, run: Run | None) -> list[Any]:
    state = ViewState(run=run.name if run else None)
    groups: dict[str, list[Page]] = {}
    for page in sorted(pages, key=lambda p: p.order):
        groups.setdefault(page.group, []).append(page)
    shown: list[Any] = []
    for group, members in groups.items():
        shown.append(dmc.Text(group, className="nav-group"))
        shown += [
            dmc.NavLink(
                label=p.name,
                href=link(p.path, state),
                active=p.path == path,
                className="nav-link",
                attributes={"root": {"title": p.name}},
                leftSection=html.Span(p.name[:1], className="nav-letter", **HIDDEN),
            )
            for p in members
        ]
    return [html.Div(shown), dmc.Text(f"moescope {VERSION}", className="nav-foot")]


def _status(run: Run | None) -> Any:
    if run is None:
        return None
    icon, colour = _STATUS[run.status]
    return dmc.Badge([html.Span(icon, **HIDDEN), f" {run.status}"], color=colour, variant="light", className="status")
