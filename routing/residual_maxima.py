"""Residual maxima: the largest activations of the stream, layer by layer."""

from __future__ import annotations

import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, log_axis
from moescope.core.result import Result
from moescope.routing.context import around, pieces
from moescope.store.run import Run

_SQL = """
    WITH ranked AS (
        SELECT
            r.layer, r.token, r.top_values[1]::DOUBLE AS value, r.top_channels[1] AS channel, t.sequence_id, t.position,
            abs(r.top_values[1]) / m.median_abs AS ratio,
            row_number() OVER (PARTITION BY r.layer ORDER BY abs(r.top_values[1]) DESC, r.token) AS rank,
            count(*) OVER (PARTITION BY r.layer) AS n,
            count(*) FILTER (abs(r.top_values[1]) > 100 AND abs(r.top_values[1]) >= 1000 * m.median_abs)
                OVER (PARTITION BY r.layer) AS massive_tokens,
            m.median_abs::DOUBLE AS median_abs
        FROM residual r
        JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
        JOIN residual_sequences m ON m.run_id = r.run_id AND m.sequence_id = t.sequence_id AND m.layer = r.layer
        WHERE r.run_id = $run AND isfinite(r.top_values[1]) AND isfinite(m.median_abs)
    )
    SELECT * FROM ranked WHERE rank <= $top ORDER BY layer, rank
"""


@analysis(
    name="residual_maxima",
    needs=("residual", "residual_sequences"),
    source="arXiv 2402.17762; constants as in arXiv 2503.22329: |x| > 100 and ≥ 1000 × the median |x| of the layer",
    section="residual",
    order=20,
)
def residual_maxima(run: Run, *, top: Count = 3) -> Result:
    """Where are the largest residual activations, and are they massive?

    The tokens with the largest |x| at each block's output, with channel and the ratio to the median |x| of their sequence at
    that layer. An activation is massive where |x| > 100 and the ratio is at least 1000.

    Args:
        top: tokens shown a layer.
    """
    frame = run.sql(_SQL, {"top": top}).df()
    if frame.empty:
        raise InputError(
            f"run {run.name!r} has no finite activation", found="only NaN or infinity: the model overflowed"
        )
    frame.insert(1, "metric", "max |x|")
    frame["massive"] = (frame["value"].abs() > 100) & (frame["ratio"] >= 1000)
    vocabulary = pieces(run)
    frame["context"] = [around(run, int(t), vocabulary, reach=6) for t in frame["token"]]
    best = frame.loc[frame["value"].abs().idxmax()]
    where = (
        f"|x| = {abs(best['value']):,.4g} after layer {best['layer']}, channel "
        f"{best['channel']}, position {best['position']}"
    )
    layers = sorted(frame.loc[frame["massive_tokens"] > 0, "layer"].unique())
    title = (
        f"Massive activations after {_told(layers)}; the largest is {where}"
        if layers
        else f"No massive activation; the largest is {where}, {best['ratio']:,.0f}× the median"
    )
    return Result(
        title=title,
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(frame.drop_duplicates("layer")["n"].sum()),
        n_unit="token × layer pairs",
        sql=_SQL,
        sql_parameters={"run": run.run_id, "top": top},
        definition="Tokens with the largest |x| at each block's output; massive where |x| > "
        "100 and |x| ≥ 1000 × the median |x| over the sequence's "
        "tokens and channels at that layer. One channel a token is ranked: the largest. massive_tokens: all tokens of the layer "
        "whose largest |x| is massive, shown or not.",
        units={
            "value": "activation",
            "ratio": "|x| ÷ median |x|",
            "median_abs": "activation",
            "massive_tokens": "tokens",
        },
    )


def _told(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers ({layers[0]} to {layers[-1]})"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    first = frame[frame["rank"] == 1]
    fields = first[["channel", "position", "ratio"]].to_numpy()
    figure = go.Figure(
        go.Scatter(
            x=first["layer"],
            y=first["value"].abs(),
            mode="lines+markers",
            name="largest |x|",
            line={"color": SERIES[1]},
            customdata=fields,
            hovertemplate="after layer %{x}: |x| = %{y:,.4g}<br>channel %{customdata[0]}, position "
            "%{customdata[1]}<br>%{customdata[2]:,.0f}× the median<extra></extra>",
        )
    )
    figure.add_scatter(
        x=first["layer"],
        y=first["median_abs"],
        mode="lines+markers",
        name="median |x| of that sequence",
        line={"color": SERIES[0]},
    )
    figure.add_scatter(
        x=first["layer"],
        y=(1000 * first["median_abs"]).clip(lower=100),
        mode="lines",
        name="massive from here",
        line={"color": CHANCE, "dash": "dash"},
    )
    low, high = int(first["layer"].min()), int(first["layer"].max())
    figure.update_xaxes(title="layer", tick0=low, dtick=max(1, len(first) // 16), range=[low - 0.5, high + 0.5])
    log_axis(figure, title="|x| (log scale)", values=[*first["value"].abs(), *first["median_abs"], 1000.0])
    figure.update_layout(height=400)
    return figure
