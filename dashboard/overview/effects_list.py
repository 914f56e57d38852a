"""The interventions that were measured against a run, each leading to the lab and to its own panel."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.edit_text import write_edit
from moescope.core.errors import InputError, MoescopeError
from moescope.core.intervention import Intervention
from moescope.dashboard import cards, grids, notices
from moescope.dashboard.answers import Answers
from moescope.dashboard.records import routers
from moescope.dashboard.unrecorded import command, quoted
from moescope.dashboard.url_state import MAX_EDITS, ViewState, link
from moescope.store.run import Run

SHOWN = 500

_EDITS = """
    SELECT effect_id::VARCHAR, any_value(intervention::VARCHAR)
    FROM effects
    WHERE base_run_id = ? AND kind = 'target' AND list_contains(?::VARCHAR[], effect_id::VARCHAR)
    GROUP BY effect_id
"""


def _example(run: Run) -> str:
    """An edit that the run's model can take."""
    known = routers(run)
    return f"ablate layer={known[0].layer} experts=0" if known else "mask_head layer=0 heads=0"


def effects_section(answers: Answers, run: Run) -> Any:
    """The list, the largest change first; where there is none, what would fill it."""
    try:
        result = answers.ask({"analysis": "effects", "runs": [run.name], "given": {}})
    except MoescopeError as reason:
        found = run.table("effects").limit(1).fetchall()
        return cards.section(
            "Effects measured against this run",
            notices.refusal(reason)
            if found
            else notices.empty(
                "No effect yet",
                "An effect is what an intervention changes, measured against this run. Measure one in the lab, or:",
                command=command(
                    run, f"intervene effect {{model}} --base {{run}} --edit {quoted(_example(run))}", model=True
                ),
            ),
            identity="effects",
        )
    frame = result.df()
    frame = frame.reindex(frame["value"].abs().sort_values(ascending=False).index).head(SHOWN)
    edits = dict(run.store.fetch(_EDITS, [run.run_id, list(frame["effect_id"])]))
    rows = [_row(run, line, edits.get(line["effect_id"])) for line in frame.to_dict("records")]
    columns: list[dict[str, Any]] = [
        {**grids.link_column("intervention", "Intervention", flex=3, minWidth=220), "filter": True},
        grids.number_column("value", "ΔNLL, nats", "+,.4f", width=110),
        {"field": "interval", "headerName": "95 % interval", "width": 172, "type": "rightAligned"},
        {"field": "controls", "headerName": "Controls: mean, range", "width": 232, "type": "rightAligned"},
        {"field": "outside", "headerName": "Beyond controls", "width": 136},
        grids.number_column("n", "Tokens", ",d", width=90),
        grids.link_column("lab", "Lab", width=110),
    ]
    grid = grids.grid("ov-effects", columns, rows, height=320, row_id="params.data.id", fit=None)
    grid.style["height"] += 14  # room for the bar that scrolls sideways on a narrow page
    more = f" The {SHOWN} largest of {result.n:,} are listed." if result.n > SHOWN else ""
    return cards.section(
        "Effects measured against this run",
        html.Div(
            [
                grid,
                dmc.Text(f"Interval: {result.interval}. Controls: {result.null}.", className="muted", mt=6),
            ]
        ),
        note=result.title + "." + more,
        identity="effects",
    )


def edits_of(intervention: str | None) -> tuple[str, ...] | None:
    """The edits of an intervention as the address writes them; None where they cannot be."""
    if not intervention:
        return None
    try:
        written = tuple(write_edit(edit) for edit in Intervention.from_json(intervention).edits)
    except InputError:
        return None
    return written if written and len(written) <= MAX_EDITS and not any(";" in edit for edit in written) else None


def _row(run: Run, line: dict[str, Any], intervention: str | None) -> dict[str, Any]:
    plain = ViewState(run=run.name)
    edits = edits_of(intervention)
    low, high = line["control_low"], line["control_high"]
    controlled = line["controls"] > 0
    beyond = controlled and not low <= line["value"] <= high
    return {
        "id": line["effect_id"],
        "intervention": line["intervention"],
        "intervention_href": link("/", plain.with_rest(finding="effect", effect=line["effect_id"])),
        "value": line["value"],
        "interval": f"{line['ci_low']:+.4f} to {line['ci_high']:+.4f}".replace("-", "−")
        if line["ci_low"] == line["ci_low"]
        else "—",
        "controls": f"{line['null']:+.4f}, {low:+.4f} to {high:+.4f}".replace("-", "−") if controlled else "none",
        "outside": ("● outside" if beyond else "○ within") if controlled else "—",
        "n": line["n"],
        "lab": "Open in lab" if edits else "",
        "lab_href": link("/lab", plain.but(edits=edits)) if edits else None,
    }
