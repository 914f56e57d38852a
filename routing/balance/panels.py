"""Figures of measures that every router has: one panel a measure, or one heat map where tokens are in groups."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.core.figures import CHANCE, SERIES, heatmap, plain
from moescope.routing.grid import layer_name

GROUPS = ("label", "position", "phase", "class")


def group_column(frame: pd.DataFrame) -> str | None:
    """The column that names groups of tokens; None where each router has one row a measure."""
    return next((name for name in GROUPS if name in frame), None)


def panels(frame: pd.DataFrame, metrics: Mapping[str, str], *, null_name: str) -> go.Figure:
    """Estimates over layers with their intervals and the chance level dashed, one panel a metric.

    Args:
        frame: columns layer, block, metric, value, ci_low, ci_high, null.
        metrics: what to show → its unit; those without rows are left out.
        null_name: what the chance level is called in the legend; not read where no metric has one.
    """
    from plotly.subplots import make_subplots

    shown = [metric for metric in metrics if (frame["metric"] == metric).any()]
    columns = 1 if len(shown) == 1 else 2
    figure = make_subplots(
        rows=-(-len(shown) // columns),
        cols=columns,
        horizontal_spacing=0.14,
        vertical_spacing=0.14,
    )
    for number, metric in enumerate(shown):
        part = frame[frame["metric"] == metric]
        place = {"row": number // columns + 1, "col": number % columns + 1}
        _estimates(figure, part, first=number == 0, null_name=null_name, place=place)
        figure.update_yaxes(title=f"{metric}<br>({metrics[metric]})", rangemode="tozero", **place)
        last = number + columns >= len(shown)
        figure.update_xaxes(type="category", nticks=min(len(part), 16), title="layer" if last else None, **place)
    figure.update_layout(height=460 if len(shown) <= 2 else 680)
    return figure


def _estimates(figure: go.Figure, part: pd.DataFrame, *, first: bool, null_name: str, place: Mapping[str, int]) -> None:
    names = [layer_name(r.layer, r.block) for r in part.itertuples()]
    value, low, high, null = (part[name].astype(float) for name in ("value", "ci_low", "ci_high", "null"))
    figure.add_scatter(
        x=names,
        y=value,
        error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
        customdata=np.stack([low, high, null], axis=-1),
        hovertemplate="%{x}: %{y:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<extra></extra>",
        mode="lines+markers",
        line={"color": SERIES[0]},
        name="measured",
        showlegend=first,
        **place,
    )
    if null.notna().any():
        figure.add_scatter(
            x=names,
            y=null,
            mode="lines",
            line={"color": CHANCE, "dash": "dash"},
            name=null_name,
            showlegend=first,
            hovertemplate="%{x}: %{y:.4g}<extra></extra>",
            **place,
        )


def group_grid(part: pd.DataFrame, values: NDArray[np.float64], *, colorbar: str) -> go.Figure:
    """A heat map of groups over routers; hovering tells value, interval, chance level and n.

    Args:
        part: rows of one metric, with the columns of a result.
        values: [row] what is shown in colour.
        colorbar: its title, with the unit.
    """
    column = group_column(part)
    assert column is not None
    names = list(dict.fromkeys(part[column]))
    places = sorted(set(zip(part["layer"], part["block"], strict=True)))
    at = (
        [names.index(name) for name in part[column]],
        [places.index(place) for place in zip(part["layer"], part["block"], strict=True)],
    )
    shape = (len(names), len(places))
    shown, fields = np.full(shape, np.nan), np.full((*shape, 5), np.nan)
    shown[at] = values
    for number, name in enumerate(("value", "ci_low", "ci_high", "null", "n")):
        fields[(*at, number)] = part[name].astype(float)
    metric = plain(str(part["metric"].iloc[0]))
    figure = heatmap(
        shown,
        x=[layer_name(*place) for place in places],
        y=[plain(str(name)) for name in names],
        customdata=fields,
        colorbar=colorbar,
        hover=f"%{{x}} · %{{y}}<br>{metric} %{{customdata[0]:.4g}} [%{{customdata[1]:.4g}}, %{{customdata[2]:.4g}}]<br>"
        + ("by chance %{customdata[3]:.4g}, " if part["null"].notna().any() else "")
        + "n = %{customdata[4]:,.0f}",
    )
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title=column)
    return figure
