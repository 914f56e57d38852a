"""Estimates by place or by length beside the levels that chance and shuffles give."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.core.figures import CHANCE, SERIES, plain
from moescope.routing.grid import layer_name

# Each control has a colour and a dash of its own; the closed form is always the grey dashed line.
CONTROLS = {
    "null": ("independent, balanced choices", CHANCE, "dash"),
    "null_shuffled": ("tokens shuffled over the run", SERIES[1], "dot"),
    "null_shuffled_in_label": ("tokens shuffled within labels", SERIES[3], "dot"),
    "null_shuffled_in_sequence": ("tokens shuffled within sequences", SERIES[2], "dot"),
}


def place_names(frame: pd.DataFrame) -> list[str]:
    """Names along the axis, a row each."""
    if "layer" in frame:
        return [layer_name(layer, block) for layer, block in zip(frame["layer"], frame["block"], strict=True)]
    for column in ("label", "phase"):
        if column in frame:
            return [plain(str(name)) for name in frame[column]]
    return ["whole model"] * len(frame)


def place_name(row: pd.Series, by: str) -> str:
    """Name of the place that one row is about, for titles."""
    return layer_name(row["layer"], row["block"]) if by == "layer" else str(row[by])


def axis_title(frame: pd.DataFrame) -> str:
    """What `place_names` names."""
    return next((column for column in ("layer", "label", "phase") if column in frame), "")


def points(figure: go.Figure, part: pd.DataFrame, *, x: list[str], name: str, colour: str, joined: bool) -> None:
    """Estimates with their intervals."""
    value, low, high = (part[column].to_numpy(float) for column in ("value", "ci_low", "ci_high"))
    figure.add_scatter(
        x=x,
        y=value,
        mode="lines+markers" if joined else "markers",
        name=name,
        line={"color": colour},
        marker={"color": colour, "size": 7},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": np.nan_to_num(high - value),
            "arrayminus": np.nan_to_num(value - low),
            "thickness": 1,
        },
        customdata=np.stack([low, high, part["n"].to_numpy(float)], -1),
        hovertemplate=f"%{{x}}, {name}: %{{y:.4g}} [%{{customdata[0]:.4g}}, %{{customdata[1]:.4g}}], "
        "n = %{customdata[2]:,}<extra></extra>",
    )


def levels(
    figure: go.Figure, values: pd.Series, *, x: list[str], name: str, colour: str, dash: str, joined: bool = True
) -> None:
    """A control at each place: a line where places have an order, else a short bar at each."""
    figure.add_scatter(
        x=x,
        y=values.to_numpy(float),
        mode="lines" if joined and len(x) > 1 else "markers",
        name=name,
        line={"color": colour, "dash": dash, "width": 1.5},
        marker={"color": colour, "symbol": "line-ew-open", "size": 20, "line": {"width": 2}},
        hovertemplate=f"%{{x}}, {name}: %{{y:.4g}}<extra></extra>",
    )


def controls(figure: go.Figure, part: pd.DataFrame, *, x: list[str], joined: bool) -> None:
    """Every control that `part` has."""
    for column, (name, colour, dash) in CONTROLS.items():
        if column in part:
            levels(figure, part[column], x=x, name=name, colour=colour, dash=dash, joined=joined)


def by_place(frame: pd.DataFrame, series: list[tuple[str, int, pd.Series]]) -> go.Figure:
    """Some series over layers, labels or phases, each with its chance level dashed in its colour.

    Args:
        frame: a table of `tabled`.
        series: name, number of its colour, rows of it.
    """
    figure = go.Figure()
    joined = "layer" in frame
    for name, colour, rows in series:
        part = frame[rows]
        points(figure, part, x=place_names(part), name=name, colour=SERIES[colour], joined=joined)
        levels(
            figure,
            part["null"],
            x=place_names(part),
            name=f"chance: {name}",
            colour=SERIES[colour],
            dash="dash",
            joined=joined,
        )
    figure.update_xaxes(title=axis_title(frame), type="category")
    return figure.update_layout(height=420)
