"""Largest expert outputs: where each expert's output peaks."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, log_axis
from moescope.core.result import Result
from moescope.routing.context import around, pieces
from moescope.routing.grid import layer_name
from moescope.routing.phenomena.expert_names import expert_name
from moescope.store.run import Run

_SQL = """
    SELECT e.layer, e.block, e.expert, e.max_abs_out::DOUBLE AS value, e.max_abs_channel AS channel, e.max_abs_token AS token,
        t.sequence_id, t.position, s.label, e.tokens AS n, e.output_norm_mean
    FROM experts e
    LEFT JOIN tokens t ON t.run_id = e.run_id AND t.token = e.max_abs_token
    LEFT JOIN sequences s ON s.run_id = e.run_id AND s.sequence_id = t.sequence_id
    WHERE e.run_id = $run AND isfinite(e.max_abs_out)
    ORDER BY value DESC, e.layer, e.block, e.expert
"""


@analysis(
    name="expert_maxima", needs=("experts",), source="a(l,e) of arXiv 2507.23279, Eq. 6", section="experts", order=30
)
def expert_maxima(run: Run, *, contexts: Natural = 40) -> Result:
    """Which experts put out extreme values, on which token and channel?

    For each expert the largest |output| (of its down projection, before the routing weight) over every token routed to it,
    with channel and token.

    Args:
        contexts: how many of the largest are shown with the text around the token.
    """
    frame = run.sql(_SQL).df()
    if frame.empty:
        raise InputError(f"run {run.name!r} has no finite expert output", found="no choice, NaN or infinity")
    vocabulary = pieces(run)
    frame.insert(3, "metric", "max |output|")
    frame["context"] = [
        around(run, int(t), vocabulary) if i < contexts and t >= 0 else None for i, t in enumerate(frame["token"])
    ]
    top, median = frame.iloc[0], float(frame["value"].median())
    title = (
        f"The largest expert output is {top['value']:,.4g}, from "
        f"{expert_name(int(top['layer']), str(top['block']), int(top['expert']))} at position "
        f"{top['position']}: {top['value'] / median:,.1f}× the median expert's maximum"
    )
    return Result(
        title=title,
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(frame["n"].sum()),
        n_unit="expert outputs",
        definition="Largest |output| of each expert over its tokens and channels, before the routing weight.",
        units={"value": "activation", "output_norm_mean": "L2 norm", "n": "tokens"},
        sql=_SQL,
        sql_parameters={"run": run.run_id},
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    order = sorted({(r.layer, r.block) for r in frame.itertuples()})
    figure = go.Figure(
        go.Scatter(
            x=[layer_name(r.layer, r.block) for r in frame.itertuples()],
            y=frame["value"],
            mode="markers",
            name="expert",
            marker={"color": SERIES[0], "size": 8, "opacity": 0.7},
            customdata=np.stack(
                [
                    [expert_name(int(r.layer), str(r.block), int(r.expert)) for r in frame.itertuples()],
                    frame["channel"].astype(str),
                    frame["position"].astype(str),
                    frame["n"].map("{:,}".format),
                ],
                axis=-1,
            ),
            hovertemplate="%{customdata[0]}: %{y:.4g}<br>channel %{customdata[1]}, position "
            "%{customdata[2]}<br>%{customdata[3]} tokens<extra></extra>",
        )
    )
    names = [layer_name(*place) for place in order]
    median = [float(frame["value"].median())] * len(names)
    figure.add_scatter(x=names, y=median, mode="lines", name="median expert", line={"color": CHANCE, "dash": "dash"})
    figure.update_xaxes(title="layer", type="category", categoryorder="array", categoryarray=names)
    log_axis(figure, title="max |expert output| (log scale)", values=frame["value"])
    figure.update_layout(height=400)
    return figure
