"""Figures of effects: the intervention and its controls, each with its interval, on one scale a unit."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.routing.effects.metric_names import metric_name

_OFFSET = 0.2
_LINE, _GAP = 44, 76  # pixels of a metric's line, and between panels
_AXES = {"nats": "nats per token", "share": "share", "tokens": "tokens"}


def draw_effect(result: Result) -> go.Figure:
    """One panel a unit; a line a metric: the intervention above, its controls below."""
    from plotly.subplots import make_subplots

    frame = result.df()
    frame = frame[(frame["kind"] != "difference") & ~frame["metric"].str.startswith("base_")]
    panels = list(dict.fromkeys(frame["unit"]))
    metrics = {unit: list(dict.fromkeys(frame.loc[frame["unit"] == unit, "metric"])) for unit in panels}
    lines = sum(len(names) for names in metrics.values())
    plot_height = max(200, _LINE * lines + _GAP * (len(panels) - 1))
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        row_heights=[len(metrics[unit]) for unit in panels],
        vertical_spacing=_GAP / plot_height if len(panels) > 1 else 0,
    )
    for number, unit in enumerate(panels, start=1):
        names = metrics[unit]
        place = {metric: len(names) - 1 - n for n, metric in enumerate(names)}
        part = frame[frame["unit"] == unit]
        for kind, offset in (("target", _OFFSET), ("control", -_OFFSET)):
            rows = part[part["kind"] == kind]
            if len(rows):
                trace = _points(rows, [place[m] + offset for m in rows["metric"]], kind, shown=number == 1)
                figure.add_trace(trace, row=number, col=1)
        figure.add_vline(x=0, line={"color": CHANCE, "width": 1, "dash": "dash"}, row=number, col=1)
        figure.update_xaxes(title={"text": plain(_AXES.get(unit, unit)), "standoff": 4}, row=number, col=1)
        figure.update_yaxes(
            tickvals=list(place.values()),
            ticktext=[plain(metric_name(metric)) for metric in names],
            range=[-0.6, len(names) - 0.4],
            row=number,
            col=1,
        )
    figure.update_layout(height=190 + plot_height)
    return figure


def _points(rows: pd.DataFrame, places: list[float], kind: str, *, shown: bool) -> go.Scatter:
    target = kind == "target"
    value = rows["value"]
    low, high = rows["ci_low"].fillna(value), rows["ci_high"].fillna(value)
    return go.Scatter(
        x=value,
        y=places,
        mode="markers",
        name="intervention" if target else "matched random control",
        legendgroup=kind,
        showlegend=shown,
        marker={"color": SERIES[1] if target else CHANCE, "size": 10 if target else 7, "opacity": 1 if target else 0.7},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": high - value,
            "arrayminus": value - low,
            "thickness": 2 if target else 1,
            "width": 4 if target else 2,
        },
        customdata=[[metric_name(m), a, b, n] for m, a, b, n in zip(rows["metric"], low, high, rows["n"], strict=True)],
        hovertemplate="%{customdata[0]}: %{x:.4g} (%{customdata[1]:.4g} to %{customdata[2]:.4g})<br>n = %{customdata[3]:,}"
        "<extra></extra>",
    )


def draw_groups(result: Result) -> go.Figure:
    """One panel a grouping; a line a group: the intervention with its interval over the range of its controls."""
    from plotly.subplots import make_subplots

    frame = result.df()
    kinds = list(dict.fromkeys(frame["group_kind"]))
    sizes = [int((frame["group_kind"] == kind).sum()) for kind in kinds]
    figure = make_subplots(
        rows=len(kinds), cols=1, shared_xaxes=True, row_heights=sizes, vertical_spacing=0.25 / (len(kinds) + 1)
    )
    for number, kind in enumerate(kinds, start=1):
        part = frame[frame["group_kind"] == kind].iloc[::-1]
        names = [plain(str(group)) for group in part["group"]]
        spread = part["control_low"].notna()
        if spread.any():
            figure.add_trace(
                go.Bar(
                    y=[name for name, there in zip(names, spread, strict=True) if there],
                    x=(part["control_high"] - part["control_low"])[spread],
                    base=part["control_low"][spread],
                    orientation="h",
                    marker={"color": CHANCE, "opacity": 0.4, "line": {"color": CHANCE, "width": 2}},
                    name="range of the controls",
                    legendgroup="controls",
                    showlegend=number == 1,
                    hovertemplate="%{y}: controls from %{base:.4g}<extra></extra>",
                ),
                row=number,
                col=1,
            )
        figure.add_trace(_group_points(part, names, shown=number == 1), row=number, col=1)
        figure.add_vline(x=0, line={"color": CHANCE, "width": 1, "dash": "dash"}, row=number, col=1)
        figure.update_yaxes(
            title={
                "text": {"all": "", "label": "label", "position": "position", "class": "token class"}.get(kind, kind)
            },
            type="category",
            categoryorder="array",
            categoryarray=names,
            row=number,
            col=1,
        )
    metric, unit = str(frame["metric"].iloc[0]), str(frame["unit"].iloc[0])
    figure.update_xaxes(range=_range(frame))
    figure.update_xaxes(title=f"{plain(metric_name(metric))} ({plain(unit)})", row=len(kinds), col=1)
    figure.update_layout(height=max(320, min(1200, 190 + 26 * sum(sizes))), barmode="overlay")
    return figure


def _group_points(part: pd.DataFrame, names: list[str], *, shown: bool) -> go.Scatter:
    value = part["value"]
    low, high = part["ci_low"].fillna(value), part["ci_high"].fillna(value)
    return go.Scatter(
        x=value,
        y=names,
        mode="markers",
        name="intervention",
        legendgroup="target",
        showlegend=shown,
        marker={"color": SERIES[1], "size": 9},
        error_x={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 2},
        customdata=part[["ci_low", "ci_high", "n"]].to_numpy(),
        hovertemplate="%{y}: %{x:.4g} (%{customdata[0]:.4g} to %{customdata[1]:.4g})<br>n = %{customdata[2]:,}<extra></extra>",
    )


def draw_ranking(result: Result) -> go.Figure:
    """The largest effects, with their intervals and the range of their controls."""
    frame = result.df()
    shown = frame.drop_duplicates("effect_id").head(30).iloc[::-1]
    # Two interventions may have the same words: the beginning of the id keeps their lines apart.
    names = [plain(f"{r.intervention} · {str(r.effect_id)[-4:]}") for r in shown.itertuples()]
    figure = go.Figure()
    spread = shown["control_low"].notna()
    if spread.any():
        figure.add_bar(
            y=[name for name, there in zip(names, spread, strict=True) if there],
            x=(shown["control_high"] - shown["control_low"])[spread],
            base=shown["control_low"][spread],
            orientation="h",
            marker={"color": CHANCE, "opacity": 0.4, "line": {"color": CHANCE, "width": 2}},
            name="range of the controls",
            hovertemplate="%{y}: controls from %{base:.4g}<extra></extra>",
        )
    figure.add_trace(_group_points(shown, names, shown=True))
    figure.add_vline(x=0, line={"color": CHANCE, "width": 1, "dash": "dash"})
    metric, unit = str(frame["metric"].iloc[0]), str(frame["unit"].iloc[0])
    figure.update_xaxes(title=f"{plain(metric_name(metric))} ({plain(unit)})", range=_range(shown))
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names)
    figure.update_layout(height=max(440, 170 + 26 * len(names)), barmode="overlay")
    return figure


def _range(frame: pd.DataFrame) -> list[float]:
    """Limits of the axis: the interventions and their intervals, with controls as far as they do not dwarf these."""
    own = [0.0, *(float(x) for name in ("value", "ci_low", "ci_high") for x in frame[name].dropna())]
    both = [*own, *(float(x) for name in ("control_low", "control_high") for x in frame[name].dropna())]
    span = (max(own) - min(own)) or 1e-9
    low, high = max(min(both), min(own) - span), min(max(both), max(own) + span)
    return [low - 0.05 * span, high + 0.05 * span]
