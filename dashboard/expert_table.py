"""The table of experts: load, weight and output of each, busiest first."""

from __future__ import annotations

from typing import Any

from moescope.dashboard import grids
from moescope.dashboard.records import Router, layer_of
from moescope.dashboard.url_state import ViewState, link
from moescope.store.run import Run


def expert_table(run: Run, known: list[Router], *, shown: Router | None) -> Any:
    """Every expert of a run with its load and output, busiest first; filtered to one router where `shown` names it."""
    rows = _rows(run, known)
    columns = [
        grids.text_column("name", "Expert", width=104, minWidth=104),
        grids.number_column(
            "ratio",
            "÷ fair",
            ".2f",
            width=70,
            headerTooltip="share of the layer's decisions over the fair share, 1 ÷ experts",
        ),
        grids.number_column(
            "share_pct", "Share %", ".2f", width=80, headerTooltip="share of the layer's decisions, percent"
        ),
        grids.link_column(
            "tokens",
            "Tokens",
            type="rightAligned",
            width=80,
            valueFormatter={"function": "d3.format(',d')(params.value)"},
        ),
        grids.number_column("weight", "Weight", ".3f", width=74, headerTooltip="mean weight given by the router"),
        grids.number_column(
            "norm", "Norm", ",.2f", width=70, headerTooltip="mean L2 norm of the output, before the weight"
        ),
        grids.number_column(
            "peak", "Peak", ",.2f", width=84, headerTooltip="largest |output| over tokens and channels"
        ),
    ]
    chosen = grids.grid(
        "expert-grid",
        columns,
        rows,
        height=560,
        row_id="params.data.id",
        rowSelection={"mode": "singleRow", "checkboxes": False, "enableClickSelection": True},
    )
    if shown is not None:
        chosen.filterModel = {"name": {"filterType": "text", "type": "startsWith", "filter": f"{shown.name}·"}}
    return chosen


def _rows(run: Run, known: list[Router]) -> list[dict[str, Any]]:
    places = {(r.layer, r.block): r for r in known}
    found = (
        run.sql(
            """
        WITH load AS (
            SELECT layer, block, expert, sum(tokens)::BIGINT AS tokens, sum(weight_sum) AS weight_sum
            FROM loads
            WHERE run_id = $run
            GROUP BY layer, block, expert
        )
        SELECT
            l.layer, l.block, l.expert, l.tokens,
            100.0 * l.tokens / nullif(sum(l.tokens) FILTER (l.expert >= 0) OVER (PARTITION BY l.layer, l.block), 0) AS share_pct,
            l.weight_sum / nullif(l.tokens, 0) AS weight,
            e.output_norm_mean AS norm, e.max_abs_out AS peak
        FROM load l
        LEFT JOIN experts e ON e.run_id = $run AND e.layer = l.layer AND e.block = l.block AND e.expert = l.expert
        ORDER BY share_pct DESC, l.layer, l.block, l.expert
        """
        )
        .to_arrow_table()
        .to_pylist()
    )
    rows = []
    for row in found:
        router = places[row["layer"], row["block"]]
        layer = layer_of(router, known)
        here = ViewState(run=run.name, layer=layer, expert=row["expert"])
        rows.append(
            {
                "id": f"{layer}:{row['expert']}",
                "name": router.expert_name(row["expert"]),
                "layer": row["layer"],
                "tokens": row["tokens"],
                "share_pct": row["share_pct"],
                "ratio": None if row["share_pct"] is None else row["share_pct"] / 100 * router.experts,
                "weight": row["weight"],
                "norm": row["norm"],
                "peak": row["peak"],
                "tokens_href": link("/tokens", here),
            }
        )
    return rows
