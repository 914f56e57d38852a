"""How undecided routers are: entropy of all scores and of the chosen weights, uncertain tokens."""

from __future__ import annotations

import math

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

# GW-MoE calls a token of Switch-base-8 uncertain from 1.6 nats on; as a share of ln 8 it carries over to other sizes.
GW_MOE = 1.6 / math.log(8)

_ENTROPY = (
    PLACES  # noqa: S608  both parts are constants
    + """,
    sized AS (
        SELECT layer, block, n_experts + coalesce(n_null, 0) AS n_experts, top_k
        FROM layers
        WHERE run_id = $run AND n_experts > 0
    ),
    measured AS (
        SELECT
            r.token, r.layer, r.block, l.n_experts, l.top_k, r.entropy::DOUBLE AS entropy,
            list_sum(list_transform(r.weights, lambda w: greatest(w, 0)::DOUBLE)) AS mass,
            list_sum(list_transform(r.weights, lambda w: CASE WHEN w > 0 THEN w * ln(w::DOUBLE) ELSE 0 END)) AS wlnw
        FROM routing r
        JOIN sized l ON l.layer = r.layer AND l.block = r.block
        WHERE r.run_id = $run
    )
    SELECT
        m.layer,
        m.block,
        p.place,
        p.unit,
        any_value(m.n_experts) AS n_experts,
        any_value(m.top_k) AS top_k,
        sum(m.entropy) AS entropy,
        count(m.entropy) AS n,
        count(*) FILTER (WHERE m.entropy >= $share * ln(m.n_experts) - 1e-6) AS uncertain,
        sum(ln(m.mass) - m.wlnw / m.mass) FILTER (WHERE m.mass > 0) AS chosen,
        count(*) FILTER (WHERE m.mass > 0) AS weighted
    FROM measured m
    JOIN places p ON p.token = m.token
    WHERE p.place IS NOT NULL
    GROUP BY m.layer, m.block, p.place, p.unit
    ORDER BY m.layer, m.block, p.place, p.unit
"""
)
# metric, column of its sum, column of its count
_METRICS = (
    ("router entropy", "entropy", "n"),
    ("entropy of the chosen", "chosen", "weighted"),
    ("uncertain tokens", "uncertain", "n"),
)


@analysis(
    name="router_uncertainty",
    needs=("routing",),
    source="arXiv 2406.12375 (GW-MoE); entropy of the router's distribution, of all experts and of the chosen",
    section="routing",
    order=11,
)
def router_uncertainty(
    run: Run,
    *,
    by: By = "layer",
    bins: Count = 10,
    threshold: float = GW_MOE,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """How many tokens leave their router undecided, and how evenly do the chosen experts share the weight?

    Router entropy: −Σ p ln p of the router's distribution over all experts, in nats. Entropy of the chosen: the same for the
    weights given to the k experts, divided by their sum. Uncertain tokens: those whose router entropy is at least `threshold`
    × ln E. GW-MoE sets 1.6 nats for 8 experts, here the default as a share of ln 8 (1.8 in its other tasks: 0.866); its code
    takes ln(p + 1e-5), which lowers entropies by at most 1e-5 × E nats, and calls no more than a fixed number of tokens of a
    sequence uncertain, which is not done here.

    Args:
        by: measure over all tokens of a router (layer), or apart for each label, position in the sequence, phase or
            class of token.
        bins: equal parts of each sequence, for by="position".
        threshold: entropy from which a token is uncertain, as a share of ln E.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     ms.analyze(run, "router_uncertainty").df().metric.unique().tolist()
        ['router entropy', 'entropy of the chosen', 'uncertain tokens']
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold = {threshold} is no share of ln E", expected="a number from 0 to 1")
    parameters = place_parameters(run, by, bins) | {"share": threshold}
    found = group_sums(run, _ENTROPY, parameters)
    if not (found["n"].any() or found["weighted"].any()):
        raise InputError(
            f"run {run.name!r} has routing without weights and without router logits, so there is no entropy",
            fix="record it from a live model, or import a trace with weights",
        )
    frame = pd.concat(
        [
            mean_rows(found, parameters, metric=metric, total=total, count=count, draws=draws, seed=seed)
            for metric, total, count in _METRICS
        ]
    )
    sizes = found.groupby(["layer", "block"])[["n_experts", "top_k"]].first()
    frame["null"] = [_chance(r.metric, *sizes.loc[(r.layer, r.block)]) for r in frame.itertuples()]
    entropy = frame["metric"] == "router entropy"
    notes = () if entropy.any() else ("Entropies of routers were not recorded: the weights alone are measured.",)
    return Result(
        title=_uncertainty_title(frame, by),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw_uncertainty,
        n=int(frame[frame["metric"] == frame["metric"].iloc[0]]["n"].sum()),
        n_unit="token × router pairs",
        definition="Router entropy: mean over tokens of −Σ p ln p, p the router's distribution over all its experts. Entropy of "
        "the chosen: the same of the weights of the k chosen experts over their sum. Uncertain tokens: share with router "
        f"entropy of at least {threshold:.3g} × ln E.",
        units={
            "value": "by metric",
            "value[router entropy]": "nats",
            "value[entropy of the chosen]": "nats",
            "value[uncertain tokens]": "share of tokens",
        },
        interval=percentile_interval(parameters, draws),
        null="a router that scores all experts alike: ln E, ln k, and every token uncertain",
        sql=_ENTROPY,
        sql_parameters={"run": run.run_id, **parameters},
        computation="ratio of sums over documents",
        notes=notes,
    )


def _chance(metric: str, n_experts: float, top_k: float) -> float:
    """What a router gives that scores all experts alike."""
    return {"router entropy": math.log(n_experts), "entropy of the chosen": math.log(top_k)}.get(metric, 1.0)


def _uncertainty_title(frame: pd.DataFrame, by: By) -> str:
    part = frame[frame["metric"] == "uncertain tokens"].reset_index(drop=True)
    if part.empty:
        part = frame.reset_index(drop=True)
        share = (part["value"] / part["null"].where(part["null"] > 0)).mean()
        return f"Chosen experts share their weight at {share:.0%} of the largest possible entropy"
    mean = float(np.average(part["value"], weights=part["n"]))
    most, least = part.loc[part["value"].idxmax()], part.loc[part["value"].idxmin()]
    if most["value"] == least["value"]:
        return f"{mean:.1%} of decisions are uncertain, in every {'router' if by == 'layer' else 'group'} alike"
    return (
        f"{mean:.1%} of decisions are uncertain: from {least['value']:.1%} in {row_name(least, by)} "
        f"to {most['value']:.1%} in {row_name(most, by)}"
    )


def _draw_uncertainty(result: Result) -> go.Figure:
    frame = result.df()
    if group_column(frame) is None:
        titles = {"router entropy": "nats", "entropy of the chosen": "nats", "uncertain tokens": "share of tokens"}
        return panels(frame, titles, null_name="no preference: ln E, ln k, all")
    known = (frame["metric"] == "uncertain tokens").any()
    part = frame[frame["metric"] == ("uncertain tokens" if known else "entropy of the chosen")]
    colorbar = "uncertain tokens (share)" if known else "entropy of the chosen (nats)"
    return group_grid(part, part["value"].to_numpy(), colorbar=colorbar)
