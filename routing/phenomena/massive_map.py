"""Where the largest activations stand: layer × position in the text, or layer × channel."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, analysis
from moescope.core.errors import InputError
from moescope.core.figures import SEQUENTIAL, SERIES
from moescope.core.result import Result
from moescope.routing.phenomena.massive_records import RATIO, SMALLEST
from moescope.store.run import Run

By = Literal["position", "channel"]

# Positions from 16 on are put together by powers of two, so that the first tokens stand alone and a long text still fits. Of equal
# values the first token's is told: every text begins alike, and which one is met first is no answer.
_BY_POSITION = """
    WITH seen AS (
        SELECT r.layer, r.token, t.position, abs(r.top_values[1])::DOUBLE AS value, r.top_channels[1]::INTEGER AS channel,
            m.median_abs::DOUBLE AS median_abs,
            CASE WHEN t.position < 16 THEN t.position ELSE (2 ** floor(log2(t.position)))::INTEGER END AS first
        FROM residual r
        JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
        LEFT JOIN residual_sequences m ON m.run_id = r.run_id AND m.sequence_id = t.sequence_id AND m.layer = r.layer
        WHERE r.run_id = $run AND isfinite(r.top_values[1])
    )
    SELECT layer, first, 'largest |x|' AS metric, max(value) AS value, arg_max(channel, (value, -token)) AS channel,
        arg_max(position, (value, -token)) AS position, arg_max(token, (value, -token)) AS token,
        arg_max(value / nullif(median_abs, 0), (value, -token)) AS ratio,
        count(*) FILTER (value > $smallest AND value >= $times * median_abs) AS massive, count(*) AS n
    FROM seen
    GROUP BY layer, first
    ORDER BY layer, first
"""
_BY_CHANNEL = """
    WITH three AS (
        SELECT r.layer, r.token, t.position, unnest(r.top_values)::DOUBLE AS signed, unnest(r.top_channels)::INTEGER AS channel,
            m.median_abs::DOUBLE AS median_abs
        FROM residual r
        JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
        LEFT JOIN residual_sequences m ON m.run_id = r.run_id AND m.sequence_id = t.sequence_id AND m.layer = r.layer
        WHERE r.run_id = $run
    ),
    seen AS (
        SELECT *, abs(signed) AS value
        FROM three
        WHERE isfinite(signed)
    ),
    foremost AS (
        SELECT channel
        FROM seen
        GROUP BY channel
        ORDER BY max(value) DESC, channel
        LIMIT $top
    )
    SELECT layer, channel AS first, 'largest |x|' AS metric, max(value) AS value, channel, arg_max(position, (value, -token)) AS position,
        arg_max(token, (value, -token)) AS token,
        arg_max(value / nullif(median_abs, 0), (value, -token)) AS ratio,
        count(*) FILTER (value > $smallest AND value >= $times * median_abs) AS massive, count(*) AS n
    FROM seen
    SEMI JOIN foremost USING (channel)
    GROUP BY layer, channel
    ORDER BY layer, channel
