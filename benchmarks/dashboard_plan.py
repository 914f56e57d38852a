"""What is measured on each page of the dashboard: when it is useful, where its first figure is, and what a person does there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

BARS = {
    "first text": 400.0,
    "useful view": 1500.0,
    "first figure": 2500.0,
    "bytes, without a figure": 0.9,
    "bytes, with a figure": 2.3,
    "browser": 100.0,
    "server": 300.0,
    "server, p95": 800.0,
    "server memory": 1500.0,
}
"""Milliseconds and megabytes; `browser` and `server` are medians of interactions that end there."""

FIGURE = "document.querySelector('.page .js-plotly-plot .main-svg .plot, .page .js-plotly-plot .sankey, .page .js-plotly-plot image')"
BELOW = f"(document.querySelector('.panel')?.scrollIntoView({{block: 'center'}}), {FIGURE})"
"""The first figure of a page that shows other things first: a reader scrolls to it at once, and it is made as it comes into view."""
_FILLED = "document.querySelector('.page .card-value, .page .ag-row, .page table td, .page .facts, .page .empty, .page .refusal')"
_PAINTED = "document.querySelector('#tokview[data-ready=painted] .tok')"


@dataclass(frozen=True)
class Interaction:
    """One thing that a person does, again and again.

    Attributes:
        action: script that does it; `{i}` is 0, 1, 2, …
        test: body of a function that gives true once the answer is shown.
        kind: whether it ends in the browser or goes through the server.
        query, ready: where it is done, if not where the page opens, and when that is ready.
    """

    action: str
    test: str
    kind: Literal["browser", "server"] = "server"
    query: str = ""
    ready: str = ""


@dataclass(frozen=True)
class PagePlan:
    """How a page is measured; `figure` is empty for a page that shows none at first."""

    path: str
    query: str = "?run=base"
    useful: str = _FILLED
    figure: str = FIGURE
    interactions: dict[str, Interaction] = field(default_factory=dict)


def changed(selector: str) -> str:
    """A test: the text of what the selector finds is another than before, and not empty."""
    return (
        f"const now = [...document.querySelectorAll({selector!r})].map((e) => e.textContent).join('|');"
        " if (window.before.text === undefined) { window.before.text = now; return false; }"
        " return now !== '' && now !== window.before.text;"
    )


_REPAINTED = (
    "const now = [document.querySelector('#token-legend')?.textContent, document.querySelector('.tok')];"
    " if (!window.before.now) { window.before.now = now; return false; }"
    " return now[1] && now[1] !== window.before.now[1] && document.querySelector('#tokview').dataset.ready === 'painted';"
)
_LAYER = "window.moescope.change({layer: ({i} * 5 + 3) % 48})"

PLANS: dict[str, PagePlan] = {
    plan.path: plan
    for plan in (
        PagePlan(
            "/tokens",
            useful=_PAINTED,
            figure="",
            interactions={
                "layer": Interaction(_LAYER, _REPAINTED),
                "colour": Interaction(
                    "window.moescope.change({mode: ['entropy', 'margin', 'nll', 'norm', 'weight', 'pins'][{i} % 6]})", _REPAINTED
                ),
                "label": Interaction(
                    "window.moescope.change({label: 'domain' + ({i} % 10), page: '', token: ''})",
                    changed("#token-heading"),
                ),
                "expert": Interaction("window.moescope.change({expert: {i} * 3 % 64})", changed("#token-heading")),
                "changed": Interaction(
                    "window.moescope.change({mode: 'changed', layer: 24 + {i} % 24})", _REPAINTED, query="?run=base&mode=entropy"
                ),
                "table, sorted": Interaction(
                    "document.querySelectorAll('.ag-header-cell-label')[{i} % 2 ? 11 : 7]?.click()",
                    changed(".ag-center-cols-container .ag-row"),
                    query="?run=base&view=table",
                    ready="document.querySelector('.ag-row .cell-link')",
                ),
                "table, layer": Interaction(
                    _LAYER,
                    changed(".ag-header-cell-text, .ag-center-cols-container .ag-row[row-index='1']"),
                    query="?run=base&view=table",
                    ready="document.querySelector('.ag-row .cell-link')",
                ),
                "card of a token": Interaction("window.moescope.change({token: 1000 + {i} * 37})", changed(".detail-title")),
            },
        ),
        PagePlan("/", useful="document.querySelector('.page .card-value')", figure=BELOW),
        PagePlan(
            "/experts",
            useful="document.querySelector('.page .ag-row')",
            interactions={
                "card of an expert": Interaction(
                    "window.moescope.change({layer: {i} * 5 % 48, expert: {i} * 11 % 64})", changed(".detail-title, #expert-full h2")
                ),
                "measure": Interaction(
                    "window.moescope.change({measure: ['weight', 'norm', 'load'][{i} % 3]})",
                    changed("#expert-table-words, .page .ag-row"),
                ),
            },
        ),
        PagePlan(
            "/routing",
            useful="document.querySelector('#routing-tab .section-title, #routing-tab h2')",
            interactions={
                "tab": Interaction(
                    "const tabs = document.querySelectorAll('.tab-links a'); tabs[({i} + 1) % tabs.length].click()",
                    changed("#routing-tab"),
                ),
            },
        ),
        PagePlan(
            "/compare",
            query="?run=base&other=edited",
            figure="",  # asks before it reads so many decisions
            useful="document.querySelector('#cmp-body table td, #cmp-body .ag-row, #cmp-body .card-value')",
        ),
        PagePlan("/sql", useful="document.querySelector('#sql-text')", figure=""),
        PagePlan(
            "/features",
            figure="",  # below a table of latents: not measured
            useful="document.querySelector('#features-body .ag-row, #features-body .card-value, #features-body .facts')",
            interactions={
                "a feature": Interaction(
                    "window.moescope.change({sae: 'large', feature: {i} * 31 + 1})", changed("#features-body h2, #features-body h3")
                ),
            },
        ),
        PagePlan(
            "/phenomena",
            interactions={
                "card of a head": Interaction(
                    "window.moescope.change({layer: {i} * 5 % 48, head: {i} % 16})", changed(".detail-title")
                ),
            },
        ),
        PagePlan("/lab", figure="", useful="document.querySelector('.page textarea, .page .empty')"),
        PagePlan("/work", figure="", useful="document.querySelector('.page h2, .page .mantine-Select-root')"),
        PagePlan("/analyses", figure="", useful="document.querySelector('.page h2, .page .ag-row, .page .mantine-Select-root')"),
    )
}  # fmt: skip


def plan_of(path: str) -> PagePlan:
    """The plan of a page; a plain one where it has none of its own."""
    return PLANS.get(path, PagePlan(path))
