"""Two runs: what differs in how they were made, then in every measure, then token by token."""

from __future__ import annotations

from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from moescope.core.errors import MoescopeError
from moescope.core.pages import Page, pages
from moescope.dashboard import cards, notices, numbers
from moescope.dashboard.browser import in_browser
from moescope.dashboard.compare import configuration, grounds, measures, side_by_side, texts
from moescope.dashboard.overview import findings_list
from moescope.dashboard.panel import panel
from moescope.dashboard.records import choices
from moescope.dashboard.services import services_of
from moescope.dashboard.unrecorded import command
from moescope.dashboard.url_state import ViewState, decode, link
from moescope.store.run import Run
from moescope.store.store import Store

_OTHER = ["other", "ask"]
_ROWS = ["other", "rows"]
_TEXT = ["other", "sequence", "show", "page"]


def layout(run: Run, state: ViewState) -> Any:
    """The choice of the other run; the address fills the rest."""
    others = [r.name for r in reversed(run.store.runs()) if r.run_id != run.run_id]
    if not others:
        return notices.empty(
            "Only one run",
            "A comparison needs a second run in this store: of another model, with an intervention, or of other texts.",
            command=command(run, "profile {model} --name second", model=True),
        )
    picker = dmc.Select(
        id={"url": "other"},
        data=[{"value": name, "label": name} for name in others],
        value=state.other,
        placeholder="choose a run",
        searchable=True,
        size="xs",
        w=260,
        label="Compared with",
        nothingFoundMessage="no such run",
        classNames={"label": "control-label"},
    )
    first = html.Div(
        [html.Div("First run", className="control-label"), dmc.Text(run.name, className="foreign strong cmp-first")]
    )
    wanted = {"cmp-other": _OTHER, "cmp-rows": _ROWS, "cmp-text": _TEXT}
    stores = [
        store
        for name, parameters in wanted.items()
        for store in (dcc.Store(id=name), dcc.Store(id=f"{name}-wanted", data=parameters))
    ]
    return dmc.Stack(
        [
            *stores,
            dcc.Store(id="cmp-run", data=run.name),
            dcc.Store(id={"defaults": "compare"}, data={"other": "", "rows": "changed", "show": "all"}),
            html.Div([first, picker, html.Div(id="cmp-swap")], className="controls cmp-head"),
            html.Div(id="cmp-body", children=dmc.Skeleton(height=300)),
        ],
        gap="md",
    )


def callbacks(app: dash.Dash, store: Store) -> None:
    """The body follows `other`; its table of settings, its measures and its tokens follow the rest of the address."""
    services = services_of(app)
    for name in ("cmp-other", "cmp-rows", "cmp-text"):
        in_browser(
            app,
            "slice",
            Output(name, "data"),
            Input("url", "search"),
            State(f"{name}-wanted", "data"),
            State(name, "data"),
        )

    @app.callback(
        Output("cmp-body", "children"),
        Output("cmp-swap", "children"),
        Input("cmp-other", "data"),
        State("cmp-run", "data"),
    )
    def show_body(address: str | None, name: str | None) -> tuple[Any, Any]:
        run, state = _asked(store, address, name)
        if state.other is None:
            return candidates(run), None
        try:
            return body(run, store.run(state.other), state), swap(run, state)
        except MoescopeError as refused:
            return notices.refusal(refused), None

    @app.callback(
        Output("cmp-settings", "children"),
        Input("cmp-rows", "data"),
        Input("cmp-ready", "data"),
        State("cmp-run", "data"),
    )
    def show_settings(address: str | None, _ready: Any, name: str | None) -> Any:
        run, other, state = _two(store, address, name)
        return configuration.configuration_table(run, other, every=state.given("rows") == "all")

    @app.callback(Output("cmp-measured", "children"), Input("cmp-ready", "data"), State("cmp-run", "data"))
    def show_measures(address: str | None, name: str | None) -> Any:
        run, other, _ = _two(store, address, name)
        return measures.measures(services.answers, run, other)

    @app.callback(Output("cmp-text-list", "children"), Input("cmp-ready", "data"), State("cmp-run", "data"))
    def show_texts(address: str | None, name: str | None) -> Any:
        run, other, state = _two(store, address, name)
        rows = texts.changed_texts(run, other)
        return texts.texts_grid(rows, state, len(rows))

    @app.callback(
        Output("cmp-side", "children"), Input("cmp-text", "data"), Input("cmp-ready", "data"), State("cmp-run", "data")
    )
    def show_tokens(address: str | None, _ready: Any, name: str | None) -> Any:
        run, other, state = _two(store, address, name)
        return tokens(run, other, state)


def body(run: Run, other: Run, state: ViewState) -> Any:
    """Everything below the choice of runs: grounds, settings, measures, panels, texts."""
    known = grounds.grounds(run, other)
    able, unable = grounds.comparisons(run, other)
    switch = dmc.SegmentedControl(
        id={"url": "rows"},
        data=[{"value": "changed", "label": "Changed"}, {"value": "all", "label": "All"}],
        value="changed",
        size="xs",
    )
    measured = next((a for a in able if a.name == "compare_measures"), None)
    parts = [
        dcc.Store(id="cmp-ready", data=f"?other={_quoted(other.name)}"),
        cards.section("What can be said", grounds.grounds_list(known)),
        cards.section(
            "Configuration",
            html.Div([switch, html.Div(dmc.Skeleton(height=120), id="cmp-settings")]),
            note="How the two runs were made.",
        ),
    ]
    if measured is not None:
        parts.append(
            cards.section("Every measure that both have", html.Div(dmc.Skeleton(height=240), id="cmp-measured"))
        )
    if known.pairs:
        parts.append(_aligned(known.pairs))
    reads = max(choices(run), choices(other))
    if reads > findings_list.DECISIONS and state.given("ask") != "all":
        parts.append(_waiting(run, other, reads))
    else:
        parts += _panels(run, other, [a.name for a in able], measured is not None)
    parts.append(grounds.unable_list(unable))
    return dmc.Stack([part for part in parts if part is not None], gap="xl")


