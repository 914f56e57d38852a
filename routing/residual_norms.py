"""Residual norms: how the stream grows from layer to layer."""

from __future__ import annotations

import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.figures import SERIES, log_axis
from moescope.core.result import Result
from moescope.store.run import Run

_SQL = """
    SELECT
        r.layer,
        median(r.norm)::DOUBLE AS value,
        quantile_cont(r.norm, 0.05)::DOUBLE AS p5,
        quantile_cont(r.norm, 0.95)::DOUBLE AS p95,
        max(r.norm)::DOUBLE AS largest,
        avg(r.norm) FILTER (WHERE t.position = 0)::DOUBLE AS first_token,
        count(*) AS n
    FROM residual r
    JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
    WHERE r.run_id = $run AND isfinite(r.norm)
    GROUP BY r.layer
    ORDER BY r.layer
"""


@analysis(
    name="residual_norms", needs=("residual",), source="L2 norm of the block's output", section="residual", order=10
)
def residual_norms(run: Run) -> Result:
    """How large is the residual stream after each layer, and does its first token stand out?

    Median and the 5th and 95th percentile over tokens of the L2 norm at each block's output, with the mean over first tokens.
    """
    frame = run.sql(_SQL).df()
    if frame.empty:
        raise InputError(
            f"run {run.name!r} has no finite residual norm", found="only NaN or infinity: the model overflowed"
        )
    frame.insert(1, "metric", "median L2 norm")
    first, last = frame.iloc[0], frame.iloc[-1]
    peak = frame.loc[(frame["first_token"] / frame["value"]).idxmax()]
    title = (
        f"The residual norm goes from {first['value']:,.3g} after layer {first['layer']:.0f} to "
        f"{last['value']:,.3g} after layer {last['layer']:.0f} (medians); "
        f"first tokens reach {peak['first_token'] / peak['value']:,.1f}× the median, after layer {peak['layer']:.0f}"
    )
    return Result(
        title=title,
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(frame["n"].sum()),
        n_unit="token × layer pairs",
        definition="L2 norm of the residual stream at each block's output: median, 5th and 95th "
        "percentile and maximum over tokens; mean over first tokens.",
        units=dict.fromkeys(("value", "p5", "p95", "largest", "first_token"), "L2 norm"),
        sql=_SQL,
        sql_parameters={"run": run.run_id},
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    figure = go.Figure()
    figure.add_scatter(
        x=frame["layer"], y=frame["p95"], mode="lines", line={"width": 0}, showlegend=False, hoverinfo="skip"
    )
    figure.add_scatter(
        x=frame["layer"],
        y=frame["p5"],
        mode="lines",
        line={"width": 0},
        fill="tonexty",
        fillcolor="rgba(0,114,178,0.18)",
        name="5th to 95th percentile",
        hoverinfo="skip",
    )
    lines = (
        ("value", "median token", SERIES[0], "solid"),
        ("first_token", "first tokens (mean)", SERIES[1], "dash"),
        ("largest", "largest token", SERIES[3], "dot"),
    )
    for column, name, colour, dash in lines:
        figure.add_scatter(
            x=frame["layer"],
            y=frame[column],
            mode="lines+markers",
            name=name,
            line={"color": colour, "dash": dash},
            hovertemplate=f"{name} after layer %{{x}}: %{{y:,.4g}}<extra></extra>",
        )
    low, high = int(frame["layer"].min()), int(frame["layer"].max())
    figure.update_xaxes(title="layer", tick0=low, dtick=max(1, len(frame) // 16), range=[low - 0.5, high + 0.5])
    log_axis(figure, title="L2 norm (log scale)", values=[*frame["p5"], *frame["largest"]])
    figure.update_layout(height=400)
    return figure
