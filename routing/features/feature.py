"""The card of one latent: what it fires on, what it writes, which labels and latents it goes with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.routing.context import pieces
from moescope.routing.features.feature_examples import draw_examples, example_row
from moescope.routing.features.feature_tables import (
    RULE_NAMES,
    Sae,
    chosen_sae,
    reading_notes,
    token_texts,
    windows,
)
from moescope.store.run import Run

_FEATURE = """
    SELECT active, tokens, documents, mean, maximum, edges, counts, decoder_norm, raised_ids, raised, lowered_ids, lowered
    FROM features
    WHERE run_id = $run AND sae_id = $sae AND feature = $feature
"""
_LABELS = """
    SELECT label, active, tokens, lift, ci_low, ci_high, q
    FROM feature_labels
    WHERE run_id = $run AND sae_id = $sae AND feature = $feature AND lift IS NOT NULL
    ORDER BY lift DESC, label
"""
_LINKS = """
    SELECT l.kind, CASE WHEN l.feature = $feature THEN l.other_feature ELSE l.feature END AS other,
        CASE WHEN l.kind = 'family' AND l.feature = $feature THEN 'member' WHEN l.kind = 'family' THEN 'parent' END AS role,
        s.name AS other_sae, l.value, l.ci_low, l.ci_high, l.null_value, l.n
    FROM feature_links l
    LEFT JOIN saes s ON s.sae_id = l.other_sae_id
    WHERE l.run_id = $run AND l.sae_id = $sae AND l.kind IN ('cosine', 'coactivation', 'family', 'split')
        AND (l.feature = $feature OR (l.other_feature = $feature AND l.other_sae_id = $sae AND l.kind IN ('coactivation', 'family')))
    ORDER BY l.kind, l.value DESC, other
"""
_SCORES = """
    SELECT s.metric, s.value, s.ci_low, s.ci_high, n.value AS null_value, s.n
    FROM sae_measures s
    LEFT JOIN sae_measures n ON n.run_id = s.run_id AND n.sae_id = s.sae_id AND n.metric = s.metric
        AND n.group_kind = s.group_kind AND n.group_value = s.group_value AND n.condition = 'shuffled'
    WHERE s.run_id = $run AND s.sae_id = $sae AND s.group_kind = 'feature' AND s.group_value = $feature::VARCHAR
        AND s.condition = 'sae' AND s.metric IN ('predicted_by_token', 'predicted_by_previous_token', 'predicted_by_label')
    ORDER BY s.value DESC
"""
_BEST = """
    SELECT coalesce(
        (SELECT arg_max(group_value::INTEGER, (value, -group_value::INTEGER)) FROM sae_measures
            WHERE run_id = $run AND sae_id = $sae AND group_kind = 'feature' AND condition = 'sae' AND metric LIKE 'predicted_by_%'
                AND value IS NOT NULL),
        (SELECT arg_max(feature, (active, -feature)) FROM features WHERE run_id = $run AND sae_id = $sae))
