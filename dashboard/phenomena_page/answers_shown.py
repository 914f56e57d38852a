"""What the page fills in once it is there: verdicts of the chain, super experts and leading heads as tables, a token."""

from __future__ import annotations

import math
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import MoescopeError
from moescope.dashboard import grids, notices, numbers
from moescope.dashboard.answers import Answers
from moescope.dashboard.passage import passage
from moescope.dashboard.phenomena_page.expert_links import expert_href
from moescope.dashboard.phenomena_page.head_scores import leading_rows
from moescope.dashboard.phenomena_page.verdicts import verdicts
from moescope.dashboard.records import expert_name
from moescope.dashboard.url_state import Layer, ViewState, link
from moescope.routing.grid import layer_name
from moescope.routing.phenomena.head_metrics import head_metric
from moescope.store.run import Run

_BY_LAYER = """
    SELECT r.layer, r.top_values, r.top_channels, m.median_abs
    FROM residual r
    JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
    LEFT JOIN residual_sequences m ON m.run_id = r.run_id AND m.sequence_id = t.sequence_id AND m.layer = r.layer
    WHERE r.run_id = $run AND r.token = $token
    ORDER BY r.layer
"""


def chain_verdicts(answers: Answers, run: str) -> Any:
    """The chain in words, or why there is none."""
    try:
        return verdicts(answers.ask({"analysis": "phenomena_chain", "runs": [run], "given": {"uncut": True}}), run)
    except MoescopeError as refused:
        return notices.refusal(refused)


def super_expert_table(answers: Answers, run: str) -> Any:
    """Experts that a rule names, and beside them the nearest that it does not."""
    try:
        result = answers.ask({"analysis": "super_experts", "runs": [run], "given": {}})
    except MoescopeError as refused:
        return notices.refusal(refused)
    rows = [_expert_row(row, run) for row in result.table.to_pylist() if row["round"] == 0]
    columns = [
        grids.text_column("rule", "Rule", minWidth=180, flex=1),
        grids.link_column("expert", "Expert", minWidth=96),
        grids.text_column("called", "Super expert", minWidth=130),
        grids.number_column("value", "Largest |output|", ",.2f", minWidth=124),
        grids.number_column("threshold", "Threshold", ",.2f", minWidth=96),
        grids.number_column(
            "margin",
            "Margin",
            ",.2f",
            minWidth=80,
            headerTooltip="largest |output| over the larger of the rule's two thresholds",
        ),
        grids.text_column(
            "fails",
            "Fails",
            minWidth=130,
            filter=False,
            headerTooltip="tests of the rule that the expert does not pass",
        ),
        grids.link_column("token", "At token", minWidth=90, type="rightAligned"),
        grids.text_column("context", "Text around it", minWidth=220, flex=2, filter=False),
    ]
    if not rows:
        return dmc.Text("No rule has an expert to look at.", className="muted")
    return html.Div(grids.grid("super-expert-grid", columns, rows, height=330), className="above-panel")


def _expert_row(row: dict[str, Any], run: str) -> dict[str, Any]:
    layer = Layer(int(row["layer"]), None if row["block"] == "mlp" else str(row["block"]))
    token = row["token"]
    known = token is not None and token >= 0
    return {
        "rule": row["rule"],
        "expert": f"{layer_name(row['layer'], row['block'])}·{expert_name(row['expert'])}",
        "expert_href": expert_href(run, layer, row["expert"]),
        "called": "yes" if row["super_expert"] else "no",
        "value": row["value"],
        "threshold": row["threshold"],
        "margin": row["margin"],
        "fails": row["fails"] or "—",
        "token": numbers.count(token) if known else None,
        "token_href": link("/tokens", ViewState(run=run, token=token)) if known else None,
        "context": row["context"] or "—",
    }


def head_table(answers: Answers, run: str, state: ViewState) -> Any:
    """Heads by the chosen score, the largest first."""
    given = {
        name: text for name, url in (("metric", "measure"), ("condition", "condition")) if (text := state.given(url))
    }
    try:
        result = answers.ask({"analysis": "head_map", "runs": [run], "given": given})
    except MoescopeError as refused:
        return notices.refusal(refused)
    told = head_metric(str(result.table["metric"][0].as_py()))
    rows = leading_rows(result)
    columns = [
        grids.number_column("rank", "Rank", ",d", minWidth=60, maxWidth=66),
        grids.text_column("name", "Head", minWidth=104),
        grids.number_column("value", "Value", ",.4g", minWidth=86, headerTooltip=f"{told.words}, {told.unit}"),
        grids.number_column(
            "low", "Low", ",.4g", minWidth=80, headerTooltip="lower end of the 95 % interval, over documents"
        ),
        grids.number_column(
            "high", "High", ",.4g", minWidth=80, headerTooltip="upper end of the 95 % interval, over documents"
        ),
        grids.number_column("null", "By chance", ",.4g", minWidth=92),
        grids.number_column("group", "KV head", "d", minWidth=84, headerTooltip="key-value head that it reads"),
        grids.number_column("n", "n", ",d", minWidth=76, headerTooltip="observations"),
    ]
    made = grids.grid(
        "head-grid",
        columns,
        rows,
        height=400,
        row_id="params.data.id",
        rowSelection={"mode": "singleRow", "checkboxes": False, "enableClickSelection": True},
    )
    return html.Div(made, className="above-panel")


def token_shown(run: Run, token: int) -> Any:
    """A token of the map with the text around it, and how large it is at each layer."""
    rows = run.store.fetch(_BY_LAYER, {"run": run.run_id, "token": token})
    body = [
        dmc.TableTr(
            [
                dmc.TableTd(f"L{layer}"),
                dmc.TableTd(_size(values[0]), className="number"),
                dmc.TableTd(f"channel {channels[0]}", className="number"),
                dmc.TableTd(_ratio(values[0], median), className="number"),
            ]
        )
        for layer, values, channels, median in rows
    ]
    head = dmc.TableTr(
        [dmc.TableTh("after")]
        + [dmc.TableTh(name, className="number") for name in ("largest x", "in", "|x| ÷ median |x|")]
    )
    table = (
        dmc.Table([dmc.TableThead(head), dmc.TableTbody(body)], className="small-table narrow-table", verticalSpacing=2)
        if body
        else dmc.Text("The residual stream of this token was not recorded.", className="muted")
    )
    return dmc.Paper(
        dmc.Stack(
            [
                html.H3(f"Token {numbers.count(token)}", className="sub-title"),
                passage(run, token),
                dmc.Anchor(
                    "See it in its text →",
                    href=link("/tokens", ViewState(run=run.name, token=token)),
                    size="sm",
                    id="token-link",
                ),
                html.Details([html.Summary(f"At each of {len(body)} layers"), html.Div(table, className="tall-table")]),
            ],
            gap="xs",
        ),
        className="card chosen-token",
        withBorder=True,
    )


def _size(value: float) -> str:
    return "not a number" if math.isnan(value) else numbers.decimal(value, 2)


def _ratio(value: float, median: float | None) -> str:
    return numbers.MISSING if not median or math.isnan(value) else f"{abs(value) / median:,.1f}×"
