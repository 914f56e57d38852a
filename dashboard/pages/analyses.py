"""Any analysis of the registry, with its parameters as controls: what no other page shows is asked here."""

from __future__ import annotations

import inspect
import re
from typing import Any, Literal, get_args, get_origin

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from moescope.core.analysis import SECTION_TITLES, Analysis, Parameter, analyses
from moescope.core.errors import InputError
from moescope.core.pages import Page, pages
from moescope.dashboard import notices
from moescope.dashboard.browser import in_browser
from moescope.dashboard.panel import panel
from moescope.dashboard.url_state import ViewState, decode, link
from moescope.store.run import Run
from moescope.store.store import Store

_SHARED = ("sae", "feature")  # parameters of the address that mean the same everywhere
_WHAT = ["analysis", "other"]
_ARGUMENT = re.compile(r"^    (\w+): (.*(?:\n {8,}.*)*)", re.MULTILINE)


def layout(run: Run, state: ViewState) -> Any:
    """A choice of analyses; the chosen one follows with its parameters and its answer."""
    return html.Div(
        [
            dcc.Store(id="analyses-slice"),
            dcc.Store(id="analyses-wanted", data=_WHAT),
            dcc.Store(id={"defaults": "analyses"}, data={"analysis": None, "other": None}),
            dmc.Select(
                id={"url": "analysis"},
                label="Analysis",
                data=_choices(),
                searchable=True,
                clearable=True,
                placeholder=f"one of {len(list(analyses))}; type to search",
                nothingFoundMessage="no analysis of that name",
                maxDropdownHeight=420,
                w=420,
            ),
            html.Div(id="analyses-body", className="analyses-body"),
        ]
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """Address → the chosen analysis, with its controls; the panel does the rest."""
    in_browser(
        app,
        "slice",
        Output("analyses-slice", "data"),
        Input("url", "search"),
        State("analyses-wanted", "data"),
        State("analyses-slice", "data"),
    )

    @app.callback(Output("analyses-body", "children"), Input("analyses-slice", "data"), State("page-run", "data"))
    def show(address: str | None, name: str | None) -> Any:
        if address is None or name is None:
            raise dash.exceptions.PreventUpdate
        state = decode(address)
        run = store.run(name)
        try:
            return chosen(run, state) if state.given("analysis") else listing(run)
        except InputError as refused:
            return notices.refusal(refused)


def listing(run: Run) -> Any:
    """Every analysis by section, as the question it answers; those without records say what they need."""
    sections: dict[str, list[Any]] = {}
    rows: dict[str, int] = {}
    for analysis in sorted(
        analyses, key=lambda a: (list(SECTION_TITLES).index(a.section) if a.section else 99, a.order)
    ):
        title = SECTION_TITLES[analysis.section] if analysis.section else "Others"
        sections.setdefault(title, []).append(_line(run, analysis, rows))
    return [
        html.Section([dmc.Title(title, order=2, className="section-title"), html.Ul(lines, className="plain-list")])
        for title, lines in sections.items()
    ]


def _line(run: Run, analysis: Analysis, rows: dict[str, int]) -> Any:
    for table in analysis.needs:
        rows.setdefault(table, run.rows(table))
    missing = [table for table in analysis.needs if not rows[table]]
    state = ViewState(run=run.name).with_rest(analysis=analysis.name)
    words = [dmc.Anchor(_spoken(analysis.name), href=link("/analyses", state), size="sm"), f" {analysis.summary}"]
    if analysis.runs > 1:
        words.append(html.Span(" (of two runs)", className="soft"))
    if missing:
        words.append(html.Span(f" Not recorded here: {', '.join(missing)}.", className="soft"))
    return html.Li(words)


def chosen(run: Run, state: ViewState) -> Any:
    """One analysis: its question, its parameters, its answer.

    Raises:
        InputError: there is no such analysis, or no second run of that name.
    """
    name = state.given("analysis")
    analysis = analyses[name]
    runs = [run]
    parts: list[Any] = [dmc.Text(analysis.summary, className="question")]
    if analysis.runs > 1:
        others = [other.name for other in run.store.runs() if other.name != run.name]
        parts.append(_other(others))
        if state.other is None:
            why = "Choose the run to compare with." if others else "The store has no other run to compare with."
            return [*parts, notices.empty("Two runs are compared", why)]
        runs.append(run.store.run(state.other))
    if missing := [table for one in runs for table in analysis.missing(one)]:
        return [*parts, notices.not_recorded(_spoken(name), f"It reads {', '.join(dict.fromkeys(missing))}.")]
    parameters = analysis.parameters.values()
    named = {_address(parameter): parameter.name for parameter in parameters}
    defaults = {_address(parameter): _default(parameter) for parameter in parameters}
    words = arguments(analysis)
    fields = html.Div(
        [_control(parameter, words.get(parameter.name, "")) for parameter in parameters], className="fields"
    )
    return [
        *parts,
        dcc.Store(id={"defaults": "analysis"}, data=defaults),
        html.Details([html.Summary("Parameters"), fields], open=True, className="parameters") if named else None,
        panel(f"analysis-{name}", name, runs, wanted=named, eager=True),
    ]


def arguments(analysis: Analysis) -> dict[str, str]:
    """What the docstring says of each parameter."""
    text = inspect.getdoc(analysis.function) or ""
    listed = text.partition("Args:\n")[2].partition("\n\n")[0]
    return {found[1]: " ".join(found[2].split()) for found in _ARGUMENT.finditer(listed)}


def _address(parameter: Parameter) -> str:
    """The parameter of the address that holds a parameter of the analysis."""
    return parameter.name if parameter.name in _SHARED else f"p_{parameter.name}"


def _default(parameter: Parameter) -> str:
    value = parameter.default
    return "" if value is None or value is inspect.Parameter.empty else _written(value)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _control(parameter: Parameter, words: str) -> Any:
    options = _options(parameter)
    shown: dict[str, Any] = {
        "id": {"url": _address(parameter)},
        "label": parameter.name.replace("_", " "),
        "description": words or parameter.describe(),
        "size": "xs",
    }
    if options is not None:
        return dmc.Select(data=options, allowDeselect=False, **shown)
    return dmc.TextInput(debounce=600, placeholder=_placeholder(parameter), **shown)


def _placeholder(parameter: Parameter) -> str:
    default = parameter.default
    return "none" if default is None else "" if default is inspect.Parameter.empty else _written(default)


def _options(parameter: Parameter) -> list[str] | None:
    """The values of a parameter that has only a few."""
    kind = parameter.annotation
    if kind is bool:
        return ["true", "false"]
    return [_written(value) for value in get_args(kind)] if get_origin(kind) is Literal else None


def _other(names: list[str]) -> Any:
    return dmc.Select(id={"url": "other"}, label="Compared with", data=names, searchable=True, clearable=True, w=420)


def _choices() -> list[dict[str, Any]]:
    groups: dict[str, list[dict[str, str]]] = {}
    for analysis in sorted(
        analyses, key=lambda a: (list(SECTION_TITLES).index(a.section) if a.section else 99, a.order)
    ):
        title = SECTION_TITLES[analysis.section] if analysis.section else "Others"
        groups.setdefault(title, []).append({"value": analysis.name, "label": _spoken(analysis.name)})
    return [{"group": title, "items": items} for title, items in groups.items()]


def _spoken(name: str) -> str:
    return name.replace("_", " ")


pages.add(
    "analyses",
    Page("Analyses", "/analyses", "Run", 13, "Any question of the registry, with its parameters.", layout, callbacks),
)
