"""The latents of an autoencoder in one list, and how often and how strongly they fire."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.core.analysis import Count, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.routing.features.feature_tables import DENSE, chosen_sae, reading_notes
from moescope.store.run import Run

Sort = Literal["score", "density", "maximum", "lift", "number"]

_SQL = """
    WITH labelled AS (
        SELECT feature, label, lift, ci_low AS lift_low, ci_high AS lift_high, q
        FROM feature_labels
        WHERE run_id = $run AND sae_id = $sae AND ($label IS NULL OR label = $label) AND ($label IS NOT NULL OR (q < 0.05 AND lift > 1))
        QUALIFY row_number() OVER (PARTITION BY feature ORDER BY lift DESC NULLS LAST, label) = 1
    ),
    scored AS (
        SELECT s.group_value::INTEGER AS feature, s.metric AS rule, s.value AS score, s.ci_low AS score_low, s.ci_high AS score_high,
            n.value AS score_null
        FROM sae_measures s
        LEFT JOIN sae_measures n ON n.run_id = s.run_id AND n.sae_id = s.sae_id AND n.metric = s.metric
            AND n.group_kind = s.group_kind AND n.group_value = s.group_value AND n.condition = 'shuffled'
        WHERE s.run_id = $run AND s.sae_id = $sae AND s.group_kind = 'feature' AND s.condition = 'sae'
            AND s.metric IN ('predicted_by_token', 'predicted_by_previous_token', 'predicted_by_label')
        QUALIFY row_number() OVER (PARTITION BY s.group_value ORDER BY s.value DESC NULLS LAST, s.metric) = 1
    )
    SELECT f.feature, 'density' AS metric, f.active / f.tokens AS value, f.active, f.documents, f.mean, f.maximum, f.decoder_norm,
        l.label, l.lift, l.lift_low, l.lift_high, l.q, s.rule, s.score, s.score_low, s.score_high, s.score_null, f.tokens AS n
    FROM features f
    LEFT JOIN labelled l USING (feature)
    LEFT JOIN scored s USING (feature)
    WHERE f.run_id = $run AND f.sae_id = $sae
    ORDER BY CASE $sort WHEN 'score' THEN s.score WHEN 'density' THEN f.active WHEN 'maximum' THEN f.maximum WHEN 'lift' THEN l.lift
        ELSE -f.feature END DESC NULLS LAST, f.feature
