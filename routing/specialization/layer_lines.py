"""A measure over layers, several series beside each other, each with its interval and its chance level."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.core.figures import CHANCE, SERIES, plain
from moescope.routing.grid import layer_name


def layer_lines(
    frame: pd.DataFrame,
    *,
    series: str,
    title_y: str,
    null_name: str,
    panel: str | None = None,
    percent: bool = False,
    one_scale: bool = True,
) -> go.Figure:
    """Lines over layers: solid with error bars for the estimate, dashed for the chance level of the same series.

    Args:
        frame: columns layer, block, value, ci_low, ci_high, null, n, `series` and `panel`.
        series: column whose values get a colour each.
        title_y: title of the y axis, with its unit.
        null_name: what the chance level is called.
        panel: column whose values get a panel each, side by side.
        percent: write the y axis in percent.
        one_scale: the panels share one y axis; else each has its own.
    """
    from plotly.subplots import make_subplots

    panels = list(frame[panel].unique()) if panel else [None]
    names = list(frame[series].unique())
    figure = make_subplots(cols=len(panels), shared_yaxes=one_scale, horizontal_spacing=0.04 if one_scale else 0.1)
    for column, shown in enumerate(panels, start=1):
        part = frame if panel is None else frame[frame[panel] == shown]
        for number, name in enumerate(names):
            lines = part[part[series] == name].sort_values(["layer", "block"])
            colour = SERIES[number % len(SERIES)]
            for trace in _pair(lines, plain(str(name)), colour, null_name, "%{y:.1%}" if percent else "%{y:.4g}"):
                trace.showlegend = column == 1 and trace.line.dash is None
                figure.add_trace(trace, row=1, col=column)
    figure.add_trace(
        go.Scatter(
            x=[None], y=[None], mode="lines", name=f"dashed: {null_name}", line={"color": CHANCE, "dash": "dash"}
        )
    )
    rows = frame.drop_duplicates(["layer", "block"]).sort_values(["layer", "block"])
    order = [layer_name(r.layer, r.block) for r in rows.itertuples()]
    figure.update_xaxes(
        type="category",
        categoryorder="array",
        categoryarray=order,
        range=[-0.5, len(order) - 0.5],
        nticks=24 // len(panels),
        tickangle=0,
    )
    for column, shown in enumerate(panels, start=1):
        figure.update_xaxes(title="layer" if shown is None else f"layer: {plain(str(shown))}", col=column)
    figure.update_yaxes(rangemode="tozero", tickformat=".3~%" if percent else None)
    figure.update_yaxes(title=title_y, col=1)
    figure.update_layout(height=440)
    return figure


def _pair(lines: pd.DataFrame, name: str, colour: str, null_name: str, number: str) -> list[go.Scatter]:
    """The estimates and, dashed in the same colour, their chance levels."""
    x = [layer_name(r.layer, r.block) for r in lines.itertuples()]
    value, low, high = (lines[column].to_numpy(dtype=float) for column in ("value", "ci_low", "ci_high"))
    estimate = go.Scatter(
        x=x,
        y=value,
        mode="lines+markers",
        name=name,
        legendgroup=name,
        line={"color": colour},
        marker={"size": 6},
        error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
        customdata=np.stack([low, high, lines["null"].to_numpy(dtype=float), lines["n"].to_numpy(dtype=float)], -1),
        hovertemplate=f"%{{x}} {name}: {number} [%{{customdata[0]:.4g}}, %{{customdata[1]:.4g}}]<br>"
        f"{null_name}: %{{customdata[2]:.4g}}, n = %{{customdata[3]:,.0f}}<extra></extra>",
    )
    chance = go.Scatter(
        x=x,
        y=lines["null"],
        mode="lines",
        legendgroup=name,
        line={"color": colour, "dash": "dash", "width": 1.5},
        name=f"{name}: {null_name}",
        hoverinfo="skip",
    )
    return [estimate, chance]
