"""Figures of attention: sinks by layer and head, classes of keys by layer, decay of sinks by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.core.figures import CHANCE, SERIES, heatmap
from moescope.core.result import Result
from moescope.routing.grid import layer_name

CLASSES = ("first", "special", "punctuation", "self", "local", "other", "sink_logit")


def draw_sinks(result: Result) -> go.Figure:
    """Layer × head: α of the position that is a sink in most heads."""
    frame = result.df()
    rates = frame[frame["metric"] == "Sink_k"]
    position = int(rates.loc[rates["value"].idxmax(), "position"])
    alphas = frame[(frame["metric"] == "alpha") & (frame["position"] == position)]
    grid, rows, heads, fields = head_grid(alphas, "value", extra=("ci_low", "ci_high", "rate"))
    null = float(alphas["null"].iloc[0])
    figure = heatmap(
        grid,
        x=heads,
        y=rows,
        customdata=fields,
        colorbar=f"α, position {position}",
        hover="%{y} %{x}: %{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<br>a sink in %{customdata[2]:.1%} of texts",
    )
    figure.update_traces(zmin=0, zmax=1)
    figure.update_xaxes(title=f"head (uniform attention gives every head α = {null:.3f})")
    figure.update_yaxes(title="layer")
    return figure


def draw_classes(result: Result) -> go.Figure:
    """Layers × share of attention, a line a class of keys; dashed what uniform attention would give."""
    frame = result.df()
    layers = frame[frame["head"].isna()]
    figure = go.Figure()
    for number, name in enumerate(CLASSES):
        part = layers[layers["metric"] == f"mass {name.replace('_', ' ')}"]
        if part.empty:
            continue
        names, colour = place_names(part), SERIES[number]
        value, low, high = (part[column].to_numpy(np.float64) for column in ("value", "ci_low", "ci_high"))
        figure.add_scatter(
            x=names, y=value, mode="lines+markers", name=name.replace("_", " "), line={"color": colour}, legendgroup=name,
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
            customdata=np.stack([low, high, part["null"].to_numpy(np.float64)], axis=-1),
            hovertemplate=f"{name.replace('_', ' ')}, %{{x}}: %{{y:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]"
            "<br>uniform attention: %{customdata[2]:.3f}<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=names, y=part["null"], mode="lines", line={"color": colour, "dash": "dot", "width": 1}, legendgroup=name,
            showlegend=False, hoverinfo="skip",
        )  # fmt: skip
    figure.add_scatter(
        x=[None], y=[None], mode="lines", name="uniform attention", line={"color": CHANCE, "dash": "dot"}
    )
    figure.update_xaxes(title="layer", type="category", nticks=32)
    figure.update_yaxes(title="share of attention, mean over heads", rangemode="tozero")
    figure.update_layout(height=440)
    return figure


def draw_decay(result: Result) -> go.Figure:
    """Layers × sink decay, with its interval; dashed what it would be if attention became uniform."""
    frame = result.df()
    part = frame[frame["metric"] == "decay"]
    names = place_names(part)
    value, low, high = (part[column].to_numpy(np.float64) for column in ("value", "ci_low", "ci_high"))
    figure = go.Figure(
        go.Scatter(
            x=names, y=value, mode="lines+markers", name="sink decay", line={"color": SERIES[0]},
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
            customdata=np.stack([low, high], axis=-1),
            hovertemplate="%{x}: %{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]<extra></extra>",
        )
    )  # fmt: skip
    figure.add_scatter(
        x=names, y=part["null"], mode="lines", name="if attention became uniform", line={"color": CHANCE, "dash": "dash"},
        hovertemplate="%{x}: %{y:.1%}<extra></extra>",
    )  # fmt: skip
    figure.add_hline(y=0, line_color=CHANCE, line_width=1)
    figure.update_xaxes(title="layer", type="category", nticks=32)
    figure.update_yaxes(title="sink attention lost (share)", tickformat=".0%")
    figure.update_layout(height=400)
    return figure


def place_names(frame: pd.DataFrame) -> list[str]:
    """Names of the attentions of some rows: `L3`, or `L3 attn.1` for a second one."""
    return [
        layer_name(int(layer), "mlp" if block == "attn" else str(block))
        for layer, block in zip(frame["layer"], frame["block"], strict=True)
    ]


def head_grid(
    frame: pd.DataFrame, value: str, *, extra: tuple[str, ...] = ()
) -> tuple[NDArray[np.float64], list[str], list[str], NDArray[np.float64]]:
    """A long table of heads as a grid.

    Args:
        frame: columns layer, block, head, `value` and `extra`.
        value: column to show.
        extra: columns for hovering.

    Returns:
        values [attention, head] (NaN where there is no such head), row names, column names, extra [attention, head, column].
    """
    order = frame[["layer", "block"]].drop_duplicates().sort_values(["layer", "block"])
    places = {(int(r.layer), str(r.block)): number for number, r in enumerate(order.itertuples())}
    heads = int(frame["head"].max()) + 1
    rows = [places[int(layer), str(block)] for layer, block in zip(frame["layer"], frame["block"], strict=True)]
    columns = frame["head"].astype(int).to_numpy()
    values = np.full((len(places), heads), np.nan)
    values[rows, columns] = frame[value].astype(float)
    fields = np.full((*values.shape, len(extra)), np.nan)
    for number, name in enumerate(extra):
        fields[rows, columns, number] = frame[name].astype(float)
    return values, place_names(order), [f"H{head}" for head in range(heads)], fields
