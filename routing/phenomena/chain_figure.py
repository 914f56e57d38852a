"""The figure of the chain: four nodes from left to right, and at every arrow what remains once it is cut."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.core.figures import CHANCE, SERIES, plain, wrapped
from moescope.core.result import Result

_NODES = ("writer", "massive activation", "sink", "heads")
_TITLES = ("Writer", "Massive activation", "Attention sink", "Retrieval heads")
_X = (0.0, 1.0, 2.0, 3.0)
_HALF, _TOP, _BOTTOM = 0.41, 1.0, 0.42
# Arrow → (what remains, of it the cuts that are told: link and words).
_ARROWS = (
    ("massive activation that remains", (("writer", "writer cut"),)),
    ("attention to first tokens that remains", (("writer", "writer cut"), ("massive to zero", "activation to 0"))),
    ("induction score that remains", (("writer", "writer cut"), ("massive to zero", "activation to 0"))),
)
_CUTS = (
    ("writer", "writer cut"),
    ("massive to zero", "activation to 0"),
    ("massive to mean", "activation to its mean"),
    ("heads", "heads cut"),
)


def draw_chain(result: Result) -> go.Figure:
    """Writer → massive activation → sink → heads; below it, what each cut costs in nats beside its controls."""
    frame = result.df()
    figure = go.Figure()
    for number, node in enumerate(_NODES):
        _node(figure, number, frame[frame["node"] == node].iloc[0])
    for number, (metric, cuts) in enumerate(_ARROWS):
        _arrow(figure, number, frame, metric, cuts)
    _losses(figure, frame)
    figure.update_layout(
        xaxis={"visible": False, "range": [-0.45, 3.45], "fixedrange": True, "anchor": "y"},
        yaxis={"visible": False, "range": [0.05, 1.05], "domain": [0.46, 1.0], "fixedrange": True},
        height=560,
        showlegend=True,
        legend={"y": -0.18},
    )
    return figure


def _node(figure: go.Figure, number: int, row: pd.Series) -> None:
    x, missing = _X[number], str(row["what"]).startswith(("none found", "not measured"))
    colour = CHANCE if missing else SERIES[number]
    figure.add_shape(
        type="rect", x0=x - _HALF, x1=x + _HALF, y0=_BOTTOM, y1=_TOP,
        line={"color": colour, "width": 2, "dash": "dot" if missing else "solid"},
        fillcolor="rgba(0,0,0,0.02)",
    )  # fmt: skip
    lines = [f"<b>{_TITLES[number]}</b>", *(wrapped(plain(line), 22) for line in _lines(number, row))]
    figure.add_annotation(x=x, y=(_TOP + _BOTTOM) / 2, text="<br>".join(lines), showarrow=False, font={"size": 12})


def _lines(number: int, row: pd.Series) -> list[str]:
    what = str(row["what"])
    if number == 0:
        parts = what.split(", ")
        found = [*parts[:4], *([f"and {len(parts) - 4} more"] if len(parts) > 4 else [])]
        return found + (
            [f"|output| up to {row['value']:,.4g}"] if pd.notna(row["value"]) and what != "none found" else []
        )
    if number == 1:
        if what == "none found":
            return [what, f"largest |x|: {row['value']:,.4g}"]
        return [f"|x| up to {row['value']:,.5g}", f"channel {row['channel']}, {what}", f"from block {row['layer']} on"]
    if number == 2:
        return [f"α₀ = {row['value']:.2f}" if pd.notna(row["value"]) else "", what]
    if pd.isna(row["value"]) or not row["value"]:
        return [what]
    kind, _, names = what.partition(": ")
    return [f"{row['value']:.0f} heads", kind.replace(" of at least ", " ≥ "), *names.split(", ")]


def _arrow(figure: go.Figure, number: int, frame: pd.DataFrame, metric: str, cuts: tuple[tuple[str, str], ...]) -> None:
    start, end = _X[number] + _HALF, _X[number + 1] - _HALF
    figure.add_annotation(
        x=end, y=0.71, ax=start, ay=0.71, xref="x", yref="y", axref="x", ayref="y", showarrow=True, arrowhead=3, arrowwidth=2,
        arrowcolor=CHANCE, text="",
    )  # fmt: skip
    lines = []
    for link, words in cuts:
        found = frame[(frame["node"] == link) & (frame["metric"] == metric)]
        if len(found):
            row = found.iloc[0]
            control = f"<br>random cuts: {row['null']:.1%}" if pd.notna(row["null"]) else ""
            lines.append(f"{words}: <b>{row['value']:.1%}</b> remains{control}")
    text = "<br>".join(lines) if lines else "not cut"
    figure.add_annotation(
        x=(_X[number] + _X[number + 1]) / 2, y=0.22, text=text, showarrow=False, font={"size": 11}, yanchor="middle"
    )


def _losses(figure: go.Figure, frame: pd.DataFrame) -> None:
    """ΔNLL of each cut with its interval, and the range of its controls."""
    found = [(words, _first(frame, link, "ΔNLL")) for link, words in _CUTS]
    shown = [(words, row) for words, row in found if row is not None]
    names = [words for words, _ in shown] or ["no link cut"]
    values = [float(row["value"]) for _, row in shown]
    above = [_distance(row["ci_high"], row["value"]) for _, row in shown]
    below = [_distance(row["value"], row["ci_low"]) for _, row in shown]
    figure.add_scatter(
        y=names, x=values if values else [np.nan], xaxis="x2", yaxis="y2", mode="markers", name="ΔNLL of the cut, 95 % interval",
        marker={"color": SERIES[1], "size": 10},
        error_x={"type": "data", "array": above, "arrayminus": below, "color": SERIES[1], "thickness": 2},
        hovertemplate="%{y}: ΔNLL %{x:+.4g} nats<extra></extra>",
    )  # fmt: skip
    controls = [row for _, row in shown if pd.notna(row["null"])]
    if controls:
        figure.add_scatter(
            y=[words for words, row in shown if pd.notna(row["null"])], x=[float(row["null"]) for row in controls],
            xaxis="x2", yaxis="y2", mode="markers", name="random cuts, mean and range",
            marker={"color": CHANCE, "size": 9, "symbol": "diamond"},
            error_x={
                "type": "data", "array": [_distance(row["null_high"], row["null"]) for row in controls],
                "arrayminus": [_distance(row["null"], row["null_low"]) for row in controls], "color": CHANCE,
            },
            hovertemplate="%{y}, at random: %{x:+.4g} nats<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        xaxis2={
            "title": {"text": "ΔNLL (nats)"},
            "anchor": "y2",
            "zeroline": True,
            "zerolinecolor": CHANCE,
            "domain": [0.16, 0.98],
        },
        yaxis2={"domain": [0.0, 0.33], "anchor": "x2", "type": "category", "autorange": "reversed"},
    )


def _first(frame: pd.DataFrame, link: str, metric: str) -> pd.Series | None:
    found = frame[(frame["node"] == link) & (frame["metric"] == metric)]
    return None if found.empty else found.iloc[0]


def _distance(high: float, low: float) -> float:
    return float(high - low) if np.isfinite(high) and np.isfinite(low) else 0.0
