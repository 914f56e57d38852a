"""The figure of placements on several numbers of devices."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moescope.core.figures import CHANCE, SERIES

_AXES = {"crossings a token": "crossings a token", "busiest ÷ mean device": "busiest ÷ mean device (1: even)"}


def draw_curve(frame: pd.DataFrame) -> go.Figure:
    """Crossings at the left, the busiest device at the right, against the number of devices."""
    from plotly.subplots import make_subplots

    metrics = [metric for metric in _AXES if (frame["metric"] == metric).any()]
    figure = make_subplots(rows=1, cols=max(len(metrics), 1), horizontal_spacing=0.1)
    numbers = sorted(frame["devices"].unique())
    for column, metric in enumerate(metrics, start=1):
        of_it = frame[frame["metric"] == metric]
        for number, (name, part) in enumerate(of_it.sort_values("devices").groupby("placement", sort=False)):
            value, low, high = (part[c].astype(float) for c in ("value", "ci_low", "ci_high"))
            figure.add_scatter(
                x=part["devices"], y=value, mode="lines+markers", name=str(name), legendgroup=str(name),
                showlegend=column == 1, line={"color": SERIES[number]}, row=1, col=column,
                error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low,
                         "thickness": 1},
                hovertemplate=f"{name}, %{{x}} devices: %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
        chance = of_it.groupby("devices")["null"].mean()
        figure.add_scatter(
            x=list(chance.index), y=chance, mode="lines", name="at random", legendgroup="null", showlegend=column == 1,
            line={"color": CHANCE, "dash": "dash"}, row=1, col=column,
            hovertemplate="at random, %{x} devices: %{y:.3f}<extra></extra>",
        )  # fmt: skip
        figure.update_xaxes(
            title="devices", type="log", tickvals=numbers, ticktext=[str(n) for n in numbers], row=1, col=column
        )
        figure.update_yaxes(title=_AXES[metric], row=1, col=column)
    figure.update_layout(height=420)
    return figure
