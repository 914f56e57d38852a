"""The atlas as a heat map: a row a layer, with how uneven each layer is beside it and the profile over layers above it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.core.figures import CHANCE, SERIES, heatmap, plain
from moescope.core.result import Result
from moescope.routing.grid import layer_name

if TYPE_CHECKING:
    from moescope.routing.experts.measures import Measure

_VALUE, _DEAD = "value", "never chosen"
# Share of the width that the map takes; the rest is the margin beside it.
_WIDE, _GAP = 0.92, 0.02
# Pixels: a row of a small and of a large model, the margin above the map, the gap below that.
_CELL, _LARGE, _ABOVE, _BELOW = 34, 8.25, 48, 10
_LEAST, _MOST = 150, 528
_MARGINS = 92


def draw(result: Result, measure: Measure, *, signed: bool) -> go.Figure:
    """The figure of an atlas.

    Args:
        result: of `expert_atlas`.
        measure: what is shown.
        signed: colours are centred on 0.
    """
    frame = result.df()
    sort = str(result.parameters.get("sort", "index"))
    cells = frame[frame["expert"].notna()]
    rows, columns, grids = _grids(cells, sort)
    values = grids["value"].astype(float)
    figure = heatmap(
        values,
        x=columns,
        y=rows,
        hover="%{y}·%{text}<br>%{z:.4g}" if sort != "index" else "%{y}·%{x}<br>%{z:.4g}",
        colorbar=measure.unit if not result.parameters.get("other") else f"difference, {measure.unit}",
        diverging=signed,
    )
    cell = figure.data[0]
    cell.name = measure.title
    cell.meta = {"unit": measure.unit, "counted": str(result.units.get("n", ""))}
    cell.customdata = _fields(grids)
    cell.hovertemplate = str(cell.hovertemplate).replace("<extra>", "<br>%{customdata[0]}<extra>")
    if sort != "index":
        cell.text = [[f"E{int(e)}" if np.isfinite(e) else "" for e in row] for row in grids["expert"].astype(float)]
    _marks(figure, rows, columns, grids["state"], values)
    _beside(figure, frame, columns)
    _axes(figure, rows, columns, sort)
    return figure


def _grids(cells: pd.DataFrame, sort: str) -> tuple[list[str], list[str], dict[str, NDArray[Any]]]:
    """Row names, column names, and value, state, expert, detail and n as [row, place]."""
    places = sorted({(int(a), str(b)) for a, b in zip(cells["layer"], cells["block"], strict=True)})
    number = {place: i for i, place in enumerate(places)}
    row = [number[int(a), str(b)] for a, b in zip(cells["layer"], cells["block"], strict=True)]
    column = cells["place"].astype(int).to_numpy()
    shape = (len(places), int(column.max()) + 1)
    grids: dict[str, NDArray[Any]] = {}
    for name in ("value", "state", "expert", "detail", "n"):
        text = name in ("state", "detail")
        grid = np.full(shape, "" if text else np.nan, dtype=object if text else float)
        grid[row, column] = cells[name].to_numpy() if text else cells[name].astype(float).to_numpy()
        grids[name] = grid
    letters = "E" if sort == "index" else "#"
    first = 0 if sort == "index" else 1
    return [layer_name(*p) for p in places], [f"{letters}{i + first}" for i in range(shape[1])], grids


def _fields(grids: dict[str, NDArray[Any]]) -> list[list[list[Any]]]:
    """What hovering tells besides the value: state or detail, and n."""
    fields = []
    for states, details, ns in zip(grids["state"], grids["detail"], grids["n"], strict=True):
        told = [plain(str(d)) if s == _VALUE else s for s, d in zip(states, details, strict=True)]
        fields.append(
            [[text, int(n) if np.isfinite(n) else None] for text, n in zip(told, ns.astype(float), strict=True)]
        )
    return fields


def _marks(
    figure: go.Figure, rows: list[str], columns: list[str], states: NDArray[Any], values: NDArray[np.float64]
) -> None:
    """Glyphs: never chosen, not recorded, beyond the limits of the colours."""
    small = len(columns) > 64 or len(rows) > 32
    low, high = float(figure.data[0].zmin), float(figure.data[0].zmax)
    light, dark = "#ffffff", "#1a1b1e"
    diverging = figure.data[0].zmid is not None
    missing = (states != _VALUE) & (states != _DEAD) & (states != "")
    if missing.any():
        figure.add_heatmap(
            z=np.where(missing, 1.0, np.nan),
            x=columns,
            y=rows,
            colorscale=[[0, CHANCE], [1, CHANCE]],
            opacity=0.35,
            showscale=False,
            hoverinfo="skip",
            xgap=figure.data[0].xgap,
            ygap=figure.data[0].ygap,
        )
    with np.errstate(invalid="ignore"):
        above, below = values > high, values < low
    kinds = (
        (_DEAD, states == _DEAD, "x-thin", SERIES[1], 3 if small else 10),
        ("above the scale", above, "triangle-up", light if diverging else dark, 3 if small else 7),
        ("below the scale", below, "triangle-down", light, 3 if small else 7),
        *((state, states == state, "square", CHANCE, 0) for state in sorted(set(states[missing].tolist()))),
    )
    for name, where, symbol, colour, size in kinds:
        at = np.argwhere(where)
        if not len(at):
            continue
        drawn = at if size else at[:0]
        figure.add_scatter(
            x=[columns[j] for _, j in drawn] or [None],
            y=[rows[i] for i, _ in drawn] or [None],
            mode="markers",
            name=f"{name} ({len(at):,})",
            marker={
                "symbol": symbol,
                "color": colour,
                "size": size or 10,
                "line": {
                    "width": 2 if symbol == "x-thin" else 0.5,
                    "color": colour if symbol == "x-thin" else "#868e96",
                },
            },
            hoverinfo="skip",
        )


def _beside(figure: go.Figure, frame: pd.DataFrame, columns: list[str]) -> None:
    """Right of the map how uneven each layer is, above it the mean over layers."""
    layers = frame[frame["layer"].notna() & frame["expert"].isna()]
    profile = frame[frame["layer"].isna()].sort_values("place")
    kind = str(layers["metric"].iloc[0])
    largest = float(layers["value"].max())
    figure.add_bar(
        x=layers["value"].astype(float),
        y=[layer_name(int(a), str(b)) for a, b in zip(layers["layer"], layers["block"], strict=True)],
        orientation="h",
        xaxis="x2",
        yaxis="y",
        marker_color=CHANCE,
        name=kind,
        hovertemplate=f"%{{y}}: {kind} %{{x:.3f}}<extra></extra>",
        showlegend=False,
    )
    figure.add_bar(
        x=[columns[int(place)] for place in profile["place"]],
        y=profile["value"].astype(float),
        xaxis="x",
        yaxis="y2",
        marker_color=CHANCE,
        name="mean over layers",
        hovertemplate="%{x}: mean over layers %{y:.4g}<extra></extra>",
        showlegend=False,
    )
    figure.update_layout(
        bargap=0.15,
        xaxis2={
            "domain": [_WIDE + _GAP / 2, 1],
            "anchor": "y",
            "title": "Gini" if "Gini" in kind else "σ",
            # The largest alone: the zero would run into the name of the last expert.
            "tickvals": [largest],
            "ticktext": [f"{largest:.2g}"],
            "tickangle": 0,
        },
        yaxis2={"anchor": "x", "title": "mean", "nticks": 3},
    )


def _axes(figure: go.Figure, rows: list[str], columns: list[str], sort: str) -> None:
    height = max(_LEAST, min(_MOST, _CELL * len(rows))) if len(rows) <= 64 else _LARGE * len(rows)
    whole = height + _ABOVE + _BELOW
    high = height / whole
    every, layers = (32 if len(columns) > 64 else 8 if len(columns) > 32 else 1), 8 if len(rows) > 24 else 1
    first = int(sort != "index")
    shown = [n for i, n in enumerate(columns) if every == 1 or ((i + first) % every == 0 and i < 0.97 * len(columns))]
    words = {
        "index": "expert",
        "load": "experts of each layer, busiest first",
        "similarity": "experts of each layer, alike ones together",
    }
    figure.update_layout(
        height=round(whole) + _MARGINS,
        xaxis={
            "domain": [0, _WIDE],
            "title": words[sort],
            "tickmode": "array",
            "tickvals": shown,
            "range": [-0.5, len(columns) - 0.5],
            "showgrid": False,
        },
        yaxis={
            "domain": [0, high],
            "title": "layer",
            "tickmode": "array",
            "tickvals": rows[::layers],
            "autorange": False,
            "range": [len(rows) - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
        },
    )
    figure.update_layout(yaxis2_domain=[1 - _ABOVE / whole, 1])
    figure.data[0].colorbar.update(len=high, y=high / 2, yanchor="middle", x=1.01)
