"""The figure of one number of every head: layer × head in robust colours, heads beyond them marked, groups divided."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.core.figures import SEQUENTIAL, SERIES
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.routing.phenomena.head_metrics import head_metric

_GAPS_UP_TO = 40
_FIELDS = ("value", "ci_low", "ci_high", "null", "rank", "group")


def draw_head_map(result: Result) -> go.Figure:
    """Layer × head; limits at the 2nd and 98th percentile, a triangle on heads above, lines between key-value groups."""
    frame = result.df()
    told = head_metric(str(frame["metric"].iloc[0]))
    rows = sorted({(int(r.layer), str(r.block)) for r in frame.itertuples()})
    width = int(frame["head"].max()) + 1
    grids = {name: _grid(frame, name, rows, width) for name in _FIELDS}
    values = grids["value"]
    low, high = (float(limit) for limit in np.nanpercentile(values, [2, 98]))
    if low == high:
        low, high = low - 0.5, high + 0.5
    columns = [f"H{head}" for head in range(width)]
    names = [layer_name(layer, "mlp" if block == "attn" else block) for layer, block in rows]
    gap = 1 if width <= _GAPS_UP_TO else 0
    figure = go.Figure(
        go.Heatmap(
            z=values, x=columns, y=names, zmin=low, zmax=high, colorscale=SEQUENTIAL, xgap=gap, ygap=gap if len(rows) <= 64 else 0,
            text=_hover(grids, names, columns), hovertemplate="%{text}<extra></extra>",
            colorbar={"title": {"text": told.unit, "side": "right"}, "thickness": 14},
        )
    )  # fmt: skip
    _beyond(figure, values, high, names, columns, _hover(grids, names, columns))
    _dividers(figure, grids["group"], rows=len(rows))
    figure.update_xaxes(title="head", type="category", nticks=min(width, 32), range=[-0.5, width - 0.5], showgrid=False)
    figure.update_yaxes(title="layer", type="category", range=[len(rows) - 0.5, -0.5], nticks=24, showgrid=False)
    figure.update_layout(height=max(280, min(620, 130 + 24 * len(rows))), showlegend=len(figure.data) > 1)
    return figure


def _grid(frame: pd.DataFrame, column: str, rows: list[tuple[int, str]], width: int) -> NDArray[np.float64]:
    number = {place: row for row, place in enumerate(rows)}
    found = np.full((len(rows), width), np.nan)
    at = [number[int(layer), str(block)] for layer, block in zip(frame["layer"], frame["block"], strict=True)]
    found[at, frame["head"].astype(int)] = frame[column].astype(float)
    return found


def _hover(grids: dict[str, NDArray[np.float64]], names: list[str], columns: list[str]) -> NDArray[Any]:
    """What is told of a head, at its place."""
    found = np.full(grids["value"].shape, "", dtype=object)
    for row, column in np.argwhere(np.isfinite(grids["value"])):
        value, low, high, null, rank, group = (float(grids[name][row, column]) for name in _FIELDS)
        text = f"{names[row]}·{columns[column]}: {value:.4g}"
        text += f" [{low:.4g}, {high:.4g}]" if np.isfinite(low) else ""
        text += f"<br>by chance {null:.4g}" if np.isfinite(null) else ""
        text += f"<br>rank {rank:.0f} of {int(np.isfinite(grids['value']).sum()):,}"
        found[row, column] = text + (f"<br>reads key-value head {group:.0f}" if np.isfinite(group) else "")
    return found


def _beyond(
    figure: go.Figure,
    values: NDArray[np.float64],
    high: float,
    names: list[str],
    columns: list[str],
    hover: NDArray[Any],
) -> None:
    """Marks on what lies above the colours by more than a tenth of their range."""
    spread = high - float(np.nanpercentile(values, 2))
    over = np.argwhere(values > high + 0.1 * spread)
    if not len(over):
        return
    figure.add_scatter(
        x=[columns[c] for _, c in over], y=[names[r] for r, _ in over], mode="markers", name=f"over {high:.3g}, beyond the colours",
        marker={"symbol": "triangle-up", "size": 8, "color": SERIES[1], "line": {"color": "white", "width": 1}},
        text=[hover[r, c] for r, c in over], hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip


def _dividers(figure: go.Figure, groups: NDArray[np.float64], *, rows: int) -> None:
    """Lines between heads that read different key-value heads, where several share one."""
    if not any(len(np.unique(line[np.isfinite(line)])) < np.isfinite(line).sum() for line in groups):
        return
    for column in range(1, groups.shape[1]):
        before, after = groups[:, column - 1], groups[:, column]
        if (np.isfinite(after) & (before != after)).any():
            figure.add_shape(
                type="line", x0=column - 0.5, x1=column - 0.5, y0=-0.5, y1=rows - 0.5, line={"color": SERIES[5], "width": 1.5}
            )  # fmt: skip
