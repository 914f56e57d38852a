"""The tokens of a run as a table of any length: the server sorts and filters, the browser holds the rows in sight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dash_ag_grid as dag
from dash import html

from moescope.dashboard import numbers
from moescope.dashboard.grids import ROW_HEIGHT, grid, link_column, number_column, text_column
from moescope.dashboard.kept import Kept
from moescope.dashboard.only import sequences_with
from moescope.dashboard.records import Router, expert_name, find_router, routers
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.token_view import NO_LABEL
from moescope.dashboard.url_state import ViewState, link
from moescope.store.run import Run

BLOCK = 200
_SORTED = {
    "token": "token", "sequence": "sequence_id", "position": "position", "nll": "nll", "class": "class", "top": "top",
    "weight": "weight", "margin": "margin", "entropy": "entropy",
}  # fmt: skip
_COMPARED = {
    "equals": "=", "notEqual": "!=", "greaterThan": ">", "greaterThanOrEqual": ">=", "lessThan": "<", "lessThanOrEqual": "<=",
}  # fmt: skip
_COUNTS: Kept[int] = Kept(32)

_KEPT = """
    SELECT t.token, t.sequence_id, t.position, t.token_id, t.nll, t.class{columns}
    FROM tokens t{routing}
    WHERE t.run_id = $run{filters}
"""
_ROUTING = """
    LEFT JOIN routing r ON r.run_id = $run AND r.token = t.token AND r.layer = $layer AND r.block = $block"""
_CHOSEN = ", r.experts, r.weights, r.margin, r.entropy, r.experts[1] AS top, r.weights[1] AS weight"
_OF_TEXTS = """
        AND t.sequence_id IN (
            SELECT sequence_id
            FROM sequences
            WHERE run_id = $run AND ($label IS NULL OR coalesce(label, $unlabelled) = $label)
                AND ($sequence IS NULL OR sequence_id = $sequence)
                AND ($kept IS NULL OR list_contains($kept::BIGINT[], sequence_id))
        )"""
_OF_PIECE = (
    "token_id IN (SELECT token_id FROM vocabulary WHERE run_id = $run AND contains(lower(text), lower(${value})))"
)
_PAGE = """
    WITH kept AS ({kept}),
    page AS (
        SELECT *
        FROM kept{where}
        ORDER BY {order}
        LIMIT $most OFFSET $first
    )
    SELECT p.*, v.bytes, s.label
    FROM page p
    LEFT JOIN vocabulary v ON v.run_id = $run AND v.token_id = p.token_id
    LEFT JOIN sequences s ON s.run_id = $run AND s.sequence_id = p.sequence_id
    ORDER BY {order}
