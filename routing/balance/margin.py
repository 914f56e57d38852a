"""Margins: how close decisions were to going to another expert."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.balance.group_sums import (
    PLACES,
    group_sums,
    mean_rows,
    percentile_interval,
    place_parameters,
    row_name,
)
from moescope.routing.balance.groups import By
from moescope.routing.balance.panels import group_column, group_grid, panels
from moescope.store.run import Run

_MARGIN = (
    PLACES
    + """
    SELECT
        r.layer,
        r.block,
        p.place,
        p.unit,
        sum(r.margin::DOUBLE) AS margin,
        count(*) FILTER (WHERE r.margin < $tie) AS ties,
        count(*) AS n
    FROM routing r
    JOIN places p ON p.token = r.token
    WHERE r.run_id = $run AND p.place IS NOT NULL AND r.margin IS NOT NULL AND NOT isnan(r.margin)
    GROUP BY r.layer, r.block, p.place, p.unit
    ORDER BY r.layer, r.block, p.place, p.unit
"""
)


@analysis(
    name="router_margin",
    needs=("routing",),
    source="z(k) − z(k+1): how close the last chosen expert was to being replaced; arXiv 2406.12375",
    section="routing",
    order=12,
)
def router_margin(
    run: Run, *, by: By = "layer", bins: Count = 10, tie: float = 0.1, draws: Count = 1000, seed: Natural = 0
) -> Result:
    """How close were decisions to going to another expert?

    The margin of a decision is the score of the last chosen expert minus that of the best one not chosen, in the space where
    the router takes its top-k: logits where the rule is a softmax, scores (biased, if the router has a bias) otherwise; so
    margins compare within a model, not between rules. Near-ties are decisions with a margin below `tie`: another precision,
    batch or engine may turn them.

    Args:
        by: measure over all tokens of a router (layer), or apart for each label, position in the sequence, phase or
            class of token.
        bins: equal parts of each sequence, for by="position".
        tie: margin below which a decision is a near-tie.
        draws: bootstrap resamples of documents.
        seed: of the resampling.
    """
    parameters = place_parameters(run, by, bins) | {"tie": tie}
    found = group_sums(run, _MARGIN, parameters)
    if found.empty:
        raise InputError(
            f"run {run.name!r} has no margins",
            found="decisions without router scores, or a routing rule that could not be verified",
            fix="record it from a live model whose rule is verified (model.anatomy.routing_rule)",
        )
    frame = pd.concat(
        [
            mean_rows(found, parameters, metric=metric, total=total, count="n", draws=draws, seed=seed).assign(
                null=np.nan  # 0 is the least a margin can be: no decision of any router is there, so it is no chance level
            )
            for metric, total in (("margin", "margin"), ("near-ties", "ties"))
        ]
    )
    return Result(
        title=_margin_title(frame, by, tie),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw_margin,
        n=int(frame[frame["metric"] == "margin"]["n"].sum()),
        n_unit="token × router pairs",
        definition="Margin: mean over tokens of the k-th minus the (k+1)-th score, in the space where the router takes its "
        f"top-k. Near-ties: share of tokens with a margin below {tie:g}.",
        units={
            "value": "by metric",
            "value[margin]": "score (logits for softmax)",
            "value[near-ties]": "share of tokens",
        },
        interval=percentile_interval(parameters, draws),
        null="none: a router that scores all experts alike would have margin 0 and near-ties alone, which is a bound, not chance",
        sql=_MARGIN,
        sql_parameters={"run": run.run_id, **parameters},
        computation="ratio of sums over documents",
    )


def _margin_title(frame: pd.DataFrame, by: By, tie: float) -> str:
    part = frame[frame["metric"] == "near-ties"].reset_index(drop=True)
    mean = float(np.average(part["value"], weights=part["n"]))
    most = part.loc[part["value"].idxmax()]
    if not mean:
        return f"No decision is a near-tie (margin below {tie:g})"
    return f"{mean:.1%} of decisions are near-ties (margin below {tie:g}), most in {row_name(most, by)}: {most['value']:.1%}"


def _draw_margin(result: Result) -> go.Figure:
    frame = result.df()
    if group_column(frame) is None:
        return panels(frame, {"margin": "score", "near-ties": "share of tokens"}, null_name="")
    part = frame[frame["metric"] == "near-ties"]
    return group_grid(part, part["value"].to_numpy(), colorbar="near-ties (share of tokens)")
