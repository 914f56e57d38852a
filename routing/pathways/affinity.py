"""Affinity of consecutive routers: what one layer's choice says about the next layer's, in bits and in tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.grid import layer_name
from moescope.routing.pathways.pairs import (
    PAIR_WORDS,
    add_pairs,
    document_groups,
    interval_words,
    joint_counts,
    router_steps,
    shuffled_rows,
)
from moescope.routing.trace import Router, read_trace
from moescope.store.run import Run

Floats = NDArray[np.float64]
_METRICS = ("mutual information", "uncertainty coefficient", "affinity")
_CHUNK = 32
_TABLE = 1 << 16


@analysis(
    name="affinity",
    needs=("routing",),
    source="ExFlow, arXiv 2401.08383 (affinity); mutual information between routers of consecutive layers",
    section="pathways",
    order=10,
)
def affinity(
    run: Run,
    *,
    pairs: Literal["first", "all", "same_rank"] = "first",
    distance: Count = 1,
    top: Count = 1,
    block: str | None = None,
    shuffles: Count = 5,
    shuffle: Literal["run", "document"] = "run",
    draws: Count = 200,
    seed: Natural = 0,
) -> Result:
    """How much does the expert chosen at one layer tell of the expert chosen at the next?

    For every router and the one `distance` later, from the joint counts n(i, j) of their experts over tokens: the mutual
    information Σ p(i,j) log2 [p(i,j) / (p(i) p(j))] in bits; the uncertainty coefficient, that over the entropy of the later
    router's choice (1: the later choice is known, 0: nothing is known); and the affinity, Σ_i of the `top` largest p(i,j), the
    share of tokens whose later expert is among the `top` most frequent followers of the earlier one, counted on the same
    tokens. All three are biased upwards on few tokens, so the null is the same number with the later router's decisions
    shuffled over tokens; `bias` is the Miller–Madow term (I − 1)(J − 1) / (2 N ln 2) for I and J experts in use.

    OLMoE's released code counts only the pairs of equal rank (`pairs="same_rank"`), not all pairs of chosen experts
    (`pairs="all"`); published affinities use the first choice.

    Args:
        pairs: which chosen experts of the two routers make a pair.
        distance: routers from the earlier to the later.
        top: followers counted by the affinity.
        block: only routers of this block; none for all, in order of layer and block.
        shuffles: shuffles behind the null.
        shuffle: over the whole run, or inside each document, which keeps what whole documents have in common.
        draws: bootstrap resamples of documents.
        seed: of shuffling and resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     ms.analyze(run, "affinity").df().metric.unique().tolist()
        ['mutual information', 'uncertainty coefficient', 'affinity']
    """
    trace = read_trace(run)
    steps = router_steps(trace, block, distance)
    group, groups = document_groups(trace)
    weights = document_weights(groups, draws=draws, seed=seed)
    generator = np.random.default_rng(seed)
    orders = [shuffled_rows(trace, generator, shuffle) for _ in range(shuffles)]
    rows = []
    for first, second in steps:
        counts = joint_counts(first, second, group, groups, pairs).reshape(groups, -1)
        shape = (first.n_experts, second.n_experts)
        joint = counts.sum(0, dtype=np.float64).reshape(shape)
        bounds = _bounds(counts, weights, shape, top) if groups > 1 else np.full((2, 3), np.nan)
        null = np.mean([_shuffled(first, second, order, pairs, top) for order in orders], axis=0)
        rows += _rows(first, second, joint, bounds, null, top, pairs)
    return Result(
        title=_title(rows, pairs),
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=trace.tokens * len(steps),
        n_unit="tokens × steps between routers",
        definition="Mutual information of the experts chosen by a router and a later one, counting "
        f"{PAIR_WORDS[pairs]}; uncertainty coefficient: that over the entropy of the later choice; "
        f"affinity: share of tokens whose later expert is among the {top} most frequent followers of the earlier one.",
        units={
            "value[mutual information]": "bits",
            "value[uncertainty coefficient]": "share of the later choice's entropy",
            "value[affinity]": "share of tokens" if pairs == "first" else "share of pairs",
            "bias": "bits",
        },
        interval=interval_words(trace, draws, "basic"),
        null=f"the later router's decisions shuffled over tokens of {'the run' if shuffle == 'run' else 'each document'}, "
        f"mean of {shuffles}",
        notes=trace.notes,
        computation="joint counts of experts, their information, shuffles and resamples",
    )


def information(joint: Floats, top: int = 1) -> Floats:
    """Mutual information (bits), uncertainty coefficient and affinity of joint counts.

    Args:
        joint: [..., i, j] counts.
        top: followers counted by the affinity.

    Returns:
        [..., 3]; the coefficient is NaN where the later choice has no entropy.

    Example:
        >>> information(np.eye(4)).tolist()
        [2.0, 1.0, 1.0]
    """
    n = joint.sum((-2, -1))
    later = np.log2(n) - _n_log_n(joint.sum(-2)).sum(-1) / n
    earlier = np.log2(n) - _n_log_n(joint.sum(-1)).sum(-1) / n
    both = np.log2(n) - _n_log_n(joint).sum((-2, -1)) / n
    mutual = np.maximum(earlier + later - both, 0.0)
    share = np.divide(mutual, later, out=np.full_like(mutual, np.nan), where=later > 1e-12)
    kept = min(top, joint.shape[-1])
    followers = (
        np.partition(joint, joint.shape[-1] - kept, axis=-1)[..., -kept:] if kept > 1 else joint.max(-1)[..., None]
    )
    return np.stack([mutual, share, followers.sum((-2, -1)) / n], axis=-1)


def _n_log_n(counts: Floats) -> Floats:
    """n log2 n of whole numbers, looked up where a table of them is worth its while."""
    largest = int(counts.max(initial=0))
    if largest >= min(_TABLE, counts.size):
        whole: Floats = counts * np.log2(np.maximum(counts, 1.0))
        return whole
    numbers = np.arange(largest + 1, dtype=np.float64)
    table: Floats = numbers * np.log2(np.maximum(numbers, 1.0))
    return table[counts.astype(np.int32)]


def _bounds(counts: NDArray[Any], weights: NDArray[np.int64], shape: tuple[int, int], top: int) -> Floats:
    """[low, high] × metric of the basic bootstrap, which turns the resamples' own upward bias round."""
    by_group, drawn = counts.astype(np.float32), weights.astype(np.float32)
    parts = [
        information((drawn[start : start + _CHUNK] @ by_group).astype(np.float64).reshape(-1, *shape), top)
        for start in range(0, len(drawn), _CHUNK)
    ]
    estimate = information(counts.sum(0, dtype=np.float64).reshape(shape), top)
    resampled = np.concatenate(parts)
    if np.isnan(estimate[1]):
        resampled[:, 1] = np.nan
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    ceiling = np.array([np.inf, 1.0, 1.0])
    bounds: Floats = np.clip(np.stack([2 * estimate - high, 2 * estimate - low]), 0.0, ceiling)
    return bounds


