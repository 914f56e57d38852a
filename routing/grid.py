"""Layer × expert grids and names, shared by the figures of analyses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def layer_name(layer: int, block: str = "mlp") -> str:
    """`L3`, or `L3 attn` where the router is not the layer's MLP."""
    return f"L{layer}" if block == "mlp" else f"L{layer} {block}"


def expert_grid(
    frame: pd.DataFrame, value: str, *, extra: tuple[str, ...] = ()
) -> tuple[NDArray[np.float64], list[str], list[str], NDArray[np.float64]]:
    """A long table as a grid.

    Args:
        frame: columns layer, block, expert, `value` and `extra`.
        value: column to show.
        extra: columns for hovering.

    Returns:
        values [layer, expert] (NaN where there is no such expert), row names, column names, extra [layer, expert, column].
    """
    routers = sorted({(int(r.layer), str(r.block)) for r in frame.itertuples()})
    experts = sorted(map(int, frame["expert"].unique()))
    row = {place: number for number, place in enumerate(routers)}
    column = {expert: number for number, expert in enumerate(experts)}
    rows = [row[int(a), str(b)] for a, b in zip(frame["layer"], frame["block"], strict=True)]
    columns = [column[int(e)] for e in frame["expert"]]
    values = np.full((len(routers), len(experts)), np.nan)
    values[rows, columns] = frame[value].astype(float)
    fields = np.full((*values.shape, len(extra)), np.nan)
    for number, name in enumerate(extra):
        fields[rows, columns, number] = frame[name].astype(float)
    return values, [layer_name(*place) for place in routers], [f"E{e}" for e in experts], fields


def series_figure(
    frame: Any, *, x: list[str], title_x: str, title_y: str, null: list[float] | None, null_name: str
) -> Any:
    """Estimates with their intervals as points on lines, and the chance level dashed.

    Args:
        frame: columns value, ci_low, ci_high, in the order of `x`.
        x: names along the axis.
        title_x, title_y: axis titles, with units.
        null: the chance level at each point; None for none.
        null_name: what it is called in the legend.
    """
    import plotly.graph_objects as go

    from moescope.core.figures import CHANCE, SERIES

    value, low, high = (frame[name].astype(float) for name in ("value", "ci_low", "ci_high"))
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=value,
            mode="lines+markers",
            name="estimate",
            line={"color": SERIES[0]},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": high - value,
                "arrayminus": value - low,
                "thickness": 1,
            },
            customdata=np.stack([low, high], axis=-1),
            hovertemplate="%{x}: %{y:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<extra></extra>",
        )
    )
    if null is not None:
        figure.add_scatter(x=x, y=null, mode="lines", name=null_name, line={"color": CHANCE, "dash": "dash"})
    figure.update_xaxes(title=title_x, type="category")
    figure.update_yaxes(title=title_y)
    figure.update_layout(height=380)
    return figure
