"""What the Experts page lets one choose: measure, order, label, the run to compare with, layer, a typed name."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from moescope.dashboard import expert_records
from moescope.dashboard.browser import named
from moescope.dashboard.records import Router, labels, layer_of
from moescope.routing.experts.measures import MEASURES, Measure
from moescope.store.run import Run

DEFAULTS = {"measure": "load", "sort": "index", "only": "", "other": "", "label": "", "rank": "high"}


def controls(run: Run, known: list[Router]) -> Any:
    """The row of controls over the map; each writes its parameter of the address."""
    others = [other.name for other in run.store.runs() if other.name != run.name]
    names = [name for name, _ in labels(run)]
    parts = [
        _select("measure", "Measure", _measures(run), width=250, clearable=False, max_height=420),
        html.Div(
            [
                html.Div("Order of experts", className="control-label"),
                dmc.SegmentedControl(
                    id={"url": "sort"},
                    data=[{"value": "index", "label": "number"}, {"value": "load", "label": "load"}, _similar(run)],
                    value="index",
                    size="xs",
                    **named("Order of experts in each layer"),
                ),
            ]
        ),
        _select(
            "only",
            "Layer",
            [{"value": str(layer_of(r, known)), "label": r.name} for r in known],
            width=110,
            empty="all layers",
        ),
    ]
    if others:
        parts.append(_select("other", "Less run", [{"value": n, "label": n} for n in others], width=170, empty="none"))
    if len(names) > 1:
        label = _select("label", "Label", [{"value": n, "label": n} for n in names], width=150, empty="each one's own")
        parts.append(html.Div(label, id="atlas-label", style={"display": "none"}))
    box = dmc.TextInput(
        id="expert-box",
        label="Go to",
        placeholder="L3·E7",
        debounce=True,
        size="xs",
        w=110,
        inputProps={"aria-label": "Go to an expert, for instance L3·E7"},
    )
    return html.Div([dcc.Store(id={"defaults": "experts"}, data=DEFAULTS), *parts, box], className="controls")


def rank_control() -> Any:
    """Which end of the ranking the table begins with."""
    return dmc.SegmentedControl(
        id={"url": "rank"},
        data=[{"value": "high", "label": "highest"}, {"value": "low", "label": "lowest"}],
        value="high",
        size="xs",
        **named("Which experts the table begins with"),
    )


def _select(
    name: str,
    label: str,
    data: list[Any],
    *,
    width: int,
    empty: str = "",
    clearable: bool = True,
    max_height: int = 300,
) -> Any:
    return dmc.Select(
        id={"url": name},
        label=label,
        data=data,
        value=DEFAULTS[name] or None,
        placeholder=empty,
        searchable=True,
        clearable=clearable,
        allowDeselect=False,
        size="xs",
        w=width,
        maxDropdownHeight=max_height,
        classNames={"option": "foreign"},
        clearButtonProps={"aria-label": f"Clear {label.lower()}", "tabIndex": 0} if clearable else None,
        nothingFoundMessage="nothing of that name",
    )


def _similar(run: Run) -> dict[str, Any]:
    return {"value": "similarity", "label": "similarity", "disabled": not expert_records.has(run, "routing")}


def _measures(run: Run) -> list[dict[str, Any]]:
    """Measures by what they are about; those whose records the run does not have cannot be chosen."""
    tables = {table for measure in MEASURES.values() for table in measure.needs}
    there = {table for table in tables if expert_records.has(run, table)}
    labelled = len(labels(run)) > 1
    groups: dict[str, list[dict[str, Any]]] = {}
    for measure in MEASURES.values():
        enough = there.issuperset(measure.needs) and (labelled or not measure.name.startswith("label_"))
        groups.setdefault(measure.group, []).append(_choice(measure, enough))
    return [{"group": group, "items": items} for group, items in groups.items()]


def _choice(measure: Measure, enough: bool) -> dict[str, Any]:
    return {
        "value": measure.name,
        "label": measure.title + ("" if enough else " (not recorded)"),
        "disabled": not enough,
    }
