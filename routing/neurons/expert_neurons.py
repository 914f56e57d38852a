"""Neurons inside every expert: the share at work, from counts over every token routed to it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.figures import heatmap
from moescope.core.result import Result
from moescope.routing.grid import expert_grid, layer_name
from moescope.store.run import Run

_SQL = """
    SELECT
        layer,
        block,
        expert,
        u.metric,
        u.share AS value,
        sum(tokens * u.share) OVER router / sum(CASE WHEN u.share IS NOT NULL THEN tokens END) OVER router AS "null",
        tokens AS n
    FROM experts
    CROSS JOIN LATERAL (VALUES ('active', active_share), ('exact zeros', zero_share)) AS u(metric, share)
    WHERE run_id = $run AND (expert >= 0 OR share IS NOT NULL)  -- shared experts, where their neurons were read
    WINDOW router AS (PARTITION BY layer, block, u.metric)
    ORDER BY layer, block, expert, u.metric
"""


@analysis(
    name="expert_neurons",
    needs=("experts",),
    source="arXiv 2406.05955 (neurons inside experts), arXiv 2402.13516 (exact zeros)",
    section="neurons",
    order=40,
)
def expert_neurons(run: Run) -> Result:
    """Which experts put few of their neurons to work?

    Over all tokens routed to an expert and all its neurons a = act(gate) · up: active, the share of |a| over the threshold
    with which the run was recorded (0 unless the probe was given one), and exact zeros, the share of a = 0. Shared experts
    have ids −1, −2, …. With the threshold 0, SiLU experts have next to every neuron active, ReLU experts do not.
    """
    frame = run.sql(_SQL).df()
    if frame["value"].isna().all():
        raise InputError(
            f"run {run.name!r} has no counts of neurons",
            found="experts whose neurons could not be read",
            fix="record from a live model whose experts can be looked into, with --probe experts",
        )
    unseen = int((frame["n"] == 0).sum()) // 2
    missing = frame[frame["value"].isna() & (frame["n"] > 0)]
    notes = (f"{unseen:,} experts were never chosen and have no value.",) if unseen else ()
    if len(missing):
        names = ", ".join(sorted({layer_name(r.layer, r.block) for r in missing.itertuples()}))
        notes = (*notes, f"Some neurons could not be read in {names}.")
    known = frame[frame["value"].notna()]
    return Result(
        title=_title(known),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(frame.loc[frame["metric"] == "active", "n"].sum()),
        n_unit="decisions, shared experts included",
        definition="Over all tokens routed to an expert and all its neurons a: active, share of |a| over the threshold of the "
        "recording (0 by default); exact zeros, share of a = 0.",
        units={"value": "share of neurons", "null": "share of neurons", "n": "tokens routed to the expert"},
        null="the layer's mean over tokens: experts that are all alike",
        sql=_SQL,
        sql_parameters={"run": run.run_id},
        notes=notes,
    )


def _title(frame: pd.DataFrame) -> str:
    active = frame[frame["metric"] == "active"]
    low, high = active.loc[active["value"].idxmin()], active.loc[active["value"].idxmax()]
    mean = np.average(active["value"], weights=np.maximum(active["n"], 1))
    title = f"Experts have {mean:.1%} of their neurons active"
    if low["value"] == high["value"]:
        return f"{title}, every one alike"
    return f"{title}, from {low['value']:.1%} in {_named(low)} to {high['value']:.1%} in {_named(high)}"


def _named(row: pd.Series) -> str:
    return f"{layer_name(row['layer'], row['block'])}·E{row['expert']}"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    frame = frame[frame["metric"] == "active"]
    values, rows, columns, fields = expert_grid(frame, "value", extra=("null", "n"))
    figure = heatmap(
        values,
        x=columns,
        y=rows,
        customdata=fields,
        colorbar="share of neurons active",
        hover="%{y}·%{x}: %{z:.2%}<br>layer's mean %{customdata[0]:.2%}, %{customdata[1]:,.0f} tokens",
    )
    figure.update_xaxes(title="expert (blank: never chosen or not read)")
    figure.update_yaxes(title="layer")
    return figure
