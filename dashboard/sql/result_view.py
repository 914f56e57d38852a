"""The answer to a query on the page: what was found, and its table, with links where a column names a thing."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard import grids, numbers
from moescope.dashboard.sql.outcome import Column, Outcome
from moescope.store.store import Store

SHOWN_ROWS = 1_000
_HEIGHT = 424
_LETTER, _WIDEST, _MEASURED = 8, 420, 100
# Columns whose values lead somewhere; what else of the row the link needs is looked up by these names.
_LINKED = frozenset(
    {"run_id", "token", "sequence_id", "layer", "expert", "head", "feature", "label", "token_id", "name", "tokens", "decisions", "n"}
)  # fmt: skip
_ROLES = ("run_id", "layer", "block", "expert", "head", "feature", "sae_id", "sae")
# Numbers that name something are written without marks between thousands.
_NAMES = frozenset(
    {"token", "sequence_id", "document_id", "layer", "expert", "head", "feature", "token_id", "position"}
)
_FORMS = {"plain": "sqlPlain(params.value)", "whole": "sqlWhole(params.value)", "number": "sqlNumber(params.value)"}


def answer(outcome: Outcome, store: Store, *, run: str | None) -> Any:
    """What was found, in words, and the first rows as a grid."""
    return dmc.Stack([found(outcome), table(outcome, store, run=run)], gap="xs")


def found(outcome: Outcome) -> Any:
    """How many rows, how many of them are here, and how long it took."""
    kept, shown = len(outcome.rows), min(len(outcome.rows), SHOWN_ROWS)
    if outcome.more:
        words = f"The first {numbers.count(shown)} of more than {numbers.count(kept)} rows"
    elif kept > shown:
        words = f"The first {numbers.count(shown)} of {numbers.count(kept)} rows"
    else:
        words = "1 row" if kept == 1 else f"{numbers.count(kept)} rows" if kept else "No rows"
    said = [f"{len(outcome.columns)} {'column' if len(outcome.columns) == 1 else 'columns'}", took(outcome.seconds)]
    said += [outcome.why_cut] if outcome.why_cut else []
    return html.Div(
        [
            dmc.Title(words, order=2, className="section-title", id="sql-found"),
            dmc.Text(" · ".join(said), className="muted"),
        ],
        role="status",
    )


def took(seconds: float) -> str:
    """A duration in words.

    Example:
        >>> took(0.0421), took(3.2)
        ('42 ms', '3.2 s')
    """
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def table(outcome: Outcome, store: Store, *, run: str | None) -> Any:
    """The first rows as a grid; None where there are none."""
    if not outcome.rows:
        return None
    places = {column.name: f"c{i}" for i, column in reversed(list(enumerate(outcome.columns)))}
    links = {
        "page": run or "",
        "roles": {role: places[role] for role in _ROLES if role in places},
        "runs": {str(r.run_id): r.name for r in store.runs()},
        "saes": {str(sae): name for sae, name in store.fetch("SELECT sae_id, name FROM saes LIMIT 500")},
        "routers": [layer for (layer,) in store.fetch(
            "SELECT DISTINCT layer FROM layers WHERE n_experts IS NOT NULL ORDER BY layer"
        )],
    }  # fmt: skip
    rows = [{f"c{i}": value for i, value in enumerate(row)} for row in outcome.rows[:SHOWN_ROWS]]
    columns = [
        {**_column(column, f"c{i}", links), "width": _width(column, [row[f"c{i}"] for row in rows[:_MEASURED]])}
        for i, column in enumerate(outcome.columns)
    ]
    columns[-1] |= {"flex": 1, "minWidth": min(columns[-1]["width"], 240)}
    return grids.grid("sql-grid", columns, rows, height=_HEIGHT, fit=None)


def _width(column: Column, values: list[Any]) -> int:
    """Pixels that a column needs for its name and most of its values."""
    texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    room = 12 if column.kind in ("whole", "number") else 30  # the mark of the filter
    return min(max([_LETTER * len(column.name) + room, *(_LETTER * len(text) for text in texts)]) + 26, _WIDEST)


def _column(column: Column, field: str, links: dict[str, Any]) -> dict[str, Any]:
    form = "plain" if column.name in _NAMES or column.kind not in ("whole", "number") else column.kind
    shown: dict[str, Any] = {
        "field": field,
        "headerName": column.name,
        "headerTooltip": column.type,
        "valueFormatter": {"function": _FORMS[form]},
    }
    if column.kind in ("whole", "number"):
        shown |= {"type": "rightAligned", "filter": False}
    else:
        shown |= {"tooltipField": field, "cellClass": "foreign"}
    if column.name in _LINKED:
        shown |= {"cellRenderer": "SqlLink", "cellRendererParams": {"as": column.name, "links": links}}
    return shown
