"""Router entropy: how undecided each router is."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.grid import layer_name, series_figure
from moescope.store.run import Run

_SQL = """
    SELECT
        r.layer,
        r.block,
        any_value(l.n_experts + coalesce(l.n_null, 0)) AS n_experts,
        s.document_id,
        sum(r.entropy::DOUBLE) AS total,
        count(r.entropy) AS n
    FROM routing r
    JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
    JOIN sequences s ON s.run_id = r.run_id AND s.sequence_id = t.sequence_id
    JOIN layers l ON l.run_id = r.run_id AND l.layer = r.layer AND l.block = r.block
    WHERE r.run_id = $run
    GROUP BY r.layer, r.block, s.document_id
    HAVING count(r.entropy) > 0
    ORDER BY r.layer, r.block, s.document_id
"""


@analysis(
    name="router_entropy",
    needs=("routing",),
    source="−Σ p ln p of the router's distribution",
    section="routing",
    order=10,
)
def router_entropy(run: Run, *, draws: Count = 1000, seed: Natural = 0) -> Result:
    """How undecided is each router, from 0 (one expert certain) to ln E (all alike)?

    The mean over tokens of the entropy of the router's distribution over all its experts, in nats.

    Args:
        draws: bootstrap resamples of documents.
        seed: of the resampling.
    """
    frame = run.sql(_SQL).df()
    rows = []
    for (layer, block), part in frame.groupby(["layer", "block"], sort=True):
        value, low, high = bootstrap_ratio(
            part["total"].to_numpy(), part["n"].to_numpy().astype(float), draws=draws, seed=seed
        )
        rows.append(
            {
                "layer": layer,
                "block": block,
                "metric": "router entropy",
                "value": float(value),
                "ci_low": float(low),
                "ci_high": float(high),
                "null": float(np.log(part["n_experts"].iloc[0])),
                "n": int(part["n"].sum()),
            }
        )
    if not rows:
        from moescope.core.errors import InputError

        raise InputError(
            f"run {run.name!r} has routing without router logits, so entropy was not recorded",
            fix="record it from a live model",
        )
    sharpest, vaguest = min(rows, key=_relative), max(rows, key=_relative)
    title = (
        f"Router entropy runs from {_relative(sharpest):.0%} of its maximum in "
        f"{layer_name(sharpest['layer'], sharpest['block'])} "
        f"to {_relative(vaguest):.0%} in {layer_name(vaguest['layer'], vaguest['block'])}"
    )
    return Result(
        title=title,
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=sum(r["n"] for r in rows),
        n_unit="token × router pairs",
        definition="Mean over tokens of −Σ p ln p, p the router's distribution over all its experts.",
        units={"value": "nats", "null": "nats"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="ln E, the entropy of a router that prefers no expert",
        sql=_SQL,
        sql_parameters={"run": run.run_id},
        computation="ratio of sums over documents",
    )


def _relative(row: dict[str, float]) -> float:
    return row["value"] / row["null"] if row["null"] else 0.0


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    names = [layer_name(r.layer, r.block) for r in frame.itertuples()]
    return series_figure(
        frame,
        x=names,
        title_x="layer",
        title_y="router entropy (nats)",
        null=list(frame["null"]),
        null_name="ln E: no preference",
    )
