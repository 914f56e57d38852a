"""Transitions: the table P(expert of the next layer | expert of this layer) of one step between routers."""

from __future__ import annotations

from typing import Literal

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import heatmap
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.grid import layer_name
from moescope.routing.pathways.pairs import PAIR_WORDS, document_groups, interval_words, joint_counts, router_steps
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run


@analysis(
    name="transitions",
    needs=("routing",),
    source="ExFlow, arXiv 2401.08383: P(e at layer l + 1 | e at layer l)",
    section="pathways",
    order=20,
)
def transitions(
    run: Run,
    *,
    layer: Natural | None = None,
    pairs: Literal["first", "all", "same_rank"] = "all",
    distance: Count = 1,
    block: str | None = None,
    draws: Count = 200,
    seed: Natural = 0,
) -> Result:
    """Where do tokens of each expert go at the next layer?

    For one step from a router to the one `distance` later: P(j | i), the share of the pairs that begin at expert i and end at
    expert j, over all pairs of chosen experts of a token (or its first choices, or, as in OLMoE's released code, experts of
    equal rank). `lift` is P(j | i) over P(j), the later expert's share of all pairs: 1 where the layers are independent.

    Args:
        layer: the earlier layer of the step; none for the first one.
        pairs: which chosen experts of the two routers make a pair.
        distance: routers from the earlier to the later.
        block: only routers of this block; none for all, in order of layer and block.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     table = ms.analyze(run, "transitions").df()
        >>> bool((table.groupby("expert").value.sum() - 1 < 1e-9).all())
        True
    """
    trace = read_trace(run)
    first, second = _step(trace, layer, block, distance)
    group, groups = document_groups(trace)
    counts = joint_counts(first, second, group, groups, pairs).astype(np.float64)
    value, low, high = bootstrap_ratio(counts, counts.sum(2, keepdims=True), draws=draws, seed=seed)
    total = counts.sum(0)
    begun, ended = total.sum(1), total.sum(0) / total.sum()
    used = np.flatnonzero(begun)
    i, j = (axis.ravel() for axis in np.meshgrid(used, np.arange(second.n_experts), indexing="ij"))
    lift = np.divide(value[i, j], ended[j], out=np.full(len(i), np.nan), where=ended[j] > 0)
    table = pa.table(
        {
            "layer": np.full(len(i), first.layer),
            "block": [first.block] * len(i),
            "expert": i,
            "to_layer": np.full(len(i), second.layer),
            "to_block": [second.block] * len(i),
            "to_expert": j,
            "metric": ["transition"] * len(i),
            "value": value[i, j],
            "ci_low": pa.array(low[i, j], from_pandas=True),
            "ci_high": pa.array(high[i, j], from_pandas=True),
            "null": ended[j],
            "lift": pa.array(lift, from_pandas=True),
            "n": begun[i].astype(np.int64),
        }
    )
    return Result(
        title=_title(first, second, total),
        table=table,
        draw=_draw,
        n=int(total.sum()),
        n_unit=f"pairs of {trace.tokens:,} tokens",
        definition="P(j | i): of the pairs that begin at expert i of the earlier router, the share that ends at expert j of "
        f"the later one, counting {PAIR_WORDS[pairs]}; lift is that over the later expert's share of all pairs.",
        units={"value": "share of the expert's pairs", "null": "share of pairs", "lift": "ratio"},
        interval=interval_words(trace, draws),
        null="the later expert's share of all pairs: where both routers are independent",
        notes=trace.notes,
        computation="joint counts of experts by document, ratio of sums over documents",
    )


def _step(trace: Trace, layer: int | None, block: str | None, distance: int) -> tuple[Router, Router]:
    steps = router_steps(trace, block, distance)
    for first, second in steps:
        if layer is None or first.layer == layer:
            return first, second
    known = ", ".join(str(first.layer) for first, _ in steps)
    raise InputError(f"no step between routers begins at layer {layer}", expected=f"layer as one of {known}")


def _title(first: Router, second: Router, total: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    places = f"{layer_name(first.layer, first.block)} to {layer_name(second.layer, second.block)}"
    expected = np.outer(total.sum(1), total.sum(0)) / total.sum()
    common = total >= max(
        float(np.mean(total[total > 0])), 2.0
    )  # a rare pair reaches a high lift with a handful of tokens
    lift = np.divide(total, expected, out=np.zeros_like(total), where=(expected > 0) & common)
    i, j = np.unravel_index(int(lift.argmax()), lift.shape)
    if lift[i, j] <= 1:
        return f"From {places} no common pair of experts meets more often than independent layers would have it"
    return (
        f"From {places} the strongest common pair is E{i} → E{j}: {total[i, j] / total[i].sum():.1%} of what leaves "
        f"E{i}, {lift[i, j]:.1f}× as often as independent layers would have it"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    rows, columns = sorted(frame["expert"].unique()), sorted(frame["to_expert"].unique())
    shape = (len(rows), len(columns))
    ordered = frame.sort_values(["expert", "to_expert"])
    with np.errstate(divide="ignore"):
        lift = np.log2(ordered["lift"].to_numpy(float)).reshape(shape)
    lift = np.round(np.clip(lift, -4, 4), 3)
    figure = heatmap(
        lift,
        x=[f"E{e}" for e in columns],
        y=[f"E{e}" for e in rows],
        colorbar="log2 lift, cut at ±4",
        hover="%{y} → %{x}: log2 lift %{z:.2f}",
        diverging=True,
    )
    one = frame.iloc[0]
    figure.update_xaxes(title=f"expert of {layer_name(one['to_layer'], one['to_block'])}")
    figure.update_yaxes(title=f"expert of {layer_name(one['layer'], one['block'])}", nticks=min(len(rows), 32))
    figure.update_layout(height=max(300, min(760, 150 + 9 * len(rows))))
    return figure
