"""Specialization by label: which experts prefer which kind of text, against shuffled labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import heatmap, plain
from moescope.core.result import Result
from moescope.core.statistics import benjamini_hochberg, bootstrap_ratio, permutation_p
from moescope.routing.grid import layer_name
from moescope.store.run import Run

_SQL = """
    SELECT s.document_id, any_value(s.label) AS label, d.layer, d.block, d.expert, count(*) AS tokens
    FROM (SELECT token, layer, block, unnest(experts) AS expert FROM routing WHERE run_id = $run) d
    JOIN tokens t ON t.run_id = $run AND t.token = d.token
    JOIN sequences s ON s.run_id = $run AND s.sequence_id = t.sequence_id
    WHERE s.label IS NOT NULL
    GROUP BY s.document_id, d.layer, d.block, d.expert
"""
_TOKENS = """
    SELECT document_id, any_value(label) AS label, sum(n_tokens)::BIGINT AS tokens
    FROM sequences
    WHERE run_id = $run AND label IS NOT NULL
    GROUP BY document_id
    ORDER BY document_id
"""
_SHOWN = 32
_LIMIT = 16.0


@analysis(
    name="specialization",
    needs=("routing", "sequences"),
    source="arXiv 2409.02060 §5.2: tokens of a domain that select the expert",
    section="experts",
    order=20,
)
def specialization(run: Run, *, permutations: Count = 200, draws: Count = 1000, seed: Natural = 0) -> Result:
    """Which experts prefer which label, beyond what shuffled labels give?

    For every expert and label: the share of the label's tokens that choose the expert (`value`), and `lift`, that share over
    the expert's share of all labelled tokens. The null shuffles labels over documents; p counts shuffles whose lift is at
    least as large, and q controls the false-discovery rate over all pairs.

    Args:
        permutations: shuffles of labels over documents.
        draws: bootstrap resamples of documents.
        seed: of both.
    """
    documents = run.sql(_TOKENS).df()
    labels = sorted(documents["label"].unique())
    if len(labels) < 2:
        raise InputError(
            f"run {run.name!r} has fewer than two labels",
            found=f"{len(labels)}",
            fix='give documents a "label" (--label-field)',
        )
    counts, experts = _counts(run, documents)
    tokens = documents["tokens"].to_numpy().astype(float)
    member = (documents["label"].to_numpy()[None, :] == np.array(labels)[:, None]).astype(float)
    lift, share = _lift(member, counts, tokens)
    shuffled, shuffled_share = _shuffled(member, counts, tokens, permutations, seed)
    p = permutation_p(lift, shuffled)
    q = benjamini_hochberg(p)
    rows = []
    for i, label in enumerate(labels):
        inside = member[i] > 0
        _, low, high = bootstrap_ratio(counts[inside], tokens[inside, None], draws=draws, seed=seed)
        for j, (layer, block, expert) in enumerate(experts):
            rows.append(
                {
                    "layer": layer,
                    "block": block,
                    "expert": expert,
                    "label": label,
                    "metric": "share of the label's tokens",
                    "value": share[i, j],
                    "ci_low": low[j],
                    "ci_high": high[j],
                    "null": shuffled_share[i, j],
                    "lift": lift[i, j],
                    "p": p[i, j],
                    "q": q[i, j],
                    "n": int(tokens[inside].sum()),
                }
            )
    frame = pd.DataFrame(rows).sort_values(["q", "lift"], ascending=[True, False], kind="stable")
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(tokens.sum()),
        n_unit="labelled tokens",
        definition="Share of a label's tokens that choose the expert; lift is that share "
        "over the expert's share of all labelled tokens.",
        units={
            "value": "share of tokens",
            "lift": "ratio",
            "null": "share of tokens",
            "p": "probability",
            "q": "false-discovery rate",
        },
        interval=f"95 % percentile bootstrap over the label's documents, {draws} resamples",
        null=f"mean share when labels are shuffled over documents, {permutations} times; "
        f"the smallest possible p is {1 / (permutations + 1):.3f}",
        sql=_SQL,
        sql_parameters={"run": run.run_id},
        computation="sums over documents, shuffles and resamples",
    )


def _counts(run: Run, documents: pd.DataFrame) -> tuple[NDArray[np.float64], list[tuple[int, str, int]]]:
    """[document, expert] tokens of each document that chose each expert, and the experts in order."""
    frame = run.sql(_SQL).df()
    known = run.store.fetch(
        "SELECT layer, block, n_experts + coalesce(n_null, 0) FROM layers WHERE "
        "run_id = ? AND kind = 'moe' ORDER BY layer, block",
        [run.run_id],
    )
    experts = [(layer, block, expert) for layer, block, size in known for expert in range(size)]
    column = {place: number for number, place in enumerate(experts)}
    row = {document: number for number, document in enumerate(documents["document_id"])}
    counts = np.zeros((len(row), len(experts)))
    places = list(zip(frame["layer"], frame["block"], frame["expert"], strict=True))
    real = [place in column for place in places]  # ids out of range make a run incomplete; it is still looked at
    rows = frame["document_id"].map(row).to_numpy()[real]
    counts[rows, [column[place] for place in places if place in column]] = frame["tokens"].to_numpy()[real]
    return counts, experts


def _lift(member: NDArray[Any], counts: NDArray[Any], tokens: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lift and share, both [label, expert]; lift is 1 where nobody chose the expert."""
    share = (member @ counts) / (member @ tokens)[:, None]
    overall = counts.sum(0) / tokens.sum()
    return np.divide(share, overall, out=np.ones_like(share), where=overall > 0), share


