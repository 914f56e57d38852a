"""The sections of the page: each shows what the run holds, or what it would show and the command that fills it."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from moescope.dashboard import cards
from moescope.dashboard.browser import named
from moescope.dashboard.panel import panel
from moescope.dashboard.phenomena_page.head_scores import measures
from moescope.dashboard.phenomena_page.recorded import Recorded, other_holders
from moescope.dashboard.unrecorded import command, copied, unrecorded
from moescope.dashboard.url_state import ViewState, link
from moescope.routing.phenomena.head_metrics import head_metric
from moescope.store.run import Run

_ALL = "phenomena {model}"
_SHOWS = (
    (
        "Chain",
        "who writes the massive activation, which sink it makes, which heads read past it, and what is left once each is cut",
    ),
    ("Massive activations", "layers, positions, channels and tokens on which the residual stream is largest"),
    ("Super experts", "the experts that published rules call so, with value and threshold"),
    ("Heads", "every attention head by sink, induction, retrieval and other scores, and a card for each"),
)


def nothing(run: Run) -> Any:
    """The page of a run without any record of phenomena."""
    return html.Div(
        dmc.Stack(
            [
                dmc.Title("No phenomena recorded", order=2, className="section-title"),
                dmc.Text(
                    [
                        "Run ",
                        html.Span(run.name, className="foreign strong"),
                        " holds neither the residual stream nor outputs of experts nor scores of heads. With them this page shows:",
                    ],
                    className="muted",
                ),
                dmc.List([dmc.ListItem([html.Strong(name), f": {what}"]) for name, what in _SHOWS], size="sm"),
                copied(command(run, _ALL, model=True)),
                elsewhere(run),
            ],
            gap="sm",
        ),
        className="empty left",
    )


def elsewhere(run: Run) -> Any:
    """Other runs of the store that hold phenomena, as links; nothing where there are none."""
    found = other_holders(run)
    if not found:
        return None
    items = [
        dmc.ListItem(
            [
                dmc.Anchor(name, href=link("/phenomena", ViewState(run=name)), size="sm", className="foreign"),
                html.Span(f": {', '.join(what)}", className="soft"),
            ]
        )
        for name, what in found
    ]
    return dmc.Box(
        [dmc.Text("Other runs of this store that hold some:", className="muted"), dmc.List(items, size="sm")]
    )


def chain(run: Run, has: Recorded) -> Any:
    """The chain: verdicts as text, then the figure."""
    if not has.has("residual", "residual_sequences"):
        return cards.section(
            "The chain",
            unrecorded("Chain of phenomena", f"It would show {_SHOWS[0][1]}.", command(run, _ALL, model=True)),
        )
    return html.Div(
        [
            cards.section(
                "The chain, link by link",
                html.Div(dmc.Skeleton(height=180), id="chain-verdicts", style={"minHeight": 120}),
                note="Each number stands beside the same cut made at random. A link is called lost only where less remains than "
                "under every random cut and the interval agrees.",
            ),
            panel("chain", "phenomena_chain", [run], given={"uncut": True}, height=560),
        ],
        className="section",
    )


def massive(run: Run, has: Recorded) -> Any:
    """Where the largest activations stand, with the token of a clicked mark."""
    if not has.has("residual"):
        return cards.section(
            "Massive activations",
            unrecorded(
                "Residual stream",
                f"It would show {_SHOWS[1][1]}.",
                command(run, "profile {model} --probe tokens,residual", model=True),
            ),
        )
    shown = [
        dmc.Group(
            [
                dmc.Text("Columns", className="control-label"),
                dmc.SegmentedControl(
                    id={"url": "by"},
                    data=[{"value": "position", "label": "Position"}, {"value": "channel", "label": "Channel"}],
                    value="position",
                    size="xs",
                    **named("Columns of the map"),
                ),
            ],
            gap="xs",
        ),
        panel("massivemap", "massive_map", [run], wanted={"by": "by"}, click="token", height=340),
        html.Div(id="massive-token"),
    ]
    if has.has("residual_sequences"):
        shown += [
            panel("massive", "massive_activations", [run], height=440),
            _pair(
                panel("maxima", "residual_maxima", [run], height=400),
                panel("norms", "residual_norms", [run], height=400),
            ),
        ]
    else:
        shown.append(panel("norms", "residual_norms", [run], height=400))
    return cards.section(
        "Massive activations",
        html.Div(shown),
        note="A click on a cell of the map shows its token and the text around it.",
    )


def super_experts(run: Run, has: Recorded, *, moe: bool) -> Any:
    """Super experts by every rule."""
    if not moe:
        return cards.section(
            "Super experts",
            dmc.Text("The model of this run has no experts, so it can have no super expert.", className="muted"),
        )
    if not has.has("experts"):
        return cards.section(
            "Super experts",
            unrecorded(
                "Outputs of experts",
                f"It would show {_SHOWS[2][1]}.",
                command(run, "profile {model} --probe tokens,routing,experts,residual", model=True),
            ),
        )
    return cards.section(
        "Super experts",
        html.Div(
            [
                html.Div(dmc.Skeleton(height=160), id="super-experts", style={"minHeight": 120}),
                _pair(
                    panel("superexperts", "super_experts", [run], height=420),
                    panel("sensitivity", "super_expert_sensitivity", [run], height=420),
                ),
            ]
        ),
        note="Every published rule, side by side; a name leads to the expert's card, a token to its text.",
    )


def heads(run: Run, has: Recorded, state: ViewState) -> Any:
    """All heads by one score, the leading ones as a table, and the protocols of heads."""
    if not has.has("heads"):
        return cards.section(
            "Attention heads",
            html.Div(
                [
                    unrecorded(
                        "Scores of attention heads",
                        f"It would show {_SHOWS[3][1]}.",
                        command(run, "profile {model} --probe tokens,attention", model=True),
                    ),
                    *_protocols(run, has),
                ]
            ),
        )
    known = measures(run)
    first = next(iter(known))
    chosen = state.given("measure", first)
    conditions = list(dict.fromkeys(c for each in known.values() for c in each))
    controls: list[Any] = [
        dmc.Select(
            id={"url": "measure"},
            label="Score",
            data=[{"value": name, "label": _label(name)} for name in known],
            value=chosen if chosen in known else first,
            searchable=True,
            allowDeselect=False,
            size="xs",
            w=380,
        )
    ]
    defaults = {"measure": first}
    if len(conditions) > 1:
        controls.append(
            dmc.Select(
                id={"url": "condition"},
                label="Condition",
                data=[{"value": "", "label": "as recorded"}, *({"value": c, "label": c} for c in conditions)],
                value=state.given("condition", ""),
                allowDeselect=False,
                size="xs",
                w=220,
            )
        )
        defaults["condition"] = ""
    return cards.section(
        "Attention heads",
        html.Div(
            [
                dcc.Store(id={"defaults": "phenomena-heads"}, data=defaults),
                html.Div(controls, className="controls"),
                html.Div(
                    [
                        panel(
                            "headmap", "head_map", [run], wanted={"measure": "metric", "condition": "condition"}, click="head",
                            height=360,
                        ),
                        html.Div(
                            [
                                html.H3("Leading heads", className="sub-title"),
                                html.Div(dmc.Skeleton(height=300), id="head-table", style={"minHeight": 300}),
                            ]
                        ),
                    ],
                    className="two-columns",
                ),
                *_protocols(run, has),
            ]
        ),
        note="A click on a head, or on a row, opens its card.",
    )  # fmt: skip


_PROTOCOLS = (
    (
        "induction_heads",
        "Induction heads",
        "Which heads look at what came after a token before, on repeated random tokens.",
    ),
    (
        "retrieval_heads",
        "Retrieval heads",
        "Which heads copy a needle's answer out of a long text, with the published score.",
    ),
    (
        "head_roles",
        "Roles by what a head can be left with",
        "The cheapest set of keys that keeps 95 % of a head's attention (FastGen).",
    ),
)


def _protocols(run: Run, has: Recorded) -> list[Any]:
    """Panels of the protocols, each from the run that holds it; what was not run says so."""
    shown: list[Any] = []
    if "attention" in has.protocols:
        shown.append(
            _pair(
                panel("sinks", "attention_sinks", [run], height=420),
                panel("classes", "attention_classes", [run], height=420),
            )
        )
    for analysis, title, shows in _PROTOCOLS:
        holder = has.protocols.get(analysis)
        if holder is None:
            words = _ALL if analysis != "head_roles" else None
            python = (
                "Measure it in Python: moescope.probes.phenomena.head_roles.head_roles(model, texts, store=store)."
                if words is None
                else ""
            )
            shown.append(
                unrecorded(title, f"{shows} {python}".strip(), command(run, words, model=True) if words else None)
            )
            continue
        if holder != run.name:
            shown.append(
                dmc.Text(
                    ["Measured in the run ", html.Span(holder, className="foreign strong"), " of the same model:"],
                    className="muted",
                )
            )
        shown.append(panel(analysis.replace("_", ""), analysis, [run.store.run(holder)], height=460))
    return shown


def _label(name: str) -> str:
    words = head_metric(name).words
    return words if words == name else f"{words[:1].upper()}{words[1:]}"


def _pair(one: Any, other: Any) -> Any:
    return html.Div([one, other], className="panel-pair")
