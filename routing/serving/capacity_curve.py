"""The figure of many capacity factors: what is dropped at each, over all layers and layer by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.core.figures import CHANCE, SEQUENTIAL, SERIES
from moescope.routing.grid import layer_name

_LINES = {
    "dropped": "dropped",
    "dropped after reroute": "dropped after reroute",
    "tokens that lose every expert": "tokens that lose every expert",
}


def draw_curve(frame: pd.DataFrame) -> go.Figure:
    """Shares against the factor at the left, layers against the factor at the right."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    whole = frame[frame["layer"].isna() & frame["tenth"].isna()]
    for number, (metric, name) in enumerate(_LINES.items()):
        part = whole[whole["metric"] == metric].sort_values("factor")
        if metric == "dropped after reroute":
            part = _mean_over_layers(frame[frame["metric"] == metric])
        if part.empty:
            continue
        figure.add_scatter(
            x=part["factor"], y=part["value"], mode="lines", name=name, line={"color": SERIES[number]}, row=1, col=1,
            hovertemplate=f"capacity %{{x:.2f}}×: %{{y:.2%}} {name}<extra></extra>",
        )  # fmt: skip
        if metric == "dropped":
            figure.add_scatter(
                x=part["factor"], y=part["null"], mode="lines", name="dropped by a balanced router",
                line={"color": CHANCE, "dash": "dash"}, row=1, col=1,
                hovertemplate="capacity %{x:.2f}×, balanced: %{y:.2%}<extra></extra>",
            )  # fmt: skip
    layers = frame[(frame["metric"] == "dropped") & frame["layer"].notna()]
    grid = layers.pivot_table(index=["layer", "block"], columns="factor", values="value", sort=True)
    names = [layer_name(int(layer), str(block)) for layer, block in grid.index]
    values = grid.to_numpy(dtype=np.float64)
    figure.add_heatmap(
        z=values, x=list(grid.columns), y=names, colorscale=SEQUENTIAL, zmin=0, row=1, col=2,
        zmax=max(float(np.percentile(values, 98)), 1e-6),
        colorbar={"title": {"text": "share dropped", "side": "right"}, "thickness": 14, "tickformat": ".0%"},
        hovertemplate="%{y}, capacity %{x:.2f}×: %{z:.2%} dropped<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title="capacity ÷ fair share", row=1, col=1)
    figure.update_xaxes(title="capacity ÷ fair share", row=1, col=2)
    figure.update_yaxes(title="share", tickformat=".0%", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(type="category", autorange="reversed", nticks=min(len(names), 24), row=1, col=2)
    figure.update_layout(height=440)
    return figure


def _mean_over_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """Share over all layers: their decisions together."""
    lost = (frame["value"] * frame["n"]).groupby(frame["factor"]).sum()
    size = frame.groupby("factor")["n"].sum()
    return (lost / size).rename("value").reset_index()