"""
_POINTS = 2000


@analysis(
    name="features",
    needs=("features",),
    source="feature density: transformer-circuits.pub/2023/monosemantic-features; dense latents: arXiv 2406.04093; "
    "lift: P(active | label) ÷ P(active); score: arXiv 2408.00657, with a table of tokens as predictor",
    section="features",
    order=20,
)
def features(
    run: Run, *, sae: str | None = None, label: str | None = None, sort: Sort = "score", top: Count | None = None
) -> Result:
    """Which latents does an autoencoder have, how often and how strongly do they fire, and what do they go with?

    `value` is the density: the share of tokens on which the latent is over 0. Beside it its activation where it is active; the
    label of largest lift P(active | label) ÷ P(active) among those found at a false-discovery rate of 5 % over all pairs of
    latent and label (the null deals labels out to documents anew); and the score: the largest Pearson correlation between its
    activation and what a simple rule learned on other documents predicts (mean activation by token, by the token before, or by
    label), with that of the same rule when activations are moved along the corpus (labels: dealt out anew).

    Dead: active on no token that was read. Dense: active on more than a tenth.

    Args:
        sae: name of the autoencoder; the newest of the run where not given.
        label: lift of this label, whatever its q, instead of the largest one found.
        sort: what the table is sorted by, the largest first; `number` for the order of latents.
        top: rows kept; all by default.

    Raises:
        InputError: no such autoencoder, or no such label.

    Example:
        >>> import moescope as ms
        >>> ms.analyze(run, "features", sort="density", top=10).df()  # doctest: +SKIP
    """
    chosen = chosen_sae(run, sae)
    _check_label(run, chosen.sae_id, label)
    given = {"sae": chosen.sae_id, "label": label, "sort": sort}
    table = run.sql(_SQL, given).to_arrow_table()
    frame = table.select(["value", "active", "score", "score_null"]).to_pandas()
    kept = table if top is None else table.slice(0, top)
    return Result(
        title=_title(frame),
        table=kept,
        draw=_draw,
        n=int(table["n"][0].as_py()),
        n_unit="tokens",
        definition="Density: share of tokens on which the latent is over 0. Lift: P(active | label) ÷ P(active). Score: the largest of "
        "three Pearson correlations between activation and the mean activation by token, by token before, by label, learned on other "
        f"documents. Dense: over {DENSE:.0%} of tokens.",
        units={
            "value": "share of tokens",
            "active": "tokens",
            "documents": "documents",
            "mean": "activation where active",
            "maximum": "activation",
            "decoder_norm": "L2 norm",
            "lift": "ratio",
            "q": "false-discovery rate",
            "score": "Pearson correlation",
            "score_null": "Pearson correlation",
            "n": "tokens",
        },
        sql=_SQL,
        sql_parameters={"run": run.run_id, **given},
        notes=(
            *reading_notes(run, chosen),
            "lift_low, lift_high, score_low and score_high are 95 % bounds over documents.",
        ),
    )


def _check_label(run: Run, sae_id: str, label: str | None) -> None:
    if label is None:
        return
    known = [
        name
        for (name,) in run.store.fetch(
            "SELECT DISTINCT label FROM feature_labels WHERE run_id = ? AND sae_id = ? ORDER BY 1", [run.run_id, sae_id]
        )
    ]
    if label not in known:
        raise InputError(f"no lift of label {label!r} was measured", expected=f"one of {', '.join(known) or 'none'}")


def _title(frame: pd.DataFrame) -> str:
    dead, dense = int((frame["active"] == 0).sum()), int((frame["value"] > DENSE).sum())
    alive = frame[frame["active"] > 0]
    median = f"the median live one fires on {alive['value'].median():.2%} of tokens" if len(alive) else "none fires"
    scored = frame["score"].dropna()
    told = f"; simple rules explain half the variance of {int((scored**2 > 0.5).sum()):,}" if len(scored) else ""
    return f"{len(frame):,} latents, {dead:,} dead and {dense:,} dense: {median}{told}"


def _draw(result: Result) -> go.Figure:
    """Left how many latents fire how often; right how strongly they do, by what they are worth as a score."""
    from plotly.subplots import make_subplots

    frame = result.df()
    alive = frame[frame["active"] > 0]
    figure = make_subplots(
        rows=1, cols=2, column_widths=[0.48, 0.52], horizontal_spacing=0.12, subplot_titles=["how often they fire", "how strongly"]
    )  # fmt: skip
    density = np.log10(alive["value"].to_numpy(float))
    counts, edges = np.histogram(density, bins=40) if len(alive) else (np.zeros(1), np.array([-1.0, 0.0]))
    figure.add_bar(
        x=(edges[:-1] + edges[1:]) / 2, y=counts, width=np.diff(edges), marker={"color": SERIES[0]}, name="latents",
        customdata=np.stack([10 ** edges[:-1], 10 ** edges[1:]], 1), showlegend=False,
        hovertemplate="%{customdata[0]:.3%} to %{customdata[1]:.3%} of tokens: %{y:,} latents<extra></extra>", row=1, col=1,
    )  # fmt: skip
    figure.add_vline(
        x=float(np.log10(DENSE)), line={"color": CHANCE, "dash": "dash", "width": 1}, row=1, col=1,
        annotation={"text": "dense", "font": {"color": CHANCE, "size": 11}, "yanchor": "top"},
    )  # fmt: skip
    shown = alive if len(alive) <= _POINTS else alive.sample(_POINTS, random_state=0)
    scored = shown["score"].notna()
    for part, trace in ((shown[~scored], "too rare to score"), (shown[scored], "scored")):
        if len(part):
            figure.add_trace(_points(part, trace), row=1, col=2)
    shares = _ticks(10 ** edges[0], 10 ** edges[-1])
    for column in (1, 2):
        figure.update_xaxes(
            title="share of tokens (log scale)", tickvals=np.log10(shares), ticktext=[f"{100 * t:g} %" for t in shares], row=1, col=column
        )  # fmt: skip
    largest = alive["maximum"].dropna()
    heights = _ticks(float(largest.min()), float(largest.max())) if len(largest) else [1.0]
    figure.update_yaxes(title="latents", row=1, col=1)
    figure.update_yaxes(
        title="largest activation (log scale)", type="log", tickvals=heights, ticktext=[f"{t:g}" for t in heights], row=1, col=2
    )  # fmt: skip
    figure.update_layout(height=440, showlegend=bool((~scored).any()))
    return figure


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there are few."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [step * 10.0**power for power in powers for step in ((1, 2, 5) if len(powers) < 5 else (1,))]


def _points(part: pd.DataFrame, name: str) -> go.Scatter:
    scored = name == "scored"
    marker = {"size": 6, "color": CHANCE, "opacity": 0.5}
    if scored:
        bar = {"title": {"text": "score (correlation)", "side": "right"}, "thickness": 12}
        marker = {
            "size": 6,
            "color": part["score"],
            "colorscale": "Cividis",
            "cmin": 0,
            "cmax": 1,
            "opacity": 0.8,
            "colorbar": bar,
        }
    return go.Scatter(
        x=np.log10(part["value"].to_numpy(float)), y=part["maximum"], mode="markers", name=name, marker=marker,
        customdata=np.stack([part["feature"], part["value"], part["score"].fillna(0)], 1), text=[f"F{n}" for n in part["feature"]],
        hovertemplate="latent %{customdata[0]:d}: %{customdata[1]:.3%} of tokens, at most %{y:.3g}, "
        "score %{customdata[2]:.2f}<extra></extra>",
    )  # fmt: skip
