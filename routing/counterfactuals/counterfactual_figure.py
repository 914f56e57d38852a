"""The figure of counterfactual routing."""

from __future__ import annotations

import plotly.graph_objects as go

from moescope.core.figures import SERIES
from moescope.core.result import Result
from moescope.routing.balance.panels import group_column, group_grid, panels


def draw(result: Result) -> go.Figure:
    """Experts a token and agreement by layer, with how many experts tokens have; a heat map where tokens are in groups."""
    frame = result.df()
    routers = frame[frame["layer"].notna()].astype({"layer": int})
    if group_column(frame) is not None:
        part = routers[routers["metric"] == "experts per token"]
        if part["value"].max() - part["value"].min() > 0.05:
            return group_grid(part, part["value"].to_numpy(), colorbar="experts per token")
        part = routers[routers["metric"] == "agreement"]
        return group_grid(part, part["value"].to_numpy(), colorbar="agreement (share of decisions)")
    routers = routers.copy()
    counted = routers["metric"] == "experts per token"
    routers.loc[counted, "null"] = routers.loc[counted, "recorded"]
    titles = {"experts per token": "mean", "agreement": "share of decisions"}
    figure = panels(routers, titles, null_name="experts: the model's own k; agreement: by chance")
    sizes = frame[frame["metric"] == "tokens with m experts"]
    if len(sizes) < 2:
        return figure
    return _with_sizes(figure, sizes["m"].astype(int).tolist(), sizes["value"].tolist())


def _with_sizes(figure: go.Figure, sizes: list[int], shares: list[float]) -> go.Figure:
    """The same panels above, and the spread of experts a token below."""
    figure.update_layout(
        xaxis3={"title": "experts of a token", "anchor": "y3", "domain": [0, 1]},
        yaxis3={"title": "share of tokens", "anchor": "x3", "domain": [0, 0.36], "rangemode": "tozero"},
        yaxis={"domain": [0.6, 1]},
        yaxis2={"domain": [0.6, 1]},
        height=680,
    )
    figure.add_bar(
        x=sizes,
        y=shares,
        xaxis="x3",
        yaxis="y3",
        marker={"color": SERIES[0]},
        showlegend=False,
        hovertemplate="%{x} experts: %{y:.2%} of tokens<extra></extra>",
    )
    return figure
