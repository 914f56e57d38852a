"""The figure of massive activations: largest |x| by layer, the rule's thresholds, and the channels that pass them."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from moescope.core.figures import CHANCE, SERIES, log_axis
from moescope.core.result import Result

_CHANNELS = 5


def draw_massive(result: Result) -> go.Figure:
    """Layer × max |x| on a logarithmic axis; massive channels are named, up to the five largest."""
    frame = result.df()
    top = frame[frame["metric"] == "max |x|"]
    fields = np.stack([top[name].astype(float) for name in ("channel", "position", "ratio")], axis=-1)
    figure = go.Figure(
        go.Scatter(
            x=top["layer"], y=top["value"], mode="lines+markers", name="largest |x|", line={"color": SERIES[0]},
            customdata=fields,
            hovertemplate="after layer %{x}: |x| = %{y:,.4g}<br>channel %{customdata[0]:.0f}, position %{customdata[1]:.0f}"
            "<br>%{customdata[2]:,.0f}× the median<extra></extra>",
        )
    )  # fmt: skip
    massive = frame[frame["metric"] == "massive in channel"]
    order = massive.groupby("channel")["value"].max().sort_values(ascending=False).index[:_CHANNELS]
    for number, channel in enumerate(order):
        part = massive[massive["channel"] == channel]
        figure.add_scatter(
            x=part["layer"], y=part["value"], mode="markers", name=f"massive in channel {channel}",
            marker={
                "color": SERIES[1:][number], "size": 13, "line": {"width": 2.5, "color": SERIES[1:][number]},
                "symbol": f"{('circle', 'diamond', 'square', 'triangle-up', 'cross')[number]}-open",
            },
            customdata=np.stack([part["ratio"].astype(float), part["n"].astype(float)], axis=-1),
            hovertemplate="after layer %{x}: |x| up to %{y:,.4g}<br>%{customdata[0]:,.0f}× the median, "
            "%{customdata[1]:,.0f} tokens<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=top["layer"], y=1000 * top["median_abs"], mode="lines", name="1000 × median |x| of its text",
        line={"color": CHANCE, "dash": "dash"}, hovertemplate="after layer %{x}: %{y:,.4g}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=top["layer"], y=[100.0] * len(top), mode="lines", name="|x| = 100", line={"color": CHANCE, "dash": "dot"},
        hoverinfo="skip",
    )  # fmt: skip
    figure.update_xaxes(
        title="layer (block output)",
        dtick=max(1, len(top) // 16),
        range=[top["layer"].min() - 0.5, top["layer"].max() + 0.5],
    )
    log_axis(figure, title="|x| (log scale)", values=[*top["value"], *(1000 * top["median_abs"]), 100.0])
    figure.update_layout(height=440)
    return figure
