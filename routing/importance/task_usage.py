"""Task usage: whether the experts used most on one label serve it better than they serve the others."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import heatmap, plain
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.grid import layer_name
from moescope.routing.importance.expert_sums import Array
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

_AREA = "area between curves"


@analysis(
    name="task_usage",
    needs=("routing", "sequences"),
    source="arXiv 2306.04640 §5 (use by task), arXiv 2206.00277; area between curves of decisions served",
    section="importance",
    order=45,
)
def task_usage(run: Run, *, permutations: Count = 50, draws: Count = 200, seed: Natural = 0) -> Result:
    """Do the experts used most on a label serve that label better than they serve the others?

    The experts of a layer are ranked by their use on one half of a label's documents. For every m, the m most used serve
    a share of the decisions of the label's other half (in task) and of all other labels' documents (out of task). The
    area between the two curves, the mean over m of their difference, is 0 where labels use experts alike, and larger the
    more a label has experts of its own; both halves take turns and are averaged. This replays records: no expert is removed.

    Args:
        permutations: shuffles of labels over documents, for the null.
        draws: bootstrap resamples of documents, the order of use held fixed.
        seed: of halving, shuffling and resampling.
    """
    trace = read_trace(run)
    trace.require_labels()
    label = np.full(trace.n_documents, -1)
    label[trace.documents] = trace.labels
    documents = np.flatnonzero(label >= 0)
    label = label[documents]
    counts = np.bincount(label, minlength=len(trace.label_names))
    judged = np.flatnonzero(counts > 1)
    if len(trace.label_names) < 2 or not len(judged):
        raise InputError(
            f"run {run.name!r} cannot tell use on one label from use on others",
            expected="two labels, one of them of two documents or more",
            found=", ".join(f"{n!r}: {c}" for n, c in zip(trace.label_names, counts.tolist(), strict=True)),
            fix='give documents a "label" (--label-field)',
        )
    generator = np.random.default_rng(seed)
    half = _halves(label, generator)
    orders = [generator.permutation(len(label)) for _ in range(permutations)]
    again = document_weights(len(label), draws=draws, seed=seed).astype(np.float64)
    rows: list[dict[str, object]] = []
    for router in trace.routers:
        sums = _sums(trace, router)[documents]
        shuffled = [_areas(sums[order], label, half, judged, None)[0] for order in orders]
        values = _areas(sums, label, half, judged, again)
        for place, number in enumerate(judged):
            chance = np.array([part[place] for part in shuffled])
            drawn = values[1:, place]
            known = drawn[np.isfinite(drawn)]
            low, high = np.quantile(known, [0.025, 0.975]) if 2 * len(known) > len(drawn) else (None, None)
            rows.append(
                {
                    "layer": router.layer, "block": router.block, "label": trace.label_names[number], "metric": _AREA,
                    "value": values[0, place], "ci_low": low, "ci_high": high, "null": chance.mean(),
                    "p": (1 + (chance >= values[0, place] - 1e-12).sum()) / (1 + permutations),
                    "n": int((trace.label == number).sum()),
                }
            )  # fmt: skip
    frame = pd.DataFrame(rows).astype({"ci_low": "float64", "ci_high": "float64"})
    alone = [trace.label_names[number] for number in np.flatnonzero(counts == 1)]
    notes = (f"One document only, so not judged: {', '.join(map(repr, alone))}.",) if alone else ()
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int((trace.label >= 0).sum()),
        n_unit="labelled tokens",
        definition="Experts ranked by use on one half of the label's documents; area between curves: mean over m of the share of "
        "decisions that the m most used serve on the label's other half, less that on other labels. p counts shuffles "
        "with at least that area.",
        units={"value": "share of decisions", "null": "share of decisions", "p": "probability", "n": "tokens"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples, the order of use held fixed",
        null=f"labels shuffled over documents, mean of {permutations}; the smallest possible p is "
        f"{1 / (permutations + 1):.3f}",
        computation="decisions by document and expert, in order of use",
        notes=(*trace.notes, *notes),
    )


def _halves(label: NDArray[np.integer], generator: np.random.Generator) -> NDArray[np.int64]:
    """[document] 0 or 1, every label's documents dealt out evenly at random."""
    half = np.empty(len(label), np.int64)
    for number in np.unique(label):
        inside = np.flatnonzero(label == number)
        half[generator.permutation(inside)] = np.arange(len(inside)) % 2
    return half


def _sums(trace: Trace, router: Router) -> Array:
    """[document, expert] decisions."""
    cell = trace.document[:, None].astype(np.int64) * router.n_experts + router.experts
    count = np.bincount(cell.ravel(), minlength=trace.n_documents * router.n_experts)
    return count.astype(np.float64).reshape(-1, router.n_experts)


def _areas(
    sums: Array, label: NDArray[np.integer], half: NDArray[np.int64], judged: NDArray[np.integer], again: Array | None
) -> Array:
    """[1 + draw, label] area between curves: of all documents, then of each resample; NaN where one holds no document."""
    weights = np.ones((1, len(sums))) if again is None else np.concatenate([np.ones((1, len(sums))), again])
    areas = np.zeros((len(weights), len(judged)))
    for place, number in enumerate(judged):
        inside = label == number
        outside = weights[:, ~inside] @ sums[~inside]
        for fold in (0, 1):
            order = np.argsort(-sums[inside & (half == fold)].sum(axis=0), kind="stable")
            other = inside & (half != fold)
            served = _curve((weights[:, other] @ sums[other])[:, order]) - _curve(outside[:, order])
            areas[:, place] += served.mean(axis=1) / 2
    return areas


def _curve(ordered: Array) -> Array:
    """Share of decisions served at each m; NaN where there are none."""
    total = ordered.sum(axis=1, keepdims=True)
    share: Array = np.divide(np.cumsum(ordered, axis=1), total, out=np.full(ordered.shape, np.nan), where=total > 0)
    return share


def _title(frame: pd.DataFrame) -> str:
    means = frame.groupby("label")[["value", "null"]].mean()
    top = means["value"].idxmax()
    found = int((frame["p"] < 0.05).sum())
    return (
        f"{str(top)!r} has experts of its own the most: the experts it uses most serve {means.loc[top, 'value']:.1%} more of its "
        f"decisions than of others' (shuffled labels: {means.loc[top, 'null']:.1%}); p < 0.05 in {found} of {len(frame)} "
        "label × layer pairs"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    wide = frame.pivot_table(index="label", columns=["layer", "block"], values=["value", "null", "p"], dropna=False)
    figure = heatmap(
        wide["value"].to_numpy(dtype=np.float64),
        x=[layer_name(*place) for place in wide["value"].columns],
        y=[plain(str(name)) for name in wide.index],
        customdata=np.stack([wide[name].to_numpy(dtype=np.float64) for name in ("null", "p")], axis=-1),
        colorbar="in task − out of task",
        hover="%{y}, %{x}: %{z:.2%}<br>shuffled labels %{customdata[0]:.2%}, p = %{customdata[1]:.3f}",
    )
    figure.update_xaxes(title=f"layer (chance, labels shuffled: {frame['null'].mean():.1%})")
    figure.update_yaxes(title="label")
    return figure