"""


@analysis(
    name="massive_map",
    needs=("residual", "tokens"),
    source="arXiv 2402.17762; |x| > 100 and |x| ≥ 1000 × the median |x| as in the code of arXiv 2503.22329",
    section="phenomena",
    order=12,
)
def massive_map(run: Run, *, by: By = "position", top: Count = 24) -> Result:
    """At which positions, or in which channels, do the largest activations of each layer stand?

    The largest |x| at each block's output over all tokens of a position (from 16 on by powers of two: 16 to 31, 32 to 63, …), or
    over all tokens in a channel. Every cell names its token. `massive` counts the tokens of a cell that the rule calls massive:
    |x| > 100 and |x| ≥ 1000 × the median |x| of their text at that layer.

    Of each token the three largest channels are on record, and only these are looked at: a cell by channel holds the tokens among
    whose three largest channels it is.

    Args:
        by: what the columns are.
        top: channels shown, those of the largest |x| anywhere; of no use by position.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world, how are you?"], store, name="first", progress=False)
        ...     int(ms.analyze(run, "massive_map").df()["massive"].sum())
        0
    """
    query = _BY_POSITION if by == "position" else _BY_CHANNEL
    given: dict[str, Any] = {"smallest": SMALLEST, "times": RATIO} | ({"top": top} if by == "channel" else {})
    frame = run.sql(query, given).df()
    if frame.empty:
        raise InputError(
            f"run {run.name!r} has no finite activation",
            found="only NaN or infinity: the model overflowed",
            fix="record the model in another dtype (float32, bfloat16)",
        )
    judged = bool(run.rows("residual_sequences"))
    return Result(
        title=_title(frame, by, judged),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(frame["n"].sum()),
        n_unit="token × layer pairs" if by == "position" else "token × layer × channel triples",
        definition="Largest |x| at a block's output over the tokens of a cell, with that token; massive: tokens with |x| > "
        f"{SMALLEST:g} and |x| ≥ {RATIO:g} × the median |x| of their text at the layer. first: first position of the cell, or its "
        "channel.",
        units={"value": "activation", "ratio": "|x| ÷ median |x|", "massive": "tokens", "n": "tokens"},
        sql=query,
        sql_parameters={"run": run.run_id, **given},
        notes=() if judged else ("No median |x| was recorded, so that nothing can be called massive.",),
    )


def _title(frame: pd.DataFrame, by: By, judged: bool) -> str:
    best = frame.loc[frame["value"].idxmax()]
    place = f"L{best['layer']}, position {best['position']}, channel {best['channel']}"
    told = f"The largest |x| is {best['value']:,.4g} ({place})"
    cells = frame[frame["massive"] > 0]
    if cells.empty:
        return f"{told}; {'none is massive' if judged else 'whether it is massive is not known'}"
    firsts = sorted(cells["first"].unique())
    told_as = [_span(int(first)) if by == "position" else str(first) for first in firsts]
    names = ", ".join(told_as[:6]) + (f" and {len(firsts) - 6} more" if len(firsts) > 6 else "")
    layers = cells["layer"].nunique()
    several = len(firsts) > 1 or told_as[0] != str(firsts[0])
    where = f"{by}{'s' * several} {names}, in {layers} layer{'s' * (layers > 1)}"
    return f"{told}; massive activations stand at {where}"


def _draw(result: Result) -> go.Figure:
    """Layer × position or channel, colour the logarithm of the largest |x|; a ring where something is massive."""
    frame = result.df()
    by_position = result.parameters.get("by", "position") == "position"
    layers, firsts = sorted(frame["layer"].unique()), sorted(frame["first"].unique())
    columns = [_span(int(first)) if by_position else f"ch {first}" for first in firsts]
    names = [f"L{layer}" for layer in layers]
    row, column = ({int(value): at for at, value in enumerate(values)} for values in (layers, firsts))
    cells = np.full((len(layers), len(firsts)), np.nan)
    data = np.full(cells.shape, None, dtype=object)
    hover = np.full(cells.shape, "", dtype=object)
    for r in frame.itertuples():
        at = row[int(r.layer)], column[int(r.first)]
        cells[at], data[at], hover[at] = np.log10(max(float(r.value), 1e-12)), {"token": int(r.token)}, _told(r)
    ticks = _ticks(float(np.nanmin(cells)), float(np.nanmax(cells)))
    figure = go.Figure(
        go.Heatmap(
            z=cells, x=columns, y=names, customdata=data, text=hover, hovertemplate="%{text}<extra></extra>", colorscale=SEQUENTIAL,
            xgap=1, ygap=1 if len(layers) <= 64 else 0,
            colorbar={
                "title": {"text": "largest |x| (log scale)", "side": "right"}, "thickness": 14, "tickvals": list(np.log10(ticks)),
                "ticktext": [f"{tick:,.10g}" for tick in ticks],
            },
        )
    )  # fmt: skip
    massive = frame[frame["massive"] > 0]
    if len(massive):
        places = [(row[int(r.layer)], column[int(r.first)]) for r in massive.itertuples()]
        figure.add_scatter(
            x=[columns[c] for _, c in places], y=[names[r] for r, _ in places], mode="markers", name="massive activations",
            marker={"symbol": "circle-open", "size": 9, "color": SERIES[1], "line": {"width": 2.5}},
            customdata=[data[place] for place in places], text=[hover[place] for place in places],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(
        title="position in the text" if by_position else "channel of the residual stream",
        type="category",
        showgrid=False,
    )
    figure.update_yaxes(
        title="layer (block output)", type="category", range=[len(layers) - 0.5, -0.5], nticks=24, showgrid=False
    )
    figure.update_layout(
        height=max(300, min(620, 150 + 22 * len(layers))), showlegend=bool(len(massive))
    )  # fmt: skip
    return figure


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten, more of them where the powers are close."""
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= np.log10(step * 10.0**power) <= high]


def _span(first: int) -> str:
    return str(first) if first < 16 else f"{first}–{2 * first - 1}"


def _told(r: Any) -> str:
    text = f"after L{r.layer}: |x| = {r.value:,.4g}<br>channel {r.channel}, position {r.position}, token {r.token:,}"
    text += f"<br>{r.ratio:,.0f}× the median" if np.isfinite(r.ratio) else ""
    return text + f"<br>{r.massive:,} of {r.n:,} tokens massive"
