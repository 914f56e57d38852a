"""The expert card: what plain queries tell comes at once, each finding of an analysis when it is there."""

from __future__ import annotations

from typing import Any

import dash
import dash_mantine_components as dmc
from dash import MATCH, Input, Output, State, dcc, html

from moescope.core.errors import MoescopeError
from moescope.dashboard import cards, expert_counts, expert_findings, expert_records, numbers
from moescope.dashboard.answers import Answers
from moescope.dashboard.browser import attributes, in_browser
from moescope.dashboard.expert_findings import READS_ALL, SECTIONS
from moescope.dashboard.expert_parts import quiet, reason
from moescope.dashboard.records import Router, find_router, layer_of, routers
from moescope.dashboard.services import services_of
from moescope.dashboard.url_state import Layer, ViewState, decode, link
from moescope.store.run import Run
from moescope.store.store import Store

_QUERIES = {"tokens": ("Top tokens", expert_counts.top_pieces), "contexts": ("Contexts", expert_counts.contexts)}
_WIDE = "wide-"
"""Before the ids of the full card: the panel's card may leave the page in the same moment."""
_NO_SHARED = {
    "labels": "is nothing to compare over labels",
    "tokens": "is no choice to count",
    "contexts": "is no choice to show",
    "partners": "are no partners",
    "path": "is no path",
    "importance": "is no rank among routed experts",
    "ablation": "is no sweep of it",
    "rules": "the rules compare it with all others",
}


def expert_card(run: Run, router: Router, known: list[Router], expert: int, *, wide: bool = False) -> Any:
    """Everything recorded of one expert, each count a link to its tokens.

    Args:
        run: whose expert.
        router: of which router.
        known: all routers of the run.
        expert: its id; negative for a shared one.
        wide: as a page of its own, its parts side by side.
    """
    here = ViewState(run=run.name, layer=layer_of(router, known), expert=expert)
    large = run.rows("routing") > expert_records.LONG
    parts = [
        expert_counts.load(run, router, here),
        expert_counts.output(run, router, here),
        *(_later(run, router, here, name, large=large, wide=wide) for name in ("labels", "tokens", "contexts", *_REST)),
    ]
    body = html.Div([html.Div(part, className="card-part") for part in parts], className="card-parts")
    return html.Div(
        [_actions(router, here, wide=wide), body], className="expert-card wide-card" if wide else "expert-card"
    )


_REST = ("partners", "path", "importance", "ablation", "latents", "rules")


def _actions(router: Router, here: ViewState, *, wide: bool) -> Any:
    """Where to go from here: tokens, lab, comparison, the other size of the card."""
    expert = here.expert or 0
    size = _WIDE if wide else ""
    parts = [
        dmc.Anchor("Its tokens, highlighted →", href=link("/tokens", here), size="sm"),
        dmc.Anchor(f"All of {router.name} →", href=link("/tokens", here.but(expert=None)), size="sm"),
    ]
    if expert >= 0:
        parts += [
            dmc.Anchor("Ablate in the Lab →", id=size + "expert-lab", href=link("/lab", here), size="sm"),
            dcc.Store(id=size + "expert-edit", data=expert_findings.edit_line(router, expert)),
        ]
    parts += [
        dmc.Button("Pin to compare", id=size + "expert-pin", size="compact-xs", variant="default"),
        dcc.Store(id=size + "expert-name", data=f"{here.layer}:{expert}"),
        dmc.Anchor("Beside the map" if wide else "Full card →", href=_other_size(here, wide=wide), size="sm"),
    ]
    return html.Div(parts, className="card-actions")


def _other_size(here: ViewState, *, wide: bool) -> str:
    return link("/experts", here if wide else here.with_rest(view="card"))


def _later(run: Run, router: Router, here: ViewState, name: str, *, large: bool, wide: bool) -> Any:
    """A part that is filled by a request of its own; one that reads everything of a large run waits for a click."""
    title = SECTIONS[name][0] if name in SECTIONS else _QUERIES[name][0]
    if (here.expert or 0) < 0 and name in _NO_SHARED:
        return cards.section(title, expert_findings.no_shared(here.expert or 0, _NO_SHARED[name]))
    wait = large and name in READS_ALL
    place = _WIDE + name if wide else name
    first: Any = dmc.Skeleton(height=96)
    if name == "labels":
        first = expert_counts.labels(run, router, here)
    elif wait:
        first = quiet("Not computed yet.")
    words = f"Compute: reads all {numbers.short_count(run.rows('routing'))} decisions" if wait else ""
    ask = {"run": run.name, "layer": str(here.layer), "expert": here.expert, "wait": wait}
    return cards.section(
        title,
        html.Div(
            [
                dcc.Store(id=card_part(place, "ask"), data=ask),
                html.Div(first, id=card_part(place, "body"), **attributes(aria_live="polite")),
                dmc.Button(
                    words or "Compute",
                    id=card_part(place, "go"),
                    size="compact-xs",
                    variant="default",
                    style={} if wait else {"display": "none"},
                ),
            ]
        ),
    )


def card_part(name: Any, part: str) -> dict[str, Any]:
    """The id of one part of a card: what is asked, its body, the button that starts it."""
    return {"card": name, "part": part}


def card_callbacks(app: dash.Dash, store: Store) -> None:
    """Fill the parts; keep the link to the lab and the pin in step with the address."""
    answers = services_of(app).answers
    for size in ("", _WIDE):
        edit, name = Input(f"{size}expert-edit", "data"), f"{size}expert-name"
        search, button = Input("url", "search"), f"{size}expert-pin"
        in_browser(app, "lab_link", Output(f"{size}expert-lab", "href"), search, edit, space="experts")
        in_browser(app, "pin", Input(button, "n_clicks"), State(name, "data"), space="experts")
        in_browser(app, "pin_words", Output(button, "children"), search, Input(name, "data"), space="experts")

    @app.callback(
        Output(card_part(MATCH, "body"), "children"),
        Output(card_part(MATCH, "go"), "style"),
        Input(card_part(MATCH, "ask"), "data"),
        Input(card_part(MATCH, "go"), "n_clicks"),
    )
    def fill(ask: dict[str, Any] | None, clicks: int | None) -> tuple[Any, Any]:
        if ask is None or (ask["wait"] and not clicks):
            raise dash.exceptions.PreventUpdate
        name = dash.callback_context.outputs_list[0]["id"]["card"]
        return part(store, answers, name.removeprefix(_WIDE), ask), {"display": "none"}


def part(store: Store, answers: Answers, name: str, ask: dict[str, Any]) -> Any:
    """One part of a card, or why there is nothing to show."""
    run = store.run(ask["run"])
    known = routers(run)
    state = decode(f"?layer={ask['layer']}&expert={ask['expert']}")
    router = find_router(run, state, known)
    here = ViewState(run=run.name, layer=Layer(*_place(state)), expert=state.expert)
    try:
        if name in _QUERIES:
            return _QUERIES[name][1](run, router, here)
        return SECTIONS[name][1](answers, run, router, known, here)
    except MoescopeError as refused:
        return reason(refused)


def _place(state: ViewState) -> tuple[int, str | None]:
    layer = state.layer or Layer(0)
    return layer.number, layer.block
