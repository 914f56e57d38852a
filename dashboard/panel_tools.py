"""What every panel offers below its figure: how to read it, its table, its query, its Python, its files.

Nothing of it is made or sent before a button is pressed.
"""

from __future__ import annotations

import base64
import inspect
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import dash
import dash_mantine_components as dmc
from dash import MATCH, Input, Output, State, dcc, html

from moescope.core.errors import MoescopeError
from moescope.core.result import Result
from moescope.dashboard import cards, notices
from moescope.dashboard.answers import Answers
from moescope.dashboard.browser import attributes, in_browser, named
from moescope.dashboard.panel_table import result_table
from moescope.dashboard.panel_text import python_of, query_with_values
from moescope.dashboard.url_state import MAX_TEXT
from moescope.store.store import Store

_HELD = (
    "While this app has the store open for writing no other program can open it: "
    "start the app with --read-only to work beside it in a notebook."
)
VIEWS = {"how": "How to read it", "table": "Table", "query": "Query", "python": "Python"}
FILES = {"csv": "CSV", "parquet": "Parquet"}
IMAGES = {"png": "PNG", "svg": "SVG"}


def part(identity: Any, name: str) -> dict[str, Any]:
    """The id of one part of a panel."""
    return {"panel": identity, "part": name}


def tools(identity: str) -> Any:
    """The row of buttons below a panel; hidden by the style sheet until there is an answer."""
    views = [_button(identity, name, words, pressed=False) for name, words in VIEWS.items()]
    images = [_button(identity, name, words, kind="tool-image") for name, words in IMAGES.items()]
    files = [_button(identity, name, words) for name, words in FILES.items()]
    return html.Div(
        [
            html.Div(
                [*views, html.Span(className="tool-gap"), html.Span("Save:", className="tool-label"), *images, *files],
                className="tool-row",
            ),
            dcc.Store(id=part(identity, "view")),
            dcc.Download(id=part(identity, "file")),
            html.Div(id=part(identity, "detail"), className="panel-detail"),
        ],
        className="panel-tools",
        id=part(identity, "tools"),
    )


def _button(identity: str, name: str, words: str, *, kind: str = "", pressed: bool | None = None) -> Any:
    state = {} if pressed is None else attributes(aria_expanded="false", data_view=name)
    return html.Button(
        words, id=part(identity, name), n_clicks=0, type="button", className=f"tool {kind}".strip(), **state
    )


def table(identity: str, result: Result, store: Store) -> Any:
    """The table of a result that has no figure."""
    return result_table(part(identity, "body-table"), result, store, height=420)


def callbacks(app: dash.Dash, store: Store, answers: Answers) -> None:
    """Register what the buttons do: views and images in the browser, texts and files from the kept answer."""
    in_browser(
        app,
        "view",
        Output(part(MATCH, "view"), "data"),
        *[Input(part(MATCH, name), "n_clicks") for name in VIEWS],
        State(part(MATCH, "view"), "data"),
        space="panels",
    )
    in_browser(app, "image", *[Input(part(MATCH, name), "n_clicks") for name in IMAGES], space="panels")

    @app.callback(
        Output(part(MATCH, "detail"), "children"),
        Input(part(MATCH, "view"), "data"),
        Input(part(MATCH, "ask"), "data"),
        State(part(MATCH, "detail"), "children"),
    )
    def show(view: str | None, ask: Mapping[str, Any] | None, now: Any) -> Any:
        if ask is None or (view is None and not now):
            raise dash.exceptions.PreventUpdate
        if view is None:
            return None
        try:
            return detail(view, dash.callback_context.inputs_list[0]["id"]["panel"], answers.ask(ask), store)
        except MoescopeError as refused:
            return notices.refusal(refused)

    @app.callback(
        Output(part(MATCH, "file"), "data"),
        *[Input(part(MATCH, name), "n_clicks") for name in FILES],
        State(part(MATCH, "ask"), "data"),
        prevent_initial_call=True,
    )
    def save(*given: Any) -> Any:
        ask = given[-1]
        if ask is None or not any(given[:-1]):
            raise dash.exceptions.PreventUpdate
        return file_of(answers.ask(ask), dash.callback_context.triggered_id["part"])


def detail(view: str, identity: str, result: Result, store: Store) -> Any:
    """What one of the buttons unfolds."""
    if view == "how":
        return html.Div(cards.facts(list(result.facts().items())), className="panel-facts")
    if view == "table":
        return result_table(part(identity, "table-grid"), result, store)
    if view == "query":
        return _query(result)
    if view == "python":
        shown = _text(python_of(result, store.path.resolve()), "The same result in Python:")
        return shown if store.read_only else html.Div([shown, dmc.Text(_HELD, className="muted")])
    raise dash.exceptions.PreventUpdate


def file_of(result: Result, ending: str) -> dict[str, Any]:
    """A file of the result's table for the browser to save, named after the analysis and the run."""
    name = file_name(result, ending)
    with tempfile.TemporaryDirectory() as folder:
        content = result.save(Path(folder) / f"result.{ending}").read_bytes()
    return {"content": base64.b64encode(content).decode("ascii"), "filename": name, "base64": True}


def file_name(result: Result, ending: str) -> str:
    """`load-base.csv`; letters that file systems refuse become dashes."""
    run = str(result.provenance.get("run", ""))
    plain = re.sub(r"[^\w.+=-]+", "-", f"{result.name}-{run}", flags=re.ASCII).strip("-.")[:80]
    return f"{plain or 'result'}.{ending}"


def _query(result: Result) -> Any:
    parts: list[Any] = []
    if result.sql:
        text = query_with_values(inspect.cleandoc(result.sql), result.sql_parameters)
        address = "/sql?" + urlencode({"run": result.provenance.get("run", ""), "sql": text})
        # A button that the frame follows: Dash's links lose the line breaks of an address.
        opened = html.Button("Open in SQL →", type="button", className="tool", **attributes(data_open=address))
        parts.append(_text(text, "The query behind the numbers:", opened if len(text) <= MAX_TEXT else None))
    if result.computation:
        parts.append(
            dmc.Text(["Computed outside SQL: ", html.Span(result.computation, className="foreign")], size="sm")
        )
    if not parts:
        parts.append(
            dmc.Text("These numbers are computed in Python; see “Python” for how to get them again.", size="sm")
        )
    return html.Div(parts)


def _text(text: str, words: str, *more: Any) -> Any:
    """A text to copy."""
    copy = dmc.CopyButton(value=text, children="Copy", copiedChildren="Copied", size="compact-xs", variant="default")
    return html.Div(
        [
            dmc.Group([dmc.Text(words, className="muted"), copy, *[part for part in more if part]], gap="sm"),
            html.Pre(text, className="code foreign", tabIndex="0", role="region", **named(words)),
        ]
    )
