"""The figure of a contrast: every expert in one look, and the surest ones with interval and shuffles."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.core.figures import CHANCE, DIVERGING, SERIES, plain
from moescope.core.result import Result
from moescope.routing.grid import expert_grid, layer_name

_SHOWN = 16
_FOUND = 0.05


def contrast_figure(result: Result) -> go.Figure:
    """Left a map of layer × expert coloured by the difference of the sets; right the surest experts with interval and 95 % of shuffles."""
    from plotly.subplots import make_subplots

    frame = result.df()
    unit = plain(result.units["value"])
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.56, 0.44],
        horizontal_spacing=0.17,
        subplot_titles=["every expert", "the surest"],
    )
    figure.add_trace(_map(frame, unit), row=1, col=1)
    figure.update_xaxes(title="expert", type="category", nticks=24, row=1, col=1)
    figure.update_yaxes(title="layer", type="category", autorange="reversed", row=1, col=1)
    shown = frame.head(_SHOWN).iloc[::-1]
    names = [f"{layer_name(r.layer, str(r.block))}·E{r.expert}" for r in shown.itertuples()]
    figure.add_trace(_shuffles(shown, names), row=1, col=2)
    for found, trace in ((True, plain("q < 0.05")), (False, "q ≥ 0.05")):
        figure.add_trace(_points(shown, names, found=found, name=trace), row=1, col=2)
    figure.add_vline(x=0, line={"color": CHANCE, "width": 1}, row=1, col=2)
    figure.update_xaxes(title=unit, row=1, col=2)
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names, row=1, col=2)
    figure.update_layout(height=max(440, min(700, 200 + 22 * len(names))))
    return figure


def _map(frame: pd.DataFrame, unit: str) -> go.Heatmap:
    values, rows, columns, fields = expert_grid(frame, "value", extra=("a", "b", "q"))
    finite = np.abs(values[np.isfinite(values)])
    limit = max(float(np.percentile(finite, 99)) if finite.size else 0.0, 1e-9)
    return go.Heatmap(
        z=values,
        x=columns,
        y=rows,
        zmin=-limit,
        zmax=limit,
        zmid=0,
        colorscale=DIVERGING,
        customdata=fields,
        colorbar={"title": {"text": unit, "side": "right"}, "thickness": 12, "x": 0.475},
        hovertemplate="%{y}·%{x}: %{z:+.4f}<br>a %{customdata[0]:.4f}, b %{customdata[1]:.4f}, q = %{customdata[2]:.3f}"
        "<extra></extra>",
        xgap=1 if len(columns) <= 64 else 0,
        ygap=1 if len(columns) <= 64 else 0,
    )


def _shuffles(shown: pd.DataFrame, names: list[str]) -> go.Bar:
    """Where 95 % of the shuffled differences lie, as a band behind each point."""
    return go.Bar(
        y=names,
        x=shown["null_high"] - shown["null_low"],
        base=shown["null_low"],
        orientation="h",
        marker={"color": CHANCE, "opacity": 0.35},
        name="95 % of shuffles",
        hovertemplate="%{y}: shuffles from %{base:.4f}<extra></extra>",
    )


def _points(shown: pd.DataFrame, names: list[str], *, found: bool, name: str) -> go.Scatter:
    mine = (shown["q"] < _FOUND).to_numpy() == found
    rows = shown[mine]
    return go.Scatter(
        y=[n for n, keep in zip(names, mine, strict=True) if keep],
        x=rows["value"],
        mode="markers",
        name=name,
        marker={"color": SERIES[0] if found else SERIES[1], "symbol": "circle" if found else "circle-open", "size": 9},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": rows["ci_high"] - rows["value"],
            "arrayminus": rows["value"] - rows["ci_low"],
            "thickness": 1,
        },
        customdata=rows[["a", "b", "q"]],
        hovertemplate="%{y}: %{x:+.4f}, a %{customdata[0]:.4f}, b %{customdata[1]:.4f}, q = %{customdata[2]:.3f}"
        "<extra></extra>",
    )
