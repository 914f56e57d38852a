"""What stands out in a run: every applicable analysis' finding, the furthest from chance first.

The answers are computed after the page is shown, a few at a time, and kept.
"""

from __future__ import annotations

import time
from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from moescope.core.analysis import SECTION_TITLES, Analysis, Section, analyses
from moescope.core.errors import MoescopeError
from moescope.core.registry import Registry
from moescope.dashboard import grids, numbers
from moescope.dashboard.answers import Answers
from moescope.dashboard.records import choices
from moescope.dashboard.url_state import ViewState, link
from moescope.routing.findings import DEFINITION, VERDICTS, WORDS, Finding, finding
from moescope.store.run import Run

AT_ONCE_S = 0.6
"""Seconds of analyses in one request: the page says after each how far it is."""
DECISIONS = 6_000_000
"""Above this many decisions, analyses that read them one by one wait for the reader's word."""

_PER_TOKEN = {"routing", "router_logits", "expert_outputs", "residual"}
_LATE = {"overview", "comparison"}
_ICONS = {"beyond": "●", "partly": "◐", "within": "○", "unjudged": "–"}
_PAGES: dict[Section, tuple[str, str]] = {
    "predictions": ("Tokens", "/tokens"),
    "routing": ("Routing", "/routing"),
    "balance": ("Experts", "/experts"),
    "consistency": ("Routing", "/routing"),
    "caching": ("Routing", "/routing"),
    "experts": ("Experts", "/experts"),
    "specialization": ("Routing", "/routing"),
    "pathways": ("Routing", "/routing"),
    "serving": ("Routing", "/routing"),
    "counterfactuals": ("Routing", "/routing"),
    "importance": ("Experts", "/experts"),
    "neurons": ("Features", "/features"),
    "features": ("Features", "/features"),
    "residual": ("Phenomena", "/phenomena"),
    "phenomena": ("Phenomena", "/phenomena"),
    "effects": ("Lab", "/lab"),
}


def findings_section(run: Run) -> Any:
    """Heading, progress and an empty grid; `plan` and `step` fill it."""
    columns: list[dict[str, Any]] = [
        {
            **grids.link_column("finding", "Finding", flex=5, minWidth=260),
            "wrapText": True,
            "autoHeight": True,
            "cellClass": "ov-finding",
            "filter": True,
        },
        {"field": "verdict", "headerName": "Against chance", "width": 152},
        grids.number_column(
            "distance", "Distance", ",.1f", width=92, headerTooltip="from chance, in half-widths of the interval"
        ),
        {"field": "cells", "headerName": "Beyond", "width": 104, "type": "rightAligned", "tooltipField": "metric"},
        grids.text_column("typical", "At the median", width=180, tooltipField="chance"),
        grids.number_column("ratio", "÷ chance", ",.3~g", width=88),
        grids.link_column("page", "Page", width=92),
        {"field": "rank", "hide": True, "sort": "asc"},
    ]
    grid = grids.grid("ov-findings", columns, [], height=480, row_id="params.data.id", fit=None, tooltipShowDelay=300)
    grid.style = {"height": 480, "width": "100%"}
    button = {"size": "compact-xs", "variant": "default"}
    return html.Div(
        [
            dcc.Store(id="ov-plan"),
            dcc.Store(id="ov-next"),
            dcc.Store(id="ov-part"),
            dcc.Store(id="ov-held", data={"rows": [], "refused": []}),
            dmc.Title("Findings", order=2, className="section-title"),
            dmc.Text(
                "What every analysis that this run has the records for found, the furthest from chance first.",
                className="muted",
            ),
            html.Div(
                [
                    html.Span("Looking what can be asked …", id="ov-progress", className="muted", role="status"),
                    dmc.Button("Cancel", id="ov-cancel", **button),
                    dmc.Button("Ask the others too", id="ov-more", display="none", **button),
                ],
                className="ov-progress-row",
            ),
            grid,
            html.Details(
                [html.Summary("How findings are ordered"), dmc.Text(DEFINITION, className="muted")], className="ov-how"
            ),
            html.Div(id="ov-refused"),
            html.Div(id="ov-finding-panel"),
        ],
        className="section",
        id="findings",
    )


def plan(run: Run) -> dict[str, Any]:
    """What can be asked of a run: names for now, names that read every decision of a long run, and how many cannot."""
    there: dict[str, bool] = {}
    now: list[str] = []
    later: list[str] = []
    reads = choices(run)
    absent = 0
    for analysis in _askable():
        if not all(_has(run, table, there) for table in analysis.needs):
            absent += 1
        elif reads > DECISIONS and _PER_TOKEN & set(analysis.needs):
            later.append(analysis.name)
        else:
            now.append(analysis.name)
    return {"run": run.name, "names": now, "later": later, "absent": absent, "decisions": reads}


def step(answers: Answers, run: Run, names: list[str], at: int) -> dict[str, Any]:
    """Ask from `names[at]` on for a moment; the rows that came of it, what was refused, and where to go on."""
    begun = time.monotonic()
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    while at < len(names) and (not rows or time.monotonic() - begun < AT_ONCE_S):
        name = names[at]
        at += 1
        try:
            result = answers.ask({"analysis": name, "runs": [run.name], "given": {}})
        except MoescopeError as reason:
            refused.append({"name": name, "reason": reason.problem})
            if time.monotonic() - begun > AT_ONCE_S:
                break
            continue
        rows.append(row(finding(result), ViewState(run=run.name)))
    return {"run": run.name, "rows": rows, "refused": refused, "at": at, "total": len(names)}


def row(found: Finding, plain: ViewState) -> dict[str, Any]:
    """One line of the list."""
    result = found.result
    registry: Registry[Analysis] = analyses
    section = registry[result.name].section
    page, path = _PAGES.get(section, ("", "")) if section else ("", "")
    apart = found.distance or 0.0
    return {
        "id": result.name,
        "finding": result.title,
        "finding_href": link("/", plain.with_rest(finding=result.name)),
        "verdict": f"{_ICONS[found.verdict]} {WORDS[found.verdict]}",
        "distance": found.distance,
        "cells": f"{numbers.count(found.beyond)} of {numbers.count(found.cells)}" if found.cells else "—",
        "metric": found.metric or "",
        "typical": _typical(found),
        "ratio": found.ratio,
        "chance": f"{found.metric}. Chance: {result.null}" if found.metric else "no chance level with an interval",
        "page": page or "—",
        "page_href": link(path, plain) if path else None,
        "section": SECTION_TITLES[section] if section else "",
        "rank": VERDICTS.index(found.verdict) * 1e9 - min(apart, 1e8),
    }


def _typical(found: Finding) -> str:
    if found.value is None or found.null is None:
        return "—"
    written = [f"{number:,.3g}".replace("-", "−") for number in (found.value, found.null)]
    return f"{written[0]} against {written[1]}"


def _askable() -> list[Analysis]:
    known = [a for a in analyses if a.runs == 1 and a.section is not None and a.section not in _LATE]
    order = list(SECTION_TITLES)
    return sorted(known, key=lambda a: (order.index(a.section or "overview"), a.order, a.name))


def _has(run: Run, table: str, there: dict[str, bool]) -> bool:
    if table not in there:
        there[table] = bool(run.table(table).limit(1).fetchall())
    return there[table]