"""


def token_table(run: Run, state: ViewState) -> Any:
    """The grid, empty; its rows are asked for as they come into sight.

    Raises:
        InputError: the run has no such layer, expert or label.
    """
    router = _router(run, state)
    columns = [
        {**link_column("token", "token"), "width": 96, "sort": "asc"},
        {**text_column("text", "text"), "sortable": False, "filter": "agTextColumnFilter", "width": 150},
        {**link_column("sequence", "sequence"), "width": 96},
        {**number_column("position", "position", ","), "filter": "agNumberColumnFilter", "width": 92},
        {**text_column("label", "label"), "sortable": False, "filter": False, "width": 120},
        {**text_column("class", "class"), "filter": "agTextColumnFilter", "width": 104},
        {**number_column("nll", "NLL, nats", ",.3f"), "filter": "agNumberColumnFilter", "width": 104},
    ]
    if router is not None:
        columns += [
            {**link_column("top", f"top expert, {router.name}"), "width": 118},
            {**number_column("weight", "weight", ",.3f"), "filter": "agNumberColumnFilter", "width": 92},
            {**number_column("margin", "margin", ",.3f"), "filter": "agNumberColumnFilter", "width": 92},
            {**number_column("entropy", "entropy, nats", ",.3f"), "filter": "agNumberColumnFilter", "width": 126},
            {**text_column("others", "all experts · weight"), "sortable": False, "filter": False, "width": 260},
        ]
    made = grid(
        "token-grid", columns, [], height=2000, fit=None, rowBuffer=20, cacheBlockSize=BLOCK, maxBlocksInCache=20
    )
    assert isinstance(made, dag.AgGrid)
    made.rowModelType = "infinite"
    made.rowData = None
    made.style = {"height": "100%", "width": "100%"}
    return html.Div(made, className="token-grid", style={"minHeight": 12 * ROW_HEIGHT})


def table_rows(run: Run, state: ViewState, request: Mapping[str, Any]) -> dict[str, Any]:
    """The rows that a grid asks for, and how many there are: `{"rowData": [...], "rowCount": n}`.

    Args:
        run: whose tokens.
        state: the filters of the address.
        request: `startRow`, `endRow`, `sortModel` and `filterModel`, as AG Grid's infinite row model sends them; names of
            columns and comparisons other than the known ones are left aside.
    """
    router = _router(run, state)
    where, bound = _conditions(request.get("filterModel") or {}, with_router=router is not None)
    query, asked = _kept(run, state, router)
    bound |= asked
    first = max(0, int(request.get("startRow") or 0))
    most = min(10 * BLOCK, max(0, int(request.get("endRow") or BLOCK) - first))
    order = _order(request.get("sortModel") or [], with_router=router is not None)
    text = _PAGE.format(kept=query, where=where, order=order)
    rows = run.store.sql(text, {**bound, "first": first, "most": most}).to_arrow_table().to_pylist()
    key = (str(state.but(token=None, q="", page=1)), where, str(sorted(bound.items(), key=str)))
    counted = f"SELECT count(*) FROM ({query}) AS kept{where}"  # noqa: S608  parts written here, values bound
    total = _COUNTS.of(run, key, lambda: int(run.store.fetch(counted, bound)[0][0]))
    reader = PieceReader({row["token_id"]: bytes(row["bytes"]) for row in rows if row["bytes"] is not None})
    return {"rowData": [_row(run, state, router, reader, row) for row in rows], "rowCount": total}


def _router(run: Run, state: ViewState) -> Router | None:
    known = routers(run)
    return find_router(run, state, known) if known else None


def _kept(run: Run, state: ViewState, router: Router | None) -> tuple[str, dict[str, Any]]:
    """The tokens that the address leaves, as a query with its parameters; a join is made only where it is needed."""
    asked: dict[str, Any] = {"run": run.run_id}
    filters = ""
    kept = sequences_with(run, state)
    if not (state.label is None and state.sequence is None and kept is None):
        filters += _OF_TEXTS
        asked |= {"label": state.label, "unlabelled": NO_LABEL, "sequence": state.sequence, "kept": kept}
    if state.piece is not None:
        filters += "\n        AND t.token_id = $piece"
        asked["piece"] = state.piece
    if router is not None:
        asked |= {"layer": router.layer, "block": router.block}
        if state.expert is not None and state.expert >= 0:
            filters += "\n        AND list_contains(r.experts, $expert)"
            asked["expert"] = state.expert
    return _KEPT.format(
        columns=_CHOSEN if router is not None else "", routing=_ROUTING if router is not None else "", filters=filters
    ), asked


def _order(model: list[Mapping[str, Any]], *, with_router: bool) -> str:
    parts = []
    for part in model:
        name = _SORTED.get(str(part.get("colId")))
        if name is not None and (with_router or name not in ("top", "weight", "margin", "entropy")):
            parts.append(f"{name} {'DESC' if part.get('sort') == 'desc' else 'ASC'} NULLS LAST")
    return ", ".join([*parts, "token"])


def _conditions(model: Mapping[str, Any], *, with_router: bool) -> tuple[str, dict[str, Any]]:
    """The grid's filters as conditions on known columns, their values bound."""
    parts: list[str] = []
    bound: dict[str, Any] = {}
    for name, asked in model.items():
        column = _SORTED.get(str(name))
        if not with_router and column in ("top", "weight", "margin", "entropy"):
            continue
        value = f"f{len(bound)}"
        if name == "text" and asked.get("filter"):
            parts.append(_OF_PIECE.format(value=value))
            bound[value] = str(asked["filter"])
        elif name == "class" and asked.get("filter"):
            parts.append(f"contains(lower(class), lower(${value}))")
            bound[value] = str(asked["filter"])
        elif column is not None and asked.get("type") in _COMPARED and isinstance(asked.get("filter"), (int, float)):
            parts.append(f"{column} {_COMPARED[asked['type']]} ${value}")
            bound[value] = float(asked["filter"])
        elif column is not None and asked.get("type") == "inRange":
            parts.append(f"{column} BETWEEN ${value} AND ${value}_to")
            bound |= {value: float(asked["filter"]), f"{value}_to": float(asked["filterTo"])}
        elif column is not None and asked.get("type") == "blank":
            parts.append(f"{column} IS NULL")
        elif column is not None and asked.get("type") == "notBlank":
            parts.append(f"{column} IS NOT NULL")
    return ("\n        WHERE " + " AND ".join(parts) if parts else ""), bound


def _row(
    run: Run, state: ViewState, router: Router | None, reader: PieceReader, row: Mapping[str, Any]
) -> dict[str, Any]:
    token, token_id = int(row["token"]), row["token_id"]
    in_text = ViewState(run=run.name, layer=state.layer, mode=state.mode, token=token, sequence=int(row["sequence_id"]))
    shown = {
        "token": f"{token:,}",
        "token_href": link("/tokens", in_text),
        "text": numbers.MISSING if token_id is None else reader.alone(token_id),
        "sequence": str(row["sequence_id"]),
        "sequence_href": link("/tokens", in_text.but(token=None)),
        **{name: row[name] for name in ("position", "label", "class", "nll")},
    }
    if router is None:
        return shown
    experts, weights = row["experts"] or [], row["weights"] or []
    top = None if row["top"] is None else expert_name(row["top"])
    there = ViewState(run=run.name, layer=state.layer, expert=row["top"])
    pairs = [
        f"{expert_name(expert)} {numbers.decimal(weights[slot] if slot < len(weights) else None)}"
        for slot, expert in enumerate(experts)
    ]
    return {
        **shown,
        **{name: row[name] for name in ("weight", "margin", "entropy")},
        "top": top,
        "top_href": None if top is None else link("/experts", there),
        "others": "  ".join(pairs) if pairs else "not recorded",
    }