"""
_COLUMNS = (
    ("part", pa.string()), ("stratum", pa.int64()), ("rank", pa.int64()), ("text", pa.string()), ("label", pa.string()),
    ("feature", pa.int64()), ("other", pa.int64()), ("other_sae", pa.string()), ("role", pa.string()), ("token_id", pa.int64()),
    ("metric", pa.string()), ("value", pa.float64()), ("ci_low", pa.float64()), ("ci_high", pa.float64()), ("null", pa.float64()),
    ("q", pa.float64()), ("n", pa.int64()), ("low", pa.float64()), ("high", pa.float64()), ("sequence_id", pa.int64()),
    ("position", pa.int64()), ("peak", pa.int64()), ("tokens", pa.string()), ("activations", pa.string()),
)  # fmt: skip
_EXAMPLES, _LABELS_SHOWN = 12, 12


@analysis(
    name="feature",
    needs=("features",),
    source="transformer-circuits.pub/2023/monosemantic-features (examples, histogram, logit effects, quantiles); "
    "arXiv 2408.00657 (families)",
    section="features",
    order=24,
)
def feature(run: Run, *, sae: str | None = None, feature: Natural | None = None) -> Result:
    """What does one latent fire on, what does it write, and what does it go with?

    Rows by `part`. `example`: the largest activations, one a document (stratum 0), and examples drawn at random from quantiles
    of its activations (strata 1, 2, …, from the top down), since the largest alone show a latent at its best; `text` with the
    peak between ⟦ and ⟧, `tokens` and `activations` of the whole window as JSON, the peak being token number `peak` of it.
    `histogram`: tokens in each bin of activation. `raised`, `lowered`: what a unit of activation adds to logits on the direct
    path. `label`: lift P(active | label) ÷ P(active), 1 where the label says nothing. `cosine`, `coactivation`, `family`,
    `split`: other latents. `score`: correlation between activation and what a simple rule learned on other documents predicts.

    Args:
        sae: name of the autoencoder; the newest of the run where not given.
        feature: number of the latent; the one that a simple rule explains best where not given.

    Raises:
        InputError: no such autoencoder, or no such latent.

    Example:
        >>> import moescope as ms
        >>> ms.analyze(run, "feature", feature=17).df().query("part == 'example'")  # doctest: +SKIP
    """
    chosen = chosen_sae(run, sae, table="feature_contexts")
    number = _number(run, chosen, feature)
    given = {"sae": chosen.sae_id, "feature": number}
    facts = _rows(run, _FEATURE, given)[0]
    scores = _rows(run, _SCORES, given)
    rows = [*_examples(run, chosen, number), *_histogram(facts), *_logits(run, facts), *_labels(run, given)]
    rows += [*_links(run, given), *_scored(scores)]
    table = pa.Table.from_pylist([{"feature": number, **row} for row in rows or [_none(facts)]], pa.schema(_COLUMNS))
    notes = list(reading_notes(run, chosen))
    if facts["raised_ids"] is None:
        notes.append("No logit effects: read without the live model, or away from the residual stream's width.")
    return Result(
        title=_title(number, facts, rows, scores),
        table=table,
        draw=_draw,
        n=int(facts["tokens"]),
        n_unit="tokens",
        definition="Examples of one latent with its activation on every token, its histogram, logit effects, lift of labels, "
        "neighbours by decoder cosine, latents it fires with (phi), its family, and how well simple rules predict it.",
        units={
            "value[activation]": "activation",
            "value[tokens]": "tokens",
            "value[logit effect]": "logits for a unit of activation",
            "value[lift]": "ratio",
            "value[cosine]": "cosine",
            "value[phi]": "correlation",
            "value[overlap]": "share of tokens",
            "low": "activation",
            "high": "activation",
            "n": "tokens",
        },
        interval="95 % percentile bootstrap over documents",
        null="lift: 1; cosine: as many random directions; phi and overlap: independent within each document; scores: activations moved "
        "along the corpus (labels: dealt out anew)",
        sql=_FEATURE,
        sql_parameters={"run": run.run_id, **given},
        computation="examples, labels, links and scores of the latent from feature_contexts, feature_labels, feature_links, sae_measures",
        notes=tuple(notes),
    )


def _number(run: Run, chosen: Sae, feature: int | None) -> int:
    if feature is None:
        found = run.sql(_BEST, {"sae": chosen.sae_id}).fetchall()[0][0]
        return int(found)
    if not run.sql(_FEATURE, {"sae": chosen.sae_id, "feature": feature}).fetchall():
        raise InputError(
            f"feature {feature} is no latent of {chosen.name}",
            expected=f"0 to {chosen.d_sae - 1:,}",
            fix="choose one of the analysis features",
        )
    return feature


def _rows(run: Run, query: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run.sql(query, given).to_arrow_table().to_pylist()
    return found


def _none(facts: dict[str, Any]) -> dict[str, Any]:
    """What a latent that never fires has to show."""
    return {"part": "count", "metric": "tokens", "value": float(facts["active"]), "n": facts["tokens"]}


def _examples(run: Run, chosen: Sae, number: int) -> list[dict[str, Any]]:
    return [
        {
            "part": "example", "stratum": w.stratum, "rank": w.rank, "label": w.label, "metric": "activation", "value": w.value,
            "sequence_id": w.sequence_id, "position": w.position, **example_row(w),
        }
        for w in windows(run, chosen, [number], pieces(run))[number]
    ]  # fmt: skip


def _histogram(facts: dict[str, Any]) -> list[dict[str, Any]]:
    edges = facts["edges"] or []
    return [
        {"part": "histogram", "metric": "tokens", "value": float(count), "low": low, "high": high, "n": facts["active"]}
        for low, high, count in zip(edges[:-1], edges[1:], facts["counts"] or [], strict=True)
    ]


def _logits(run: Run, facts: dict[str, Any]) -> list[dict[str, Any]]:
    if facts["raised_ids"] is None:
        return []
    vocabulary = pieces(run)
    return [
        {"part": part, "rank": rank, "text": token_texts([i], vocabulary)[0], "token_id": i, "metric": "logit effect", "value": value}
        for part in ("raised", "lowered")
        for rank, (i, value) in enumerate(zip(facts[f"{part}_ids"], facts[part], strict=True))
    ]  # fmt: skip


def _labels(run: Run, given: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "part": "label", "label": r["label"], "metric": "lift", "value": r["lift"], "ci_low": r["ci_low"], "ci_high": r["ci_high"],
            "null": 1.0, "q": r["q"], "n": r["tokens"],
        }
        for r in _rows(run, _LABELS, given)
    ]  # fmt: skip


def _links(run: Run, given: dict[str, Any]) -> list[dict[str, Any]]:
    metrics = {"coactivation": "phi", "family": "overlap", "split": "cosine"}
    return [
        {
            "part": r["kind"], "other": r["other"], "other_sae": r["other_sae"], "role": r["role"],
            "metric": metrics.get(r["kind"], r["kind"]), "value": r["value"], "ci_low": r["ci_low"], "ci_high": r["ci_high"],
            "null": r["null_value"], "n": r["n"],
        }
        for r in _rows(run, _LINKS, given)
    ]  # fmt: skip


def _scored(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "part": "score", "metric": r["metric"], "value": r["value"], "ci_low": r["ci_low"], "ci_high": r["ci_high"],
            "null": r["null_value"], "n": r["n"],
        }
        for r in scores
    ]  # fmt: skip


def _title(number: int, facts: dict[str, Any], rows: list[dict[str, Any]], scores: list[dict[str, Any]]) -> str:
    if not facts["active"]:
        return f"Latent {number} fires on none of {facts['tokens']:,} tokens"
    told = f"Latent {number} fires on {facts['active'] / facts['tokens']:.2%} of tokens in {facts['documents']:,} documents"
    labels = [r for r in rows if r["part"] == "label" and (r["q"] or 1) < 0.05 and r["value"] > 1]
    if labels:
        told += f", {labels[0]['value']:.1f} times as often in {labels[0]['label']} as on average"
    if scores:
        told += f"; {RULE_NAMES[scores[0]['metric']]} predicts it with correlation {scores[0]['value']:.2f}"
    return told


def _draw(result: Result) -> go.Figure:
    """Examples with the activation on every token as colour; below, the histogram and the lift of labels."""
    from plotly.subplots import make_subplots

    frame = result.df()
    examples = frame[(frame["part"] == "example") & (frame["stratum"] == 0)].head(_EXAMPLES)
    drawn = frame[(frame["part"] == "example") & (frame["stratum"] > 0)]
    examples = pd.concat([examples, drawn.groupby("stratum").head(1)])
    tall = max(len(examples), 1)
    rows = [0.06 + 0.035 * tall, 0.5]
    figure = make_subplots(
        rows=2, cols=2, specs=[[{"colspan": 2}, None], [{}, {}]], row_heights=[r / sum(rows) for r in rows], vertical_spacing=0.13,
        horizontal_spacing=0.16, subplot_titles=["largest activations, and one of each quantile", "activations over 0", "lift of labels"],
    )  # fmt: skip
    names = [
        f"{'largest' if e.stratum == 0 else f'quantile {int(e.stratum)}'} {int(e.rank) + 1}"
        + (f" · {str(e.label)[:24]}" if e.label else "")
        for e in examples.itertuples()
    ]
    draw_examples(figure, examples, names, one_scale=True)
    bins = frame[frame["part"] == "histogram"]
    if len(bins):
        figure.add_bar(
            x=np.sqrt(bins["low"] * bins["high"]), y=bins["value"], width=bins["high"] - bins["low"], marker={"color": SERIES[0]},
            showlegend=False, customdata=bins[["low", "high"]], row=2, col=1,
            hovertemplate="%{customdata[0]:.3g} to %{customdata[1]:.3g}: %{y:,} tokens<extra></extra>",
        )  # fmt: skip
    labels = frame[frame["part"] == "label"].head(_LABELS_SHOWN).iloc[::-1]
    if len(labels):
        figure.add_trace(_lift_points(labels), row=2, col=2)
        figure.add_vline(x=1, line={"color": CHANCE, "dash": "dash"}, row=2, col=2)
    figure.update_xaxes(title="activation", row=2, col=1)
    figure.update_yaxes(title="tokens", row=2, col=1)
    figure.update_xaxes(title="P(active | label) ÷ P(active)", rangemode="tozero", row=2, col=2)
    figure.update_yaxes(type="category", row=2, col=2)
    figure.update_layout(height=470 + 23 * tall)
    return figure


def _lift_points(labels: pd.DataFrame) -> go.Scatter:
    value = labels["value"].astype(float)
    return go.Scatter(
        x=value, y=[plain(str(label))[:28] for label in labels["label"]], mode="markers", showlegend=False,
        marker={"color": [SERIES[1] if q < 0.05 else CHANCE for q in labels["q"].fillna(1)], "size": 8},
        error_x={
            "type": "data", "symmetric": False, "thickness": 1, "color": CHANCE,
            "array": labels["ci_high"].fillna(value) - value, "arrayminus": value - labels["ci_low"].fillna(value),
        },
        hovertemplate="%{y}: %{x:.3g}<extra></extra>",
    )  # fmt: skip
