"""Negative log-likelihood: how well the model predicts the corpus, and each label of it."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.predictions import require_predictions
from moescope.store.run import Run

_SQL = """
    SELECT
        s.label,
        s.document_id,
        sum(t.nll::DOUBLE) AS total,
        count(t.nll) AS n
    FROM tokens t
    JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
    WHERE t.run_id = $run
    GROUP BY s.label, s.document_id
    HAVING count(t.nll) > 0
    ORDER BY s.label, s.document_id
"""


@analysis(name="nll", needs=("tokens",), source="cross-entropy of the next token", section="predictions", order=10)
def nll(run: Run, *, draws: Count = 1000, seed: Natural = 0) -> Result:
    """How well does the model predict the corpus, and each label of it?

    The mean over predicted tokens of −ln p(token | those before it). Padding and the first token of each sequence, which
    nothing predicts, are left out. Perplexity is exp of the mean.

    Args:
        draws: bootstrap resamples of documents.
        seed: of the resampling.
    """
    require_predictions(run)
    frame = run.sql(_SQL).df()
    groups = [("all", frame), *((label, part) for label, part in frame.groupby("label", sort=True))]
    rows = []
    for label, part in groups:
        value, low, high = bootstrap_ratio(
            part["total"].to_numpy(), part["n"].to_numpy().astype(float), draws=draws, seed=seed
        )
        rows.append(
            {
                "label": label,
                "metric": "mean NLL",
                "value": float(value),
                "ci_low": float(low),
                "ci_high": float(high),
                "perplexity": float(np.exp(value)),
                "documents": len(part),
                "n": int(part["n"].sum()),
            }
        )
    whole, labels = rows[0], rows[1:]
    title = f"Mean NLL is {whole['value']:.3f} nats a token, perplexity {whole['perplexity']:,.1f}"
    if len(labels) > 1:
        best, worst = min(labels, key=lambda r: r["value"]), max(labels, key=lambda r: r["value"])
        title += (
            f"; best predicted is {best['label']} ({best['value']:.2f}), worst {worst['label']} ({worst['value']:.2f})"
        )
    return Result(
        title=title,
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=whole["n"],
        n_unit="predicted tokens",
        definition="Mean of −ln p(token | those before it) over unmasked tokens, without the "
        "first of each sequence; perplexity is its exponential.",
        units={"value": "nats per token", "perplexity": "exp(nats per token)"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        sql=_SQL,
        sql_parameters={"run": run.run_id},
        computation="ratio of sums over documents",
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    whole, labels = frame.iloc[0], frame.iloc[1:].sort_values("value", ascending=False)
    shown = labels if len(labels) else frame
    value = shown["value"].to_numpy()
    figure = go.Figure(
        go.Scatter(
            x=value,
            y=[plain(str(label)) for label in shown["label"]],
            mode="markers",
            marker={"color": SERIES[0], "size": 9},
            name="mean NLL",
            error_x={
                "type": "data",
                "symmetric": False,
                "array": shown["ci_high"] - value,
                "arrayminus": value - shown["ci_low"],
                "thickness": 1,
            },
            customdata=shown[["perplexity", "n", "documents"]].to_numpy(),
            hovertemplate="%{y}: %{x:.4g} nats<br>perplexity %{customdata[0]:,.1f}<br>%{customdata[1]:,} "
            "tokens of %{customdata[2]:,} documents<extra></extra>",
        )
    )
    figure.add_vline(x=float(whole["value"]), line_dash="dash", line_color=CHANCE, annotation_text="whole corpus")
    figure.update_xaxes(title="mean NLL (nats per token)")
    figure.update_yaxes(type="category")
    figure.update_layout(height=max(260, 150 + 28 * len(shown)), showlegend=False)
    return figure
