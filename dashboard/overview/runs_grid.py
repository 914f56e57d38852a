"""All runs of the store in a grid: tick two to compare them, click one to open it."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.dashboard import cards, grids
from moescope.dashboard.url_state import ViewState, link
from moescope.routing.effects.edit_words import in_words
from moescope.store.run import Run
from moescope.store.store import Store

ICONS = {"complete": "✓", "incomplete": "▲", "running": "◌", "failed": "✕"}
COMPARE = "Tick two to compare"

_RUNS = """
    SELECT
        r.run_id::VARCHAR AS id,
        r.name,
        r.model,
        r.intervention::VARCHAR AS intervention,
        r.started_at,
        coalesce((r.summary->>'tokens')::BIGINT, s.tokens) AS tokens,
        r.summary->>'stopped' AS stopped,
        c.why
    FROM runs r
    LEFT JOIN (SELECT run_id, sum(n_tokens)::BIGINT AS tokens FROM sequences GROUP BY run_id) s ON s.run_id = r.run_id
    LEFT JOIN (
        SELECT run_id, first(site || ': ' || coalesce(detail, status) ORDER BY rowid) || CASE count(*)
            WHEN 1 THEN '' ELSE ' (and ' || (count(*) - 1) || ' more sites)' END AS why
        FROM coverage
        WHERE status != 'complete'
        GROUP BY run_id
    ) c ON c.run_id = r.run_id
    ORDER BY r.started_at DESC, r.name
"""
_NLL = "SELECT run_id::VARCHAR, avg(nll::DOUBLE) FROM tokens GROUP BY run_id"


def runs_grid(run: Run) -> Any:
    """The section with the grid; sizes and mean NLL are filled in after it is shown."""
    rows = [row | {"here": row["name"] == run.name} for row in run_rows(run.store)]
    columns = [
        {
            **grids.link_column("name", "Run", width=190, minWidth=130),
            "filter": True,
            "cellClassRules": {"strong": {"function": "params.data.here"}},
        },
        grids.text_column("model", "Model", width=150, minWidth=96),
        {
            "field": "state",
            "headerName": "Status",
            "width": 118,
            "minWidth": 112,
            "cellClassRules": {"cell-problem": {"function": "params.data.why !== null"}},
        },
        grids.number_column("tokens", "Tokens", ",d", width=100, minWidth=96),
        grids.number_column(
            "nll", "NLL, nats", ".3f", width=95, minWidth=90, headerTooltip="mean; a dash where none was recorded"
        ),
        grids.text_column("intervention", "Intervention", width=210, minWidth=150),
        {"field": "when", "headerName": "Recorded, UTC", "width": 140, "minWidth": 136},
        grids.number_column(
            "bytes", "Size, MB", ",.1f", width=88, minWidth=88, headerTooltip="an estimate, vectors included"
        ),
    ]
    if any(row["why"] for row in rows):
        columns.insert(3, grids.text_column("why", "Why it is not complete", width=260))
    button = dmc.Button(COMPARE, id="ov-compare", size="xs", variant="filled", disabled=True)
    grid = grids.grid(
        "ov-runs",
        columns,
        rows,
        height=300,
        row_id="params.data.id",
        rowSelection={"mode": "multiRow", "headerCheckbox": False, "enableClickSelection": False},
        selectionColumnDef={"headerName": "Tick", "width": 58, "minWidth": 58, "resizable": False},
        tooltipShowDelay=300,
    )
    return cards.section(
        "Runs", html.Div([dmc.Group([button], mb="xs"), grid]), note=f"{len(rows)} in this store, the newest first."
    )


def run_rows(store: Store) -> list[dict[str, Any]]:
    """One row a run, the newest first; `nll` and `bytes` stay open, see `measured`."""
    found = store.sql(_RUNS).to_arrow_table().to_pylist()
    status = {run.run_id: run.status for run in store.runs()}
    return [_row(row, status[row["id"]]) for row in found]


def measured(store: Store, name: str) -> list[dict[str, Any]]:
    """The rows with mean NLL and size, which take a look into every table; `name` is the run that is shown."""
    nll = dict(store.fetch(_NLL))
    sizes = store.sizes()
    return [
        row
        | {
            "here": row["name"] == name,
            "nll": nll.get(row["id"]),
            "bytes": sizes[row["id"]].bytes / 1e6 if row["id"] in sizes else None,
        }
        for row in run_rows(store)
    ]


def intervention_words(text: str | None) -> str:
    """What a run's edits do, in a few words; `none` for none."""
    if not text or text in ("{}", "null"):
        return "none"
    try:
        read = Intervention.from_json(text)
    except InputError:
        return "of another version"
    return read.name or in_words(read)


def _row(row: dict[str, Any], status: str) -> dict[str, Any]:
    problem = status not in ("complete", "running")
    return {
        "id": row["id"],
        "name": row["name"],
        "name_href": link("/", ViewState(run=row["name"])),
        "model": row["model"] or "not recorded",
        "state": f"{ICONS.get(status, '?')} {status}",
        "why": (row["stopped"] or row["why"] or "it ended without a ledger") if problem else None,
        "tokens": row["tokens"],
        "nll": None,
        "intervention": intervention_words(row["intervention"]),
        "when": f"{row['started_at']:%Y-%m-%d %H:%M}" if row["started_at"] else "—",
        "begun": row["started_at"].isoformat() if row["started_at"] else "",
        "bytes": None,
    }
