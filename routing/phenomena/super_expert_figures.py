"""Figures of super experts: outputs by layer with the rules' thresholds, and the number by thresholds."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from moescope.core.figures import CHANCE, SERIES, TINT, heatmap, log_axis
from moescope.core.result import Result
from moescope.routing.grid import layer_name

_DASHES = ("dash", "dot", "dashdot", "longdash")


def draw_super_experts(result: Result) -> go.Figure:
    """Layer × largest expert output; every rule's threshold over its layers; super experts marked and named."""
    frame = result.df()
    top = frame[frame["metric"] == "largest of the layer"]
    median = frame[frame["metric"] == "median of the layer's experts"]
    names = [layer_name(int(r.layer), str(r.block)) for r in top.itertuples()]
    fields = np.stack([top[name].astype(float) for name in ("expert", "channel", "position")], axis=-1)
    figure = go.Figure(
        go.Scatter(
            x=names, y=top["value"], mode="lines+markers", name="largest of the layer", line={"color": SERIES[0]},
            customdata=fields,
            hovertemplate="%{x}·E%{customdata[0]:.0f}: %{y:,.4g}<br>channel %{customdata[1]:.0f}, position "
            "%{customdata[2]:.0f}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_scatter(
        x=names, y=median["value"], mode="lines", name="median expert of the layer", line={"color": SERIES[5]},
        hovertemplate="%{x}: %{y:,.4g}<extra></extra>",
    )  # fmt: skip
    ruled = frame[frame["round"] == 0]
    for number, (rule, part) in enumerate(ruled.groupby("rule", sort=False)):
        first = part.iloc[0]
        figure.add_scatter(
            x=names,
            y=[float(first["threshold"])] * len(names),
            mode="lines",
            name=f"threshold: {rule} ({'no layer' if first['candidates'] == 'none' else 'layers ' + first['candidates']})",
            line={"color": CHANCE, "dash": _DASHES[number % len(_DASHES)]},
            hovertemplate="%{y:,.4g}<extra></extra>",
        )
    found = ruled[ruled["super_expert"].fillna(False).astype(bool)]
    rules = found.groupby(["layer", "block", "expert"], sort=True)["rule"].agg("; ".join)
    once = found.drop_duplicates(["layer", "block", "expert"]).sort_values(["layer", "block", "expert"])
    if len(once):
        figure.add_scatter(
            x=[layer_name(int(r.layer), str(r.block)) for r in once.itertuples()],
            y=once["value"],
            mode="markers+text" if len(once) <= 12 else "markers",
            text=[f"E{r.expert}" if r.expert >= 0 else f"shared {-r.expert}" for r in once.itertuples()],
            textposition="middle right",
            cliponaxis=False,
            name="super expert",
            marker={
                "color": SERIES[1],
                "size": 13,
                "symbol": "circle-open",
                "line": {"width": 2.5, "color": SERIES[1]},
            },
            customdata=np.stack(
                [once["expert"].astype(str), rules.to_numpy(), once["margin"].map("{:,.3g}".format)], axis=-1
            ),
            hovertemplate="%{x}·%{customdata[0]}: %{y:,.4g}<br>by %{customdata[1]}<br>%{customdata[2]}× the threshold of the first"
            "<extra></extra>",
        )
    figure.update_xaxes(
        title="layer", type="category", categoryorder="array", categoryarray=names, nticks=min(len(names), 32)
    )
    log_axis(
        figure, title="max |expert output| (log scale)", values=[*top["value"], *median["value"], *ruled["threshold"]]
    )
    figure.update_layout(height=440)
    return figure


def draw_sensitivity(result: Result) -> go.Figure:
    """Number of super experts, percentile × fraction."""
    frame = result.df()
    cells = frame[frame["metric"] == "super experts"]
    counts = cells.pivot_table(index="percentile", columns="fraction", values="value", aggfunc="first")
    thresholds = cells.pivot_table(index="percentile", columns="fraction", values="threshold", aggfunc="first")
    figure = heatmap(
        counts.to_numpy(np.float64),
        x=[f"{fraction:g}" for fraction in counts.columns],
        y=[f"P{percentile:g}" for percentile in counts.index],
        hover="%{y}, %{x} of the largest: %{z:.0f} super experts<br>a > %{customdata[0]:,.4g}",
        colorbar="super experts",
        customdata=thresholds.to_numpy(np.float64)[..., None],
    )
    step = max(1, int(counts.to_numpy().max() - counts.to_numpy().min()) // 5)
    figure.update_traces(
        text=counts.to_numpy().astype(int),
        texttemplate="%{text}",
        colorbar={"dtick": step},
        colorscale=[list(at) for at in TINT],
    )
    figure.update_xaxes(title="fraction of the largest output", showgrid=False)
    figure.update_yaxes(title="percentile of A", showgrid=False)
    figure.update_layout(height=400)
    return figure