def tokens(run: Run, other: Run, state: ViewState) -> Any:
    """The tokens of the text that the address names, or what to do to see some."""
    if state.sequence is None:
        return dmc.Text("Choose a text above: its tokens are laid side by side here.", className="muted")
    try:
        grid = side_by_side.side_by_side(run, other, state)
    except MoescopeError as refused:
        return notices.refusal(refused)
    return grid


def candidates(run: Run) -> Any:
    """Runs that this one may be compared with, those of the same texts first."""
    fingerprint = run.info["corpus_fingerprint"]
    others = [r for r in reversed(run.store.runs()) if r.run_id != run.run_id]
    same = {r.name: fingerprint is not None and r.info["corpus_fingerprint"] == fingerprint for r in others}
    items = [
        html.Li(
            [
                dmc.Anchor(r.name, href=link("/compare", ViewState(run=run.name, other=r.name)), className="foreign"),
                dmc.Text(" same texts" if same[r.name] else " other texts", span=True, className="muted"),
            ]
        )
        for r in sorted(others, key=lambda r: not same[r.name])[:50]
    ]
    return cards.section(
        "Compare with which run?",
        html.Ul(items),
        note="Runs of the same texts first: their tokens can be laid side by side.",
    )


def swap(run: Run, state: ViewState) -> Any:
    """The link that exchanges the two."""
    return dmc.Anchor(
        "⇄ Swap", href=link("/compare", ViewState(run=state.other, other=run.name)), size="sm", className="cmp-swap"
    )


def _aligned(pairs: int) -> Any:
    show = dmc.SegmentedControl(
        id={"url": "show"},
        data=[{"value": name, "label": name.capitalize()} for name in side_by_side.SHOWS],
        value="all",
        size="xs",
    )
    return cards.section(
        "Aligned tokens",
        html.Div(
            [
                html.Div(dmc.Skeleton(height=240), id="cmp-text-list"),
                html.Div(
                    [
                        dmc.Text("Show", className="muted"),
                        show,
                        dmc.Text(
                            "changed: a router chose other experts; lost and gained: predictions right in one run only.",
                            className="muted",
                        ),
                    ],
                    className="cmp-show",
                ),
                html.Div(id="cmp-side"),
            ]
        ),
        note=f"Texts in both runs ({pairs:,}), those whose mean NLL changed most first, at most {texts.SHOWN}.",
        identity="aligned",
    )


def _waiting(run: Run, other: Run, reads: int) -> Any:
    """What stands in place of figures that would read every decision of long runs."""
    ask = ViewState(run=run.name, other=other.name).with_rest(ask="all")
    return cards.section(
        "Routing compared",
        dmc.Anchor("Ask all the same →", href=link("/compare", ask), size="sm"),
        note=f"These figures read all {numbers.count(reads)} decisions of each run, which takes seconds to minutes.",
    )


def _panels(run: Run, other: Run, names: list[str], measured: bool) -> list[Any]:
    """A panel for every comparison that the two have the records for, and for the effect of the one's intervention."""
    runs = [run, other]
    shown = [panel("cmplayers", "compare_measures", runs, given={"by": "layer"}, click="layer")] if measured else []
    shown += [panel("cmpmodel", "compare_measures", runs)] if measured else []
    shown += [
        panel(f"cmp{name.replace('_', '')}", name, runs, click="layer") for name in names if name != "compare_measures"
    ]
    if (effect := _effect(run, other)) is not None:
        shown.append(panel("cmpeffect", "effect", [run], given={"effect": effect}))
    return shown


def _effect(run: Run, other: Run) -> str | None:
    """The effect that was measured against the first run with the other's intervention; None for none."""
    found = run.store.fetch(
        """
        SELECT e.effect_id::VARCHAR
        FROM effects e
        JOIN runs o ON o.run_id = $other
        WHERE e.base_run_id = $run AND e.kind = 'target' AND e.group_kind = 'all'
            AND (e.run_id = o.run_id OR e.intervention::VARCHAR = o.intervention::VARCHAR)
        ORDER BY e.effect_id DESC
        LIMIT 1
        """,
        {"run": run.run_id, "other": other.run_id},
    )
    return str(found[0][0]) if found else None


def _asked(store: Store, address: str | None, name: str | None) -> tuple[Run, ViewState]:
    if not name:
        raise dash.exceptions.PreventUpdate
    return store.run(name), decode(address).but(run=name)


def _two(store: Store, address: str | None, name: str | None) -> tuple[Run, Run, ViewState]:
    run, state = _asked(store, address, name)
    if state.other is None:
        raise dash.exceptions.PreventUpdate
    return run, store.run(state.other), state


def _quoted(name: str) -> str:
    return link("", ViewState(other=name)).removeprefix("?other=")


pages.add(
    "compare",
    Page(
        "Compare",
        "/compare",
        "Run",
        11,
        "Two runs, difference first: how they were made, what they measure, token by token.",
        layout,
        callbacks,
    ),
)
