"""Overlap of labels: how far two labels share the experts that matter for them."""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import heatmap, plain
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.importance.esft import P, relevant_experts
from moescope.routing.importance.expert_sums import Array, slot_weights
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

Sets = NDArray[np.bool_]
_JACCARD = "Jaccard of relevant experts"


@analysis(
    name="esft_overlap",
    needs=("routing", "sequences"),
    source="arXiv 2407.01906 §3: experts shared across tasks",
    section="importance",
    order=35,
)
def esft_overlap(
    run: Run,
    *,
    score: Literal["token", "gate"] = "token",
    p: float | None = None,
    permutations: Count = 50,
    draws: Count = 100,
    seed: Natural = 0,
) -> Result:
    """Do different labels need different experts?

    For every two labels, the Jaccard index |A ∩ B| ÷ |A ∪ B| of their sets of relevant experts (see `esft`), layer by
    layer, and its mean over layers. Two labels that need the same experts do not reach 1, for their texts differ by
    chance: the null shuffles labels over documents, and p counts shuffles with at most the observed overlap.

    Args:
        score: which score decides, as in `esft`.
        p: share of the layer's sum to reach; 0.2 for the token score, 0.1 for the gate score.
        permutations: shuffles of labels over documents.
        draws: bootstrap resamples of documents.
        seed: of both.
    """
    share = P[score] if p is None else p
    if not 0 < share <= 1:
        raise InputError(f"parameter 'p' cannot be {p!r}", expected="a share of the layer's sum, over 0 and at most 1")
    trace = read_trace(run)
    trace.require_labels()
    if len(trace.label_names) < 2:
        raise InputError(f"run {run.name!r} has one label only", fix='give documents a "label" (--label-field)')
    if score == "gate":
        trace.require_weights()
    label = np.full(trace.n_documents, -1)
    label[trace.documents] = trace.labels
    used = label >= 0
    member = (label[used][None, :] == np.arange(len(trace.label_names))[:, None]).astype(np.float64)
    again = document_weights(int(used.sum()), draws=draws, seed=seed).astype(np.float64)
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(int(used.sum())) for _ in range(permutations)]
    layers = [_overlaps(_sums(trace, router, score)[used], member, again, orders, share) for router in trace.routers]
    observed, drawn, shuffled, floor = (np.mean([layer[part] for layer in layers], axis=0) for part in range(4))
    low, high = _bounds(drawn)
    at_most = (1 + (shuffled <= observed + 1e-12).sum(axis=0)) / (1 + permutations)
    pairs = list(combinations(range(len(trace.label_names)), 2))
    tokens = np.bincount(trace.label[trace.label >= 0], minlength=len(trace.label_names))
    table = pa.table(
        {
            "label": [trace.label_names[i] for i, _ in pairs],
            "other": [trace.label_names[j] for _, j in pairs],
            "metric": [_JACCARD] * len(pairs),
            "value": observed,
            "ci_low": pa.array(low, from_pandas=True),
            "ci_high": pa.array(high, from_pandas=True),
            "null": shuffled.mean(axis=0),
            "floor": floor,
            "p": at_most,
            "n": [int(min(tokens[i], tokens[j])) for i, j in pairs],
        }
    )
    return Result(
        title=_title(table),
        table=table,
        draw=_draw,
        n=int(tokens.sum()),
        n_unit="labelled tokens",
        definition=f"|A ∩ B|/|A ∪ B| of the experts relevant to two labels ({score} score, {share:g} of the layer's sum), "
        "mean over layers. p counts shuffles of labels with at most that overlap.",
        units={
            "value": "Jaccard index",
            "null": "Jaccard index",
            "floor": "Jaccard index",
            "p": "probability",
            "n": "tokens",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples, those with documents of both labels",
        null=f"labels shuffled over documents, mean of {permutations} (labels that need the same experts); floor: sets of "
        "the same sizes drawn at random",
        computation="decisions by document and expert, summed by label",
        notes=trace.notes,
    )


def _sums(trace: Trace, router: Router, score: str) -> Array:
    """[document, expert] decisions, or weights."""
    cell = trace.document[:, None].astype(np.int64) * router.n_experts + router.experts
    weights = slot_weights(trace, router, "given") if score == "gate" else None
    if score == "gate" and (weights is None or np.isnan(weights).any()):
        raise InputError(
            f"run {trace.run.name!r} lacks weights of {router.name}, so there is no gate score",
            fix='take score="token"',
        )
    flat = None if weights is None else weights.ravel()
    size = trace.n_documents * router.n_experts
    return np.bincount(cell.ravel(), flat, minlength=size).astype(np.float64).reshape(-1, router.n_experts)


def _overlaps(
    sums: Array, member: Array, again: Array, orders: list[NDArray[np.int64]], share: float
) -> tuple[Array, Array, Array, Array]:
    """Jaccard of every pair of labels: observed [pair], resampled [draw, pair], shuffled [shuffle, pair], and its floor."""
    sets = _relevant(member @ sums, share)
    drawn = np.stack([_jaccard(_relevant((member * weights) @ sums, share)) for weights in again])
    shuffled = np.stack([_jaccard(_relevant(member[:, order] @ sums, share)) for order in orders])
    return _jaccard(sets), drawn, shuffled, _floor(sets)


def _relevant(totals: Array, share: float) -> Sets:
    """[label, expert]; no expert for a label without tokens."""
    total = totals.sum(axis=1, keepdims=True)
    shares = np.divide(totals, total, out=np.zeros_like(totals), where=total > 0)
    sets: Sets = relevant_experts(shares, share) & (total > 0)
    return sets


def _jaccard(sets: Sets) -> Array:
    """[pair] |A ∩ B| ÷ |A ∪ B|; NaN where one of them is empty."""
    first, second = (np.array(part) for part in zip(*combinations(range(len(sets)), 2), strict=True))
    both = (sets[first] & sets[second]).sum(axis=1)
    either = (sets[first] | sets[second]).sum(axis=1)
    some = sets[first].any(axis=1) & sets[second].any(axis=1)
    jaccard: Array = np.divide(both, either, out=np.full(len(both), np.nan), where=some)
    return jaccard


def _floor(sets: Sets) -> Array:
    """[pair] the mean Jaccard index of random sets of the same sizes."""
    from moescope.routing.comparison.set_overlap import random_floor

    sizes = sets.sum(axis=1)
    floors = [random_floor(sets.shape[1], int(a), int(b))["Jaccard"] for a, b in combinations(sizes, 2)]
    return np.array(floors)


def _bounds(drawn: Array) -> tuple[Array, Array]:
    """Percentile bounds over the resamples in which both labels have documents; NaN where hardly any has."""
    low, high = np.full(drawn.shape[1], np.nan), np.full(drawn.shape[1], np.nan)
    for pair, values in enumerate(drawn.T):
        known = values[np.isfinite(values)]
        if 2 * len(known) > len(values):
            low[pair], high[pair] = np.quantile(known, [0.025, 0.975])
    return low, high


def _title(table: pa.Table) -> str:
    frame = table.to_pandas()
    low, high = frame.loc[frame["value"].idxmin()], frame.loc[frame["value"].idxmax()]
    title = (
        f"Two labels share {frame['value'].mean():.0%} of their relevant experts on average (shuffled labels: "
        f"{frame['null'].mean():.0%}, random sets: {frame['floor'].mean():.0%})"
    )
    if len(frame) == 1:
        return title
    return f"{title}, from {low['value']:.0%} ({low['label']}, {low['other']}) to {high['value']:.0%} ({high['label']}, {high['other']})"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    names = list(dict.fromkeys([*frame["label"], *frame["other"]]))
    place = {name: number for number, name in enumerate(names)}
    grid = np.full((len(names), len(names)), np.nan)
    fields = np.full((len(names), len(names), 3), np.nan)
    for row in frame.itertuples():
        for i, j in ((place[row.label], place[row.other]), (place[row.other], place[row.label])):
            grid[i, j] = row.value
            fields[i, j] = row.null, row.floor, row.p
    shown = [plain(str(name)) for name in names]
    figure = heatmap(
        grid,
        x=shown,
        y=shown,
        customdata=fields,
        colorbar="Jaccard of relevant experts",
        hover="%{y} and %{x}: %{z:.3f}<br>shuffled labels %{customdata[0]:.3f}, random sets %{customdata[1]:.3f}, "
        "p = %{customdata[2]:.3f}",
    )
    null, floor = frame["null"].mean(), frame["floor"].mean()
    figure.update_xaxes(title=f"label (labels shuffled: {null:.2f}, random sets: {floor:.2f})")
    figure.update_yaxes(title="label")
    return figure
