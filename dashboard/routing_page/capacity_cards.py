"""Cards of the capacity simulator: what each capacity drops, and what it provides in vain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from moescope.core.result import Result
from moescope.dashboard import numbers
from moescope.dashboard.records import Router
from moescope.dashboard.routing_page.card_data import Card, Cards, Range, busiest, joined, percent, share_interval
from moescope.dashboard.url_state import ViewState
from moescope.routing.grid import layer_name
from moescope.store.run import Run

_STEP = 0.1
_FACTORS = [round(float(factor), 2) for factor in np.arange(0.5, 4.0 + _STEP / 2, _STEP)]


def span(known: list[Router]) -> Range:
    """Half the fair share to four times."""
    return Range(
        _FACTORS[0], _FACTORS[-1], _STEP, 1.0, ((0.5, "0.5×"), (1.0, "1×"), (2.0, "2×"), (3.0, "3×"), (4.0, "4×"))
    )


def given(known: list[Router]) -> dict[str, Any]:
    """All capacities of the slider in one answer."""
    return {"factors": ",".join(f"{factor:g}" for factor in _FACTORS)}


def capacity(result: Result, run: Run, state: ViewState, known: list[Router]) -> Cards:
    """What is dropped at every capacity, beside a balanced router."""
    frame = result.df()
    links = busiest(run, known)
    at: dict[str, list[Card]] = {}
    for factor, part in frame.groupby("factor"):
        at[f"{factor:g}"] = _cards(part, links)
    return {
        "choice": ("", ""),
        "at": {"": at},
        "words": {f"{factor:g}": f"{factor:g}× the fair share, B · k / E" for factor in _FACTORS},
        "marks": {f"{factor:g}": [("x", factor), ("x2", factor)] for factor in _FACTORS},
    }


def _cards(part: pd.DataFrame, links: dict[tuple[int, str], tuple[str, str]]) -> list[Card]:
    whole = part[part["layer"].isna()]
    dropped = _one(whole, "dropped")
    lost = _one(whole, "tokens that lose every expert")
    layers = part[(part["metric"] == "dropped") & part["layer"].notna()]
    slots = part[part["metric"] == "slots provided"]
    provided = float(np.average(slots["value"], weights=slots["n"])) if len(slots) else float("nan")
    rerouted = part[part["metric"] == "dropped after reroute"]
    n = int(dropped["n"])
    cards: list[Card] = [
        {
            "label": "Decisions dropped",
            "value": percent(dropped["value"]),
            "detail": joined(
                share_interval(dropped), f"{numbers.short_count(dropped['value'] * n)} of {numbers.short_count(n)}"
            ),
        },
        {
            "label": "By a balanced router",
            "value": percent(dropped["null"]),
            "detail": f"here {100 * (dropped['value'] - dropped['null']):.1f} points more".replace("-", "−"),
        },
        {
            "label": "Tokens left with no expert",
            "value": percent(lost["value"]),
            "detail": joined(share_interval(lost), f"balanced: {percent(lost['null'])}"),
        },
        {
            "label": "Slots provided",
            "value": numbers.ratio(provided),
            "detail": f"per decision; {percent(max(1 - (1 - dropped['value']) / provided, 0.0))} stay empty",
        },
    ]
    worst = layers.loc[layers["value"].idxmax()]
    place = int(worst["layer"]), str(worst["block"])
    name, href = links.get(place, ("", ""))
    cards.append(
        {
            "label": f"Most: {layer_name(*place)}",
            "value": percent(worst["value"]),
            "detail": f"tokens of its busiest expert, {name}" if name else "",
            "href": href,
        }
    )
    tenths = whole[whole["metric"] == "dropped in a tenth of the batch"].sort_values("tenth")
    if len(rerouted):
        share = float(np.average(rerouted["value"], weights=rerouted["n"]))
        cards.append(
            {"label": "Dropped after reroute", "value": percent(share), "detail": "no room at any next choice"}
        )
    elif len(tenths):
        last, first = tenths.iloc[-1], tenths.iloc[0]
        cards.append(
            {
                "label": "Last tenth of a batch",
                "value": percent(last["value"]),
                "detail": f"first tenth: {percent(first['value'])}",
            }
        )
    return cards


def _one(frame: pd.DataFrame, metric: str) -> dict[str, Any]:
    row: dict[str, Any] = frame[frame["metric"] == metric].iloc[0].to_dict()
    return row
