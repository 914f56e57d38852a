"""Pictures of local consistency: estimates with their intervals beside the levels that chance and shuffles give."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moescope.core.figures import CHANCE, SERIES, heatmap
from moescope.core.result import Result
from moescope.routing.consistency.control_figures import CONTROLS, axis_title, controls, levels, place_names, points
from moescope.routing.grid import expert_grid


def draw(result: Result) -> go.Figure:
    """The figure that fits what was pooled."""
    frame = result.df()
    if "expert" in frame:
        return _experts(frame)
    frame = frame[frame["metric"] == "SRP"]
    segments = sorted(frame["segment"].unique())
    if not axis_title(frame):
        return _by_segment(frame, segments)
    figure, joined = go.Figure(), "layer" in frame
    for number, segment in enumerate(segments):
        part = frame[frame["segment"] == segment]
        names, colour = place_names(part), SERIES[number % len(SERIES)]
        name = f"{segment} tokens, as recorded" if len(segments) == 1 else f"{segment} tokens"
        points(figure, part, x=names, name=name, colour=colour, joined=joined)
        if len(segments) == 1:
            controls(figure, part, x=names, joined=joined)
        else:
            chance = f"chance, {segment} tokens"
            levels(figure, part["null"], x=names, name=chance, colour=colour, dash="dash", joined=joined)
    figure.update_xaxes(title=axis_title(frame), type="category")
    figure.update_yaxes(title="SRP (F1)", rangemode="tozero")
    return figure.update_layout(height=420)


def _by_segment(frame: pd.DataFrame, segments: list[int]) -> go.Figure:
    """Over segment lengths; for one length, the recorded value and each control side by side."""
    figure = go.Figure()
    if len(segments) == 1:
        points(figure, frame, x=["as recorded"], name="as recorded", colour=SERIES[0], joined=False)
        for column, (name, colour, dash) in CONTROLS.items():
            if column in frame:
                levels(
                    figure,
                    frame[column],
                    x=[name.replace("shuffled ", "shuffled<br>")],
                    name=name,
                    colour=colour,
                    dash=dash,
                )
        figure.add_hline(y=float(frame["null"].iloc[0]), line={"color": CHANCE, "dash": "dash", "width": 1})
        figure.update_layout(showlegend=False)
        figure.update_xaxes(title=f"order of tokens (windows of {segments[0]} tokens)")
    else:
        names = [str(segment) for segment in segments]
        points(figure, frame, x=names, name="as recorded", colour=SERIES[0], joined=True)
        controls(figure, frame, x=names, joined=True)
        figure.update_xaxes(title="tokens in a window")
    figure.update_xaxes(type="category")
    figure.update_yaxes(title="SRP (F1)", rangemode="tozero")
    return figure.update_layout(height=400)


def _experts(frame: pd.DataFrame) -> go.Figure:
    """Layer × expert: how far SRP lies above what the expert's load alone gives."""
    frame = frame[frame["segment"] == frame["segment"].iloc[0]]
    srp = frame[frame["metric"] == "SRP"].reset_index(drop=True)
    against = "null_shuffled" if "null_shuffled" in srp else "null"
    srp["above"] = srp["value"] - srp[against]
    values, rows, columns, fields = expert_grid(srp, "above", extra=("value", against, "null"))
    figure = heatmap(
        values,
        x=columns,
        y=rows,
        diverging=True,
        customdata=fields,
        colorbar="SRP − shuffled" if against != "null" else "SRP − binomial",
        hover="%{y}·%{x}<br>SRP %{customdata[0]:.3f}<br>shuffled over the run %{customdata[1]:.3f}, "
        "binomial %{customdata[2]:.3f}",
    )
    figure.update_xaxes(title=f"expert (windows of {int(frame['segment'].iloc[0])} tokens; 0 is chance)")
    figure.update_yaxes(title="layer")
    return figure
