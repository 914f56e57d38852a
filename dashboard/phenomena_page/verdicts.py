"""What each link of the chain comes to, in plain words: the analysis' own numbers beside those of its random cuts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.result import Result
from moescope.dashboard import numbers
from moescope.dashboard.phenomena_page.expert_links import linked_experts

_CUT = {
    "writer": "the writer taken out",
    "massive to zero": "the massive activation set to 0",
    "massive to mean": "the massive activation set to its mean",
    "heads": "the leading heads taken out",
}
_SHARES = (
    "massive activation that remains",
    "attention to first tokens that remains",
    "induction score that remains",
)
_COSTS = ("ΔNLL", "KL", "ΔNLL of copies", "Δ repetition")
_NODES = ("writer", "massive activation", "sink", "heads")
_NAMES = {
    "writer": "Writer",
    "massive activation": "Massive activation",
    "sink": "Attention sink",
    "heads": "Retrieval or induction heads",
}


def verdict(row: Mapping[str, Any], *, share: bool) -> str:
    """What a number under a cut says, held against its interval and against the same cut made at random.

    Args:
        row: value, ci_low, ci_high, null, null_low, null_high of the analysis.
        share: whether it is a share that remains (1 for nothing lost), or a change (0 for none).

    Example:
        >>> verdict({"value": 0.2, "ci_low": 0.1, "ci_high": 0.3, "null_low": 0.9, "null_high": 1.1}, share=True)
        'lost: less remains than under any random cut, and the interval lies below 100 %'
        >>> verdict({"value": 0.2, "ci_low": -0.1, "ci_high": 0.3, "null_low": 0.0, "null_high": 0.1}, share=False)
        'more than under any random cut, but the interval reaches 0'
    """
    value, low, high, null_low, null_high = (
        _number(row.get(name)) for name in ("value", "ci_low", "ci_high", "null_low", "null_high")
    )
    rest = 1.0 if share else 0.0
    if value is None:
        return "not measured"
    if null_low is None or null_high is None:
        return "no random cuts beside it, so no verdict"
    if null_low <= value <= null_high:
        return "within the range of random cuts"
    apart = low is not None and high is not None and not low <= rest <= high
    named = "100 %" if share else "0"
    if value < null_low:
        what = "less remains than under any random cut" if share else "less than under any random cut"
    else:
        what = "more remains than under any random cut" if share else "more than under any random cut"
    if low is None or high is None:
        return f"{what}; no interval"
    if not apart:
        return f"{what}, but the interval reaches {named}"
    lost = "lost: " if share and value < null_low and high < rest else ""
    return f"{lost}{what}, and the interval lies {'below' if high < rest else 'above'} {named}"


def verdicts(result: Result, run: str) -> Any:
    """The chain as text: its nodes, and a table of cuts."""
    rows = result.table.to_pylist()
    nodes = {row["node"]: row for row in rows if row["node"] in _NODES and row["cut"] is None}
    cuts = [row for row in rows if row["cut"] is not None and row["layer"] is None]
    return dmc.Stack([_chain(nodes, run), _cuts(cuts)], gap="md")


def _chain(nodes: Mapping[str, Mapping[str, Any]], run: str) -> Any:
    items = [
        html.Li(
            [
                html.Span(_NAMES[name], className="link-name"),
                html.Span(_told(name, nodes[name], run), className="foreign"),
            ]
        )
        for name in _NODES
        if name in nodes
    ]
    return html.Ol(items, className="chain-nodes")


def _told(name: str, node: Mapping[str, Any], run: str) -> Any:
    what, value = str(node["what"]), _number(node["value"])
    if name == "writer":
        size = "" if value is None else f"; largest |output| {numbers.decimal(value, 1)}"
        return "none found" if what == "none found" else [*linked_experts(what, run), size]
    if name == "massive activation":
        place = f"L{node['layer']}, channel {node['channel']}, position {node['position']}"
        if what == "none found":
            return f"none by the rule; the largest |x| is {numbers.decimal(value, 1)} ({place})"
        return f"{what}: |x| up to {numbers.decimal(value, 1)}; where it forms: {place}"
    if name == "sink" and value is not None:
        bounds = _bounds(node, numbers.decimal)
        return f"mean attention to the first token {numbers.decimal(value)}{bounds}; {what}"
    return what


def _cuts(cuts: list[dict[str, Any]]) -> Any:
    shown = [row for metric in (*_SHARES, *_COSTS) for row in cuts if row["metric"] == metric]
    if not shown:
        return dmc.Text("No link was cut, so nothing is known of what depends on what.", className="muted")
    body = [
        _line(row) for row in sorted(shown, key=lambda row: list(_CUT).index(row["node"]) if row["node"] in _CUT else 9)
    ]
    names = ("cut", "what", "with the cut", "same cut at random", "n", "verdict")
    head = dmc.TableTr([dmc.TableTh(name, className="number" if name in names[2:5] else "") for name in names])
    return dmc.TableScrollContainer(
        dmc.Table(
            [dmc.TableThead(head), dmc.TableTbody(body)],
            className="small-table cuts",
            verticalSpacing=4,
            horizontalSpacing=10,
        ),
        minWidth=940,
    )


def _line(row: Mapping[str, Any]) -> Any:
    share = row["metric"] in _SHARES or row["metric"] == "Δ repetition"
    form = _percent if share else _change
    null = (
        "—"
        if _number(row["null"]) is None
        else f"{form(row['null'])} ({form(row['null_low'])} to {form(row['null_high'])})"
    )
    return dmc.TableTr(
        [
            dmc.TableTd([_CUT.get(row["node"], row["node"]), html.Span(f": {row['cut']}", className="foreign soft")]),
            dmc.TableTd(row["metric"] + ("" if share else " (nats)")),
            dmc.TableTd(f"{form(row['value'])}{_bounds(row, form)}", className="number"),
            dmc.TableTd(null, className="number"),
            dmc.TableTd(numbers.count(row["n"]), className="number"),
            dmc.TableTd(verdict(row, share=row["metric"] in _SHARES)),
        ]
    )


def _bounds(row: Mapping[str, Any], form: Any) -> str:
    low, high = _number(row.get("ci_low")), _number(row.get("ci_high"))
    return "" if low is None or high is None else f" [{form(low)}, {form(high)}]"


def _percent(value: Any) -> str:
    found = _number(value)
    return numbers.MISSING if found is None else f"{100 * found:.1f} %".replace("-", "−")


def _change(value: Any) -> str:
    found = _number(value)
    if found is None:
        return numbers.MISSING
    return ("+" if found > 0 else "") + numbers.decimal(found, 4)


def _number(value: Any) -> float | None:
    """A number, or None where there is none."""
    return None if value is None or math.isnan(float(value)) else float(value)
