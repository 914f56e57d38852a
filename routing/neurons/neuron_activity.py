"""Neuron activity from recorded vectors: exact zeros, non-sparse rate, neurons that never fire; layer by layer."""

from __future__ import annotations

from math import erfc, sqrt

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.core.sites import DENSE_POST, EXPERT_POST
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.neurons.recorded_vectors import Vectors, read_vectors, reading_notes, sites_of
from moescope.store.run import Run

NEURONS = (DENSE_POST, EXPERT_POST)
_LADDER = (0.001, 0.01, 0.1, 1.0)


@analysis(
    name="neuron_activity",
    needs=("activations",),
    source="exact zeros: arXiv 2402.13516; non-sparse activation rate: arXiv 2502.12928",
    section="neurons",
    order=10,
)
def neuron_activity(
    run: Run, *, threshold: float | None = None, tokens: Count = 1024, draws: Count = 500, seed: Natural = 0
) -> Result:
    """How many neurons of an MLP, or of a token's experts, take part in a token?

    A neuron is an entry a of the down projection's input, act(gate) · up. Exact zeros: share of a = 0. Non-sparse rate at
    τ (NSAR): share of |a| > τ. Never active: share of neurons with a = 0 at every token seen (for experts, of the neurons
    of experts that were seen). For experts, the neurons of each token's chosen experts count.

    Args:
        threshold: τ; 0.001, 0.01, 0.1 and 1 where not given.
        tokens: recorded tokens to look at, in whole sequences.
        draws: bootstrap resamples of documents.
        seed: of drawing sequences and of resampling.
    """
    if threshold is not None and not (threshold >= 0 and np.isfinite(threshold)):
        raise InputError(f"parameter 'threshold' cannot be {threshold!r}", expected="a number from 0")
    ladder = _LADDER if threshold is None else (threshold,)
    read = []
    rows: list[dict[str, object]] = []
    for vectors in read_vectors(run, sites_of(run, NEURONS), limit=tokens, seed=seed):
        rows += _rows(vectors, ladder, draws, seed)
        read.append(vectors.emptied())
    frame = pd.DataFrame(rows)
    first = f"NSAR τ = {ladder[-2] if len(ladder) > 1 else ladder[0]:g}"
    return Result(
        title=_title(frame, first),
        table=pa.Table.from_pandas(frame.assign(shown=frame["metric"] == first), preserve_index=False),
        draw=_draw,
        n=max(len(v.token) for v in read),
        n_unit="tokens",
        definition="a: entry of the down projection's input. exact zeros: share of a = 0; NSAR τ: share of |a| > τ; never "
        "active: share of neurons with a = 0 at every token seen. inside: of a dense MLP, or of the token's experts.",
        units={"value": "share of neurons", "null": "share of neurons", "n": "tokens"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples; none for neurons never active",
        null="NSAR: independent normal neurons of the same mean square; exact zeros: 0; never active: neurons that are 0 "
        "independently, all at the same rate",
        computation="counts over recorded vectors",
        notes=reading_notes(read),
    )


def _rows(vectors: Vectors, ladder: tuple[float, ...], draws: int, seed: int) -> list[dict[str, object]]:
    document = vectors.document[vectors.at]
    width = vectors.values.shape[1]
    possible = np.bincount(document, minlength=vectors.documents).astype(np.float64) * width
    size = np.abs(vectors.values)
    root = sqrt(float((size.astype(np.float64) ** 2).mean())) if size.size else 0.0
    zero = size == 0
    measured = {"exact zeros": (zero.sum(axis=1), 0.0)}
    for threshold in ladder:
        chance = erfc(threshold / root / sqrt(2)) if root else 0.0
        measured[f"NSAR τ = {threshold:g}"] = ((size > threshold).sum(axis=1), chance)
    where = {
        "layer": vectors.site.layer,
        "block": vectors.site.block,
        "inside": vectors.inside,
    }
    rows: list[dict[str, object]] = []
    for metric, (counts, chance) in measured.items():
        total = np.bincount(document, counts, minlength=vectors.documents).astype(np.float64)
        value, low, high = bootstrap_ratio(total, possible, draws=draws, seed=seed)
        rows.append(
            {
                **where, "metric": metric, "value": float(value), "ci_low": float(low), "ci_high": float(high),
                "null": chance, "n": len(vectors.token),
            }
        )  # fmt: skip
    silent, chance = _never_active(vectors, zero)
    rows.append(
        {**where, "metric": "never active", "value": silent, "ci_low": np.nan, "ci_high": np.nan, "null": chance,
         "n": len(vectors.token)}
    )  # fmt: skip
    return rows


def _never_active(vectors: Vectors, zero: NDArray[np.bool_]) -> tuple[float, float]:
    """Share of neurons that are 0 in every row, and what independent zeros at the same rate give."""
    rate = float(zero.mean())
    if vectors.expert is None:
        return float(zero.all(axis=0).mean()), rate ** len(zero)
    shares, chances = [], []
    for expert in np.unique(vectors.expert):
        part = zero[vectors.expert == expert]
        shares.append(part.all(axis=0).mean())
        chances.append(rate ** len(part))
    return float(np.mean(shares)), float(np.mean(chances))


def _title(frame: pd.DataFrame, first: str) -> str:
    zeros = frame[frame["metric"] == "exact zeros"]["value"].mean()
    part = frame[frame["metric"] == first]
    low, high = part.loc[part["value"].idxmin()], part.loc[part["value"].idxmax()]
    spread = (
        "" if len(part) < 2 else f", from {low['value']:.1%} in {_named(low)} to {high['value']:.1%} in {_named(high)}"
    )
    tau = first.removeprefix("NSAR ")
    return f"{part['value'].mean():.1%} of neurons exceed {tau}{spread}; {zeros:.1%} are exactly 0"


def _named(row: pd.Series) -> str:
    return f"L{row['layer']}" + (" (experts)" if row["inside"] == "experts" else "")


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    figure = go.Figure()
    shown = [name for name in dict.fromkeys(frame["metric"]) if name != "never active"]
    for number, metric in enumerate(shown):
        part = frame[frame["metric"] == metric]
        names = [_named(row) for _, row in part.iterrows()]
        figure.add_scatter(
            x=names,
            y=part["value"],
            mode="lines+markers",
            name=metric,
            line={"color": SERIES[number]},
            error_y={
                "type": "data", "symmetric": False, "array": part["ci_high"] - part["value"],
                "arrayminus": part["value"] - part["ci_low"], "thickness": 1,
            },
            customdata=np.stack([part["ci_low"], part["ci_high"], part["null"]], axis=-1),
            hovertemplate="%{x}: %{y:.2%} [%{customdata[0]:.2%}, %{customdata[1]:.2%}], normal neurons "
            "%{customdata[2]:.2%}<extra></extra>",
        )  # fmt: skip
    part = frame[frame["shown"]]
    figure.add_scatter(
        x=[_named(row) for _, row in part.iterrows()],
        y=part["null"],
        mode="lines",
        name=f"{part['metric'].iloc[0]}, normal neurons of the same mean square",
        line={"color": CHANCE, "dash": "dash"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(title="share of neurons", tickformat=".0%", rangemode="tozero")
    figure.update_layout(height=420)
    return figure
