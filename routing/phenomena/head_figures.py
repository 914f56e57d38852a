"""Figures of attention heads: all of them as a map, the leading ones with their intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moescope.core.figures import CHANCE, SEQUENTIAL, SERIES
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.routing.phenomena.head_records import head_name

_SHOWN = 12


def draw_heads(result: Result) -> go.Figure:
    """Layer × head of the first metric of the table; beside it the leading heads, their intervals and the chance level."""
    frame = result.df()
    frame = frame[frame["layer"].notna() & frame["head"].notna()]
    metric = str(frame["metric"].iloc[0])
    return heads_figure(frame[frame["metric"] == metric], metric, threshold=_threshold(result))


def heads_figure(part: pd.DataFrame, metric: str, *, threshold: float | None) -> go.Figure:
    """One metric of every head.

    Args:
        part: columns layer, block, head, value, ci_low, ci_high, null.
        metric: what it is, for the axes.
        threshold: a level to draw; None for none.
    """
    grid, rows, columns = _grid(part)
    figure = make_subplots(cols=2, column_widths=[0.55, 0.45], horizontal_spacing=0.2)
    figure.add_trace(
        go.Heatmap(
            z=grid, x=columns, y=rows, colorscale=SEQUENTIAL, zmin=0, xgap=1, ygap=1,
            colorbar={"title": {"text": metric, "side": "right"}, "thickness": 12, "x": 0.46},
            hovertemplate="%{y}·%{x}: %{z:.4g}<extra></extra>",
        ),
        row=1, col=1,
    )  # fmt: skip
    top = part.sort_values("value", ascending=False, kind="stable").head(_SHOWN)[::-1]
    names = [head_name(int(r.layer), str(r.block), int(r.head)) for r in top.itertuples()]
    value, low, high = (top[name].astype(float).to_numpy() for name in ("value", "ci_low", "ci_high"))
    figure.add_trace(
        go.Scatter(
            x=value, y=names, mode="markers", name=metric, marker={"color": SERIES[0], "size": 9},
            error_x={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
            customdata=np.stack([low, high], axis=-1),
            hovertemplate="%{y}: %{x:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<extra></extra>",
        ),
        row=1, col=2,
    )  # fmt: skip
    if "null" in top and top["null"].notna().any():
        figure.add_trace(
            go.Scatter(
                x=top["null"].astype(float), y=names, mode="markers", name="chance level",
                marker={"color": CHANCE, "symbol": "line-ns-open", "size": 12}, cliponaxis=False,
                hovertemplate="%{y}: chance %{x:.4g}<extra></extra>",
            ),
            row=1, col=2,
        )  # fmt: skip
    if threshold is not None:
        figure.add_trace(
            go.Scatter(
                x=[threshold] * 2, y=[names[0], names[-1]], mode="lines", name=f"threshold {threshold:g}",
                line={"color": CHANCE, "dash": "dash"}, hoverinfo="skip",
            ),
            row=1, col=2,
        )  # fmt: skip
    figure.update_xaxes(title="head", type="category", nticks=16, row=1, col=1)
    figure.update_yaxes(title="layer", type="category", autorange="reversed", nticks=16, row=1, col=1)
    figure.update_xaxes(title=metric, rangemode="tozero", row=1, col=2)
    figure.update_yaxes(type="category", row=1, col=2)
    figure.update_layout(height=460)
    return figure


def _threshold(result: Result) -> float | None:
    value = result.parameters.get("threshold")
    return float(value) if value is not None else None


def _grid(part: pd.DataFrame) -> tuple[np.ndarray, list[str], list[str]]:
    places = sorted({(int(r.layer), str(r.block)) for r in part.itertuples()})
    width = int(part["head"].max()) + 1
    grid = np.full((len(places), width), np.nan)
    number = {place: row for row, place in enumerate(places)}
    for r in part.itertuples():
        grid[number[int(r.layer), str(r.block)], int(r.head)] = float(r.value)
    names = [layer_name(layer, "mlp" if block == "attn" else block) for layer, block in places]
    return grid, names, [f"H{h}" for h in range(width)]
