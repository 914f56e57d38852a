"""The ranked table of experts beside the atlas: load, weight and output of each, and the measure that is shown."""

from __future__ import annotations

import math
from typing import Any

from moescope.core.errors import InputError
from moescope.dashboard import grids
from moescope.dashboard.answers import Answers
from moescope.dashboard.records import Router, find_router, layer_of
from moescope.dashboard.url_state import ViewState, decode, link
from moescope.routing.experts.measures import measure_named
from moescope.store.run import Run

MOST = 1000
"""Rows at most: of a large model those that stand highest, or lowest."""
_LOAD = "load"


def expert_table(rows: list[dict[str, Any]]) -> Any:
    """Experts with their load and output, in the order of `rows`."""
    return grids.grid(
        "expert-grid",
        columns(_LOAD),
        rows[:MOST],
        height=560,
        row_id="params.data.id",
        rowSelection={"mode": "singleRow", "checkboxes": False, "enableClickSelection": True},
    )


def columns(measure: str) -> list[dict[str, Any]]:
    """Columns of the table; with one of its own for a measure other than load."""
    shown = measure_named(measure)
    own = [
        grids.number_column(
            "value", shown.title, ".4~g", width=110, headerTooltip=f"{shown.definition} Unit: {shown.unit}."
        )
    ]
    return [
        grids.text_column("name", "Expert", width=104, minWidth=104),
        *(own if measure != _LOAD else []),
        grids.number_column(
            "ratio", "÷ fair", ".2f", width=70, headerTooltip="share of the layer's decisions over the fair share, 1 ÷ experts"
        ),
        grids.number_column("share_pct", "Share %", ".2f", width=80, headerTooltip="share of the layer's decisions, percent"),
        grids.link_column(
            "tokens",
            "Tokens",
            type="rightAligned",
            width=80,
            valueFormatter={"function": "params.value == null ? '—' : d3.format(',d')(params.value)"},
        ),
        grids.number_column("weight", "Weight", ".3f", width=74, headerTooltip="mean weight given by the router"),
        grids.number_column("norm", "Norm", ",.2f", width=70, headerTooltip="mean L2 norm of the output, before the weight"),
        grids.number_column("peak", "Peak", ",.2f", width=84, headerTooltip="largest |output| over tokens and channels"),
    ]  # fmt: skip


def ranked(
    answers: Answers, run: Run, known: list[Router], search: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Columns, rows and a line about them for an address: by its measure, of the layer it filters to.

    Raises:
        InputError: the address asks for a measure, a layer or a run that is not there.
    """
    state = decode(search)
    measure = measure_named(state.given("measure", _LOAD))
    rows = expert_rows(run, known)
    if only := state.given("only"):
        router = find_router(run, decode(f"?layer={only}"), known)
        rows = [row for row in rows if row["layer"] == router.layer and row["block"] == router.block]
    key = "ratio"
    if measure.name != _LOAD or state.other is not None:
        given = {"measure": measure.name, "label": state.label, "other": state.other}
        result = answers.ask({
            "analysis": "expert_atlas", "runs": [run.name], "given": {k: v for k, v in given.items() if v is not None}
        })  # fmt: skip
        table = result.table.select(["layer", "block", "expert", "value"]).to_pylist()
        values = {(row["layer"], row["block"], row["expert"]): row["value"] for row in table}
        rows = [row | {"value": values.get((row["layer"], row["block"], row["expert"]))} for row in rows]
        key = "value"
    lowest = state.given("rank", "high") == "low"
    rows = sorted(rows, key=lambda row: _rank(row[key], lowest=lowest))
    shown = columns(measure.name) if state.other is None else _difference(measure.name)
    return shown, rows[:MOST], table_words(len(rows), lowest=lowest)


def _difference(measure: str) -> list[dict[str, Any]]:
    own = grids.number_column("value", "Difference", ".4~g", width=110, headerTooltip="less the value in the other run")
    return [
        columns(_LOAD)[0],
        own | {"headerTooltip": f"{measure_named(measure).title}: this run less the other"},
        *columns(_LOAD)[1:],
    ]


def table_words(total: int, *, lowest: bool) -> str:
    """How many experts the table has, of how many."""
    if total <= MOST:
        return f"{total:,} experts"
    return f"The {MOST:,} {'lowest' if lowest else 'highest'} of {total:,}; filter by layer to see all of one."


def _rank(value: float | None, *, lowest: bool) -> tuple[bool, float]:
    if value is None or math.isnan(value):
        return True, 0.0
    return False, value if lowest else -value


def expert_rows(run: Run, known: list[Router]) -> list[dict[str, Any]]:
    """A row an expert, busiest first; without loads all experts, none of them with a number."""
    places = {(r.layer, r.block): r for r in known}
    found = run.sql(
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
    rows = found.to_arrow_table().to_pylist()
    empty = dict.fromkeys(("tokens", "share_pct", "weight", "norm", "peak"))
    if not rows:
        rows = [{"layer": r.layer, "block": r.block, "expert": e, **empty} for r in known for e in range(r.experts)]
    return [_row(run, known, places[row["layer"], row["block"]], row) for row in rows]


def _row(run: Run, known: list[Router], router: Router, row: dict[str, Any]) -> dict[str, Any]:
    layer = layer_of(router, known)
    share = None if row["expert"] < 0 else row["share_pct"]  # every token goes through a shared expert
    ratio = None if share is None else share / 100 * router.experts
    return row | {
        "share_pct": share,
        "id": f"{layer}:{row['expert']}",
        "name": router.expert_name(row["expert"]),
        "ratio": ratio,
        "tokens_href": link("/tokens", ViewState(run=run.name, layer=layer, expert=row["expert"])),
    }


def check(search: str | None) -> None:
    """Raise `InputError` where the address names no measure, or no order of the table."""
    state = decode(search)
    measure_named(state.given("measure", _LOAD))
    if state.given("rank", "high") not in ("high", "low"):
        raise InputError(f"rank cannot be {state.given('rank')!r}", expected="high or low")