def _shuffled(first: Router, second: Router, order: NDArray[np.int64], pairs: Any, top: int) -> Floats:
    joint = np.zeros((1, first.n_experts, second.n_experts), np.int32)
    later = second.experts[:, :1] if pairs == "first" else second.experts
    add_pairs(first.experts, later[order], np.zeros(len(order), np.int32), joint, pairs)
    return information(joint[0].astype(np.float64), top)


def _rows(
    first: Router, second: Router, joint: Floats, bounds: Floats, null: Floats, top: int, pairs: str
) -> list[dict[str, Any]]:
    n = joint.sum()
    used = (np.count_nonzero(joint.sum(1)) - 1) * (np.count_nonzero(joint.sum(0)) - 1)
    bias = used / (2 * n * np.log(2)) if pairs == "first" else None  # pairs of one token are not independent
    values = information(joint, top)
    return [
        {
            "layer": first.layer,
            "block": first.block,
            "to_layer": second.layer,
            "to_block": second.block,
            "metric": metric,
            "value": _known(values[number]),
            "ci_low": _known(bounds[0, number]),
            "ci_high": _known(bounds[1, number]),
            "null": _known(null[number]),
            "bias": bias if number == 0 else None,
            "n": int(n),
        }
        for number, metric in enumerate(_METRICS)
    ]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _of(rows: Iterable[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["metric"] == metric]


def _title(rows: list[dict[str, Any]], pairs: str) -> str:
    bits, mass = _of(rows, "mutual information"), _of(rows, "affinity")
    most = max(bits, key=lambda row: row["value"])
    mean, chance = np.mean([row["value"] for row in bits]), np.mean([row["null"] for row in bits])
    follow, by_chance = np.mean([row["value"] for row in mass]), np.mean([row["null"] for row in mass])
    of = {"first": "first choice", "all": "chosen expert", "same_rank": "expert of a rank"}[pairs]
    return (
        f"A {of} tells {mean:.2f} bits of the next router's on average ({chance:.2f} when shuffled), most from "
        f"{layer_name(most['layer'], most['block'])} to {layer_name(most['to_layer'], most['to_block'])} "
        f"({most['value']:.2f}); {follow:.0%} follow the affinity table ({by_chance:.0%} when shuffled)"
    )


def _draw(result: Result) -> go.Figure:
    from plotly.subplots import make_subplots

    from moescope.core.figures import CHANCE, SERIES

    frame = result.df()
    units = ("bits", "share", result.units["value[affinity]"])
    figure = make_subplots(rows=1, cols=3, horizontal_spacing=0.13)
    for column, metric in enumerate(_METRICS, start=1):
        part = frame[frame["metric"] == metric]
        names = [f"{layer_name(r.layer, r.block)}→{layer_name(r.to_layer, r.to_block)}" for r in part.itertuples()]
        value, low, high = (part[name].astype(float) for name in ("value", "ci_low", "ci_high"))
        figure.add_scatter(
            x=names, y=value, mode="lines+markers", name="measured", legendgroup="measured", showlegend=column == 1,
            line={"color": SERIES[0]}, row=1, col=column,
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
            customdata=np.stack([low, high], axis=-1),
            hovertemplate="%{x}: %{y:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=names, y=part["null"].astype(float), mode="lines", name="decisions shuffled over tokens",
            legendgroup="null", showlegend=column == 1, line={"color": CHANCE, "dash": "dash"}, row=1, col=column,
            hovertemplate="%{x} shuffled: %{y:.4g}<extra></extra>",
        )  # fmt: skip
        figure.update_yaxes(title=f"{metric} ({units[column - 1]})", rangemode="tozero", row=1, col=column)
        figure.update_xaxes(type="category", nticks=12, row=1, col=column)
    figure.update_layout(height=470)
    return figure
