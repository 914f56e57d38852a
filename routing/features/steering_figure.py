"""The figure of a dose-response of steering: target and costs against strength, with the band of the controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from moescope.core.figures import CHANCE, SERIES

if TYPE_CHECKING:
    from moescope.core.result import Result

_PANELS = (("target effect", "target effect"), ("KL", "KL"), ("Δrepetition", "Δrepetition"))


def draw(result: Result) -> go.Figure:
    """A panel a metric; the line is the steering with its interval, the grey band its controls."""
    from plotly.subplots import make_subplots

    frame = result.df()
    shown = [(metric, title) for metric, title in _PANELS if (frame["metric"] == metric).any()]
    figure = make_subplots(rows=1, cols=len(shown), horizontal_spacing=0.12)
    for column, (metric, title) in enumerate(shown, start=1):
        part = frame[frame["metric"] == metric].sort_values("strength")
        if part["controls"].max() and part["control_low"].notna().any():
            _band(figure, part, column)
        figure.add_trace(
            go.Scatter(
                x=part["strength"], y=part["value"], mode="lines+markers", line={"color": SERIES[0]}, name="steered",
                showlegend=column == 1,
                error_y={
                    "type": "data", "symmetric": False, "array": part["ci_high"] - part["value"],
                    "arrayminus": part["value"] - part["ci_low"], "thickness": 1,
                },
                hovertemplate=f"{metric} at × %{{x}}: %{{y:.4g}}<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
        figure.add_hline(y=0, line={"color": CHANCE, "dash": "dash", "width": 1}, row=1, col=column)
        figure.update_xaxes(title="strength (× the edits' own)", row=1, col=column)
        figure.update_yaxes(title=f"{title} ({result.units[f'value[{metric}]']})", row=1, col=column)
    figure.update_layout(height=400)
    return figure


def _band(figure: go.Figure, part: pd.DataFrame, column: int) -> None:
    """Smallest to largest control at each strength, and their mean."""
    around = pd.concat([part["strength"], part["strength"][::-1]])
    edge = pd.concat([part["control_high"], part["control_low"][::-1]])
    figure.add_trace(
        go.Scatter(
            x=around, y=edge, fill="toself", mode="lines", line={"width": 0}, fillcolor="rgba(134,142,150,0.25)",
            hoverinfo="skip", name="controls, smallest to largest", showlegend=column == 1,
        ),
        row=1, col=column,
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=part["strength"], y=part["null"], mode="lines", line={"color": CHANCE, "dash": "dot"},
            name="mean of controls", showlegend=column == 1,
            hovertemplate="controls at × %{x}: %{y:.4g}<extra></extra>",
        ),
        row=1, col=column,
    )  # fmt: skip
