"""Simulators: a slider that moves on a kept answer. The whole curve is computed once; cards and marker follow in the browser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import MATCH, Input, Output, State, dcc, html

from moescope.core.errors import MoescopeError
from moescope.core.result import Result
from moescope.dashboard.answers import Answers
from moescope.dashboard.browser import in_browser
from moescope.dashboard.panel_tools import part
from moescope.dashboard.records import Router, routers
from moescope.dashboard.routing_page import cache_cards, capacity_cards, placement_cards
from moescope.dashboard.routing_page.card_data import Cards, Range
from moescope.dashboard.url_state import ViewState, decode
from moescope.store.run import Run
from moescope.store.store import Store


@dataclass(frozen=True)
class Simulator:
    """One slider with its value cards.

    Attributes:
        analysis: whose answer holds the whole curve.
        parameter: of the address, that the slider changes.
        label: name of the slider.
        cards: how many value cards there are.
        span: positions of the slider for a run.
        made: the cards at every position, from the answer.
        given: parameters of the analysis that make it give the whole curve.
        reads: further parameters of the address that the cards depend on.
    """

    analysis: str
    parameter: str
    label: str
    cards: int
    span: Callable[[list[Router]], Range]
    made: Callable[[Result, Run, ViewState, list[Router]], Cards]
    given: Callable[[list[Router]], Mapping[str, Any]] = lambda known: {}
    reads: tuple[str, ...] = ()


SIMULATORS: dict[str, Simulator] = {
    "cache": Simulator(
        "expert_cache", "slots", "Slots a layer", 6, cache_cards.span, cache_cards.cache, reads=("expert_bytes",)
    ),
    "prefetch": Simulator(
        "expert_prefetch", "slots", "Slots a layer", 5, cache_cards.span, cache_cards.prefetch, reads=("expert_bytes",)
    ),
    "capacity": Simulator(
        "capacity", "factor", "Capacity factor", 6, capacity_cards.span, capacity_cards.capacity,
        capacity_cards.given,
    ),
    "placement": Simulator(
        "placement", "devices", "Devices", 5, placement_cards.device_span, placement_cards.placement,
        placement_cards.given,
    ),
    "replication": Simulator(
        "replication", "copies", "Extra copies a layer", 4, placement_cards.copy_span, placement_cards.replication
    ),
}  # fmt: skip


def given(run: Run, name: str | None) -> dict[str, Any]:
    """Parameters that make the panel of a simulator hold its whole curve."""
    return dict(SIMULATORS[name].given(routers(run))) if name else {}


def simulator(run: Run, state: ViewState, name: str, known: list[Router]) -> Any:
    """Slider and cards; the cards fill when the answer is there."""
    kind = SIMULATORS[name]
    span = kind.span(known)
    at = span.position(state.given(kind.parameter))
    identity = f"routing-{kind.analysis.replace('_', '-')}"
    return html.Div(
        [
            dcc.Store(id={"sim": name, "part": "data"}),
            dcc.Store(
                id={"sim": name, "part": "spec"},
                data={
                    "parameter": kind.parameter,
                    "default": span.default,
                    "least": span.least,
                    "most": span.most,
                    "power": span.power,
                    "steps": span.steps,
                    "panel": identity,
                },
            ),
            html.Div(
                [
                    html.Div(
                        [
                            html.Span(kind.label, className="control-label"),
                            html.Span(id={"sim": name, "part": "words"}, className="slide-words"),
                        ],
                        className="slide-head",
                    ),
                    dmc.Slider(
                        id={"sim": name, "part": "slide"},
                        value=at,
                        min=span.least,
                        max=span.most,
                        step=span.step,
                        marks=[{"value": value, "label": word} for value, word in span.marks],
                        **({"scale": {"function": "powerOfTwo"}} if span.power else {}),
                        label={"function": "slideLabel"},
                        thumbLabel=kind.label,
                        updatemode="drag",
                        size="sm",
                        className="slide",
                    ),
                ],
                className="slide-box",
            ),
            html.Div(
                [dmc.Skeleton(height=92) for _ in range(kind.cards)],
                id={"sim": name, "part": "cards"},
                className="sim-cards",
            ),
        ],
        className="simulator",
        **_named(name),
    )


def _named(name: str) -> dict[str, Any]:
    """The mark by which the browser finds a simulator."""
    return {"data-simulator": name}


def simulator_callbacks(app: dash.Dash, store: Store, answers: Answers) -> None:
    """Answer → cards at every position, on the server; slider → cards, marker and address, in the browser."""
    in_browser(
        app,
        "slide",
        Output({"sim": MATCH, "part": "cards"}, "children"),
        Output({"sim": MATCH, "part": "words"}, "children"),
        Input({"sim": MATCH, "part": "slide"}, "value"),
        Input({"sim": MATCH, "part": "data"}, "data"),
        Input("url", "search"),
        State({"sim": MATCH, "part": "spec"}, "data"),
        space="routing",
    )
    in_browser(
        app,
        "place",
        Output({"sim": MATCH, "part": "slide"}, "value"),
        Input("url", "search"),
        State({"sim": MATCH, "part": "slide"}, "value"),
        State({"sim": MATCH, "part": "spec"}, "data"),
        space="routing",
    )
    for name, kind in SIMULATORS.items():
        _cards_callback(app, store, answers, name, kind)


def _cards_callback(app: dash.Dash, store: Store, answers: Answers, name: str, kind: Simulator) -> None:
    @app.callback(
        Output({"sim": name, "part": "data"}, "data"),
        Input(part(f"routing-{kind.analysis.replace('_', '-')}", "ask"), "data"),
        Input({"url": "expert_bytes"}, "value", allow_optional=True),
        State("url", "search"),
        State("page-run", "data"),
        prevent_initial_call=True,
    )
    def make(ask: dict[str, Any] | None, _bytes: Any, search: str | None, run_name: str | None) -> Any:
        if not ask or run_name is None:
            raise dash.exceptions.PreventUpdate
        run = store.run(run_name)
        return cards_of(answers, run, decode(search), kind, ask)


def cards_of(
    answers: Answers, run: Run, state: ViewState, kind: Simulator, ask: Mapping[str, Any]
) -> Cards | dict[str, str]:
    """The cards at every position of a simulator's slider; where there is no answer, in short why."""
    try:
        result = answers.ask(ask)
        return kind.made(result, run, state, routers(run))
    except MoescopeError as refused:
        return {"problem": refused.problem}