def _shuffled(
    member: NDArray[Any], counts: NDArray[Any], tokens: NDArray[Any], permutations: int, seed: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lifts under shuffled labels [shuffle, label, expert], and the mean share under them."""
    generator = np.random.default_rng(seed)
    results = [_lift(member[:, generator.permutation(len(tokens))], counts, tokens) for _ in range(permutations)]
    return np.stack([lift for lift, _ in results]), np.mean([share for _, share in results], axis=0)


def _title(frame: pd.DataFrame) -> str:
    found = frame[(frame["q"] < 0.05) & (frame["lift"] > 1)]
    if found.empty:
        return "No expert prefers a label beyond what shuffled labels give (q < 0.05)"
    # A rare expert reaches a high lift with a handful of tokens: name one that takes at least the mean share.
    common = found[found["value"] >= frame["value"].mean()]
    best = (found if common.empty else common).sort_values("lift", ascending=False).iloc[0]
    return (
        f"{len(found):,} of {len(frame):,} expert–label pairs are specialized (q < 0.05); "
        f"strongest: {layer_name(best['layer'], best['block'])}·"
        f"E{best['expert']} takes {best['value']:.0%} of {best['label']} "
        f"tokens, {best['lift']:.1f}× its overall share"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    top = frame[frame["lift"] > 1].sort_values(["q", "lift"], ascending=[True, False])
    places = list(dict.fromkeys(zip(top["layer"], top["block"], top["expert"], strict=True)))[:_SHOWN]
    places.sort()
    labels = sorted(frame["label"].unique())
    keyed = frame.set_index(["label", "layer", "block", "expert"])
    lift, fields = np.full((len(labels), len(places)), np.nan), np.full((len(labels), len(places), 4), np.nan)
    for i, label in enumerate(labels):
        for j, place in enumerate(places):
            row = keyed.loc[(label, *place)]
            lift[i, j] = np.log2(np.clip(row["lift"], 1 / _LIMIT, _LIMIT))
            fields[i, j] = [row["value"], row["lift"], row["q"], row["null"]]
    figure = heatmap(
        lift,
        x=[f"{layer_name(a, b)}·E{e}" for a, b, e in places],
        y=[plain(str(label)) for label in labels],
        diverging=True,
        customdata=fields,
        colorbar="log2 lift, cut at ±4",
        hover="%{y} → %{x}<br>%{customdata[0]:.1%} of its tokens, lift %{customdata[1]:.2f}<br>"
        "shuffled labels: %{customdata[3]:.1%}, q = %{customdata[2]:.3f}",
    )
    figure.update_xaxes(title=f"the {len(places)} experts with the strongest preference")
    figure.update_yaxes(title="label")
    return figure
