"""Figure of a head circuit: all heads as a map with its members outlined, and what the task loses and keeps by them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moescope.core.figures import CHANCE, SEQUENTIAL, SERIES
from moescope.core.result import Result
from moescope.routing.grid import layer_name

_WORDS = {
    "base": "as<br>it is",
    "circuit at its mean": "circuit<br>cut",
    "all other heads at their mean": "circuit<br>alone",
    "all heads at their mean": "all heads<br>cut",
}


def draw_circuit(result: Result) -> go.Figure:
    """Left, codes that only positives have, by layer and head, members outlined; right, logit differences with random sets."""
    frame = result.df()
    heads = frame[frame["metric"] == "codes"]
    cuts = frame[(frame["metric"] == "logit difference") & frame["condition"].isin(list(_WORDS))]
    figure = make_subplots(
        cols=2, column_widths=[0.56, 0.44], horizontal_spacing=0.2,
        subplot_titles=["codes on positives only", "logit difference, other prompts"],
    )  # fmt: skip
    _map(figure, heads)
    if len(cuts):
        _bars(figure, cuts.set_index("condition").reindex([c for c in _WORDS if c in set(cuts["condition"])]))
    else:
        figure.update_xaxes(visible=False, row=1, col=2)
        figure.update_yaxes(visible=False, row=1, col=2)
    figure.update_layout(height=480)
    return figure


def _map(figure: go.Figure, heads: pd.DataFrame) -> None:
    places = sorted({(int(r.layer), str(r.block)) for r in heads.itertuples()})
    row = {place: number for number, place in enumerate(places)}
    shape = (len(places), int(heads["head"].max()) + 1)
    grid, extra = np.full(shape, np.nan), np.full((*shape, 2), np.nan)
    for r in heads.itertuples():
        at = row[int(r.layer), str(r.block)], int(r.head)
        grid[at], extra[at] = float(r.value), (r.null, r.p)
    names = [layer_name(layer, "mlp" if block == "attn" else block) for layer, block in places]
    columns = [f"H{head}" for head in range(grid.shape[1])]
    figure.add_trace(
        go.Heatmap(
            z=grid, x=columns, y=names, customdata=extra, colorscale=SEQUENTIAL, zmin=0, xgap=1, ygap=1,
            colorbar={"title": {"text": "codes", "side": "right"}, "thickness": 12, "x": 0.46},
            hovertemplate="%{y}·%{x}: %{z:.0f} codes, sides shuffled %{customdata[0]:.1f}, p %{customdata[1]:.3f}<extra></extra>",
        ),
        row=1, col=1,
    )  # fmt: skip
    members = heads[heads["member"].fillna(False).astype(bool)]
    if len(members):
        figure.add_trace(
            go.Scatter(
                x=[columns[int(h)] for h in members["head"]],
                y=[names[row[int(r.layer), str(r.block)]] for r in members.itertuples()],
                mode="markers", name="of the circuit", hoverinfo="skip",
                marker={"symbol": "square-open", "size": 11, "color": SERIES[1], "line": {"width": 2}},
            ),
            row=1, col=1,
        )  # fmt: skip
    figure.update_xaxes(title="head", type="category", nticks=16, row=1, col=1)
    figure.update_yaxes(title="layer", type="category", autorange="reversed", nticks=16, row=1, col=1)


def _bars(figure: go.Figure, cuts: pd.DataFrame) -> None:
    names = [_WORDS[str(condition)] for condition in cuts.index]
    value, low, high = (cuts[name].astype(float).to_numpy() for name in ("value", "ci_low", "ci_high"))
    figure.add_trace(
        go.Bar(
            x=names, y=value, marker={"color": SERIES[0]}, name="the circuit",
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
            hovertemplate="%{x}: %{y:.3f} logits<extra></extra>",
        ),
        row=1, col=2,
    )  # fmt: skip
    random = cuts[cuts["null"].notna()]
    if len(random):
        middle = random["null"].astype(float).to_numpy()
        figure.add_trace(
            go.Scatter(
                x=[_WORDS[str(condition)] for condition in random.index], y=middle, mode="markers", name="random heads, mean and range",
                marker={"color": CHANCE, "symbol": "diamond", "size": 10},
                error_y={
                    "type": "data", "symmetric": False, "array": random["null_high"].astype(float) - middle,
                    "arrayminus": middle - random["null_low"].astype(float), "color": CHANCE, "thickness": 2,
                },
                hovertemplate="%{x}, random heads: %{y:.3f} logits<extra></extra>",
            ),
            row=1, col=2,
        )  # fmt: skip
    figure.update_xaxes(tickangle=0, row=1, col=2)
    figure.update_yaxes(title="logits", row=1, col=2)
