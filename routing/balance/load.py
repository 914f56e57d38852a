"""Load: how many of each layer's decisions every expert takes."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.figures import heatmap
from moescope.core.result import Result
from moescope.routing.grid import expert_grid, layer_name
from moescope.store.run import Run

_SQL = """
    SELECT
        layer,
        block,
        expert,
        sum(tokens)::BIGINT AS tokens,
        sum(tokens) / sum(sum(tokens)) OVER (PARTITION BY layer, block) AS share,
        sum(weight_sum) / sum(sum(weight_sum)) OVER (PARTITION BY layer, block) AS weight_share,
        CASE WHEN sum(tokens) > 0
            THEN log2(sum(tokens) * count(*) OVER (PARTITION BY layer, block) / sum(sum(tokens)) OVER (PARTITION BY layer, block))
        END AS value
    FROM loads
    WHERE run_id = $run AND expert >= 0
    GROUP BY layer, block, expert
    ORDER BY layer, block, expert
"""


@analysis(
    name="load",
    needs=("loads",),
    source="load ÷ fair share; arXiv 2409.02060 §5, arXiv 1701.06538",
    section="experts",
    order=10,
)
def load(run: Run) -> Result:
    """How evenly is each layer's work shared among its experts?

    The share of an expert is the number of decisions (token, slot) that name it over all decisions of its layer; `value` is
    log2 of that share over the fair share 1/E. Experts that were never chosen have no value and count as dead.

    Example:
        >>> import moescope as ms
        >>> ms.analyses().set_index("name").loc["load", "needs"]
        'loads'
    """
    table = run.sql(_SQL).to_arrow_table()
    table = table.append_column("metric", pa.array(["log2 load ÷ fair share"] * table.num_rows))
    table = table.append_column("null", pa.array(np.zeros(table.num_rows)))
    frame = table.to_pandas()
    decisions = int(frame["tokens"].sum())
    dead = frame[frame["tokens"] == 0]
    busiest = frame.loc[frame["share"].idxmax()]
    ratio = 2 ** busiest["value"]
    used = f"{len(dead)} of {len(frame):,} experts {'is' if len(dead) == 1 else 'are'} never chosen"
    used = used if len(dead) else f"all {len(frame):,} experts are used"
    title = (
        f"{layer_name(busiest['layer'], busiest['block'])}·E{busiest['expert']} is "
        f"the busiest expert, with {ratio:.2f}× its fair share; {used}"
    )
    return Result(
        title=title,
        table=table,
        draw=_draw,
        n=decisions,
        n_unit="decisions",
        sql=_SQL,
        sql_parameters={"run": run.run_id},
        definition="Share of a layer's decisions (token × slot) that name the "
        "expert, against the fair share 1 ÷ experts. "
        "Colour: log2 of the ratio, so 1 is twice and −1 half of fair.",
        units={
            "value": "log2 ratio",
            "share": "share of decisions",
            "weight_share": "share of routing weight",
            "tokens": "tokens",
        },
        null="0: every expert takes 1 ÷ experts of the decisions",
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    values, rows, columns, fields = expert_grid(frame, "value", extra=("tokens", "share"))
    figure = heatmap(
        values,
        x=columns,
        y=rows,
        customdata=fields,
        colorbar="log2 (load ÷ fair share)",
        hover="%{y}·%{x}<br>%{customdata[0]:,.0f} tokens, %{customdata[1]:.2%} of decisions<br>log2 ratio %{z:.3f}",
    )
    dead = frame[frame["tokens"] == 0]
    if len(dead):
        figure.add_scatter(
            x=[f"E{e}" for e in dead["expert"]],
            y=[layer_name(r.layer, r.block) for r in dead.itertuples()],
            mode="markers",
            marker={"symbol": "x", "color": "#D55E00", "size": 9},
            name="never chosen",
            hovertemplate="%{y}·%{x} was never chosen<extra></extra>",
        )
    figure.update_xaxes(title="expert")
    figure.update_yaxes(title="layer")
    return figure
