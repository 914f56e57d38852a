"""Usage sweep: how much of the work the most used experts of a layer do, as more of them are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.grid import layer_name
from moescope.routing.importance.expert_sums import Array, resampling_units, slot_weights
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

_DECISIONS, _WEIGHT, _TOKENS = "decisions served", "weight served", "tokens served whole"


@dataclass(frozen=True)
class _Folds:
    """Which half of the documents each token and unit lies in; one half only where there is a single unit."""

    token: NDArray[np.int64]
    unit: NDArray[np.int64]
    held_out: bool


@analysis(
    name="usage_sweep",
    needs=("routing",),
    source="arXiv 2306.04640 (usage-based pruning), arXiv 2206.00277, arXiv 2409.01483",
    section="importance",
    order=40,
)
def usage_sweep(
    run: Run, *, target: float = 0.9, held_out: bool = True, draws: Count = 200, seed: Natural = 0
) -> Result:
    """How few experts of a layer would serve most of its routing, if only the most used were kept?

    For every layer and every m, the m most used experts are kept, and what they serve is counted: the share of decisions
    (token, slot) that name one of them, the share of routing weight, and the share of tokens all of whose experts are
    kept. The order of use comes from the other half of the documents, so that it is not judged on what it was chosen by.
    This replays records: a model whose experts are removed routes to others, and its later layers change.

    Args:
        target: share of decisions for which the smallest m is reported.
        held_out: take the order of use from the other half of the documents; false ranks and counts on the same tokens.
        draws: bootstrap resamples of documents, the order of use held fixed.
        seed: of halving and resampling.
    """
    if not 0 < target <= 1:
        raise InputError(
            f"parameter 'target' cannot be {target!r}", expected="a share of decisions, over 0 and at most 1"
        )
    trace = read_trace(run)
    unit, units, notes = resampling_units(trace, seed=seed)
    folds = _folds(unit, units, held_out, seed)
    if held_out and not folds.held_out:
        notes = (*notes, "There is one document only, so experts are ranked and counted on the same tokens.")
    resampled = document_weights(units, draws=draws, seed=seed).astype(np.float64) if units > 1 else None
    frames = [_swept(trace, router, unit, units, folds, resampled, target) for router in trace.routers]
    frame = pd.concat(frames, ignore_index=True)
    if not (frame["metric"] == _WEIGHT).any():
        notes = (*notes, "Weight served is left out: weights were not recorded.")
    return Result(
        title=_title(frame, target),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=trace.decisions,
        n_unit="decisions",
        definition="Of the m most used experts of a layer (kept): share of decisions that name one of them, of routing weight "
        "given to them, of tokens all of whose experts are among them; and the smallest m that serves the target share "
        "of decisions. " + ("Use is ranked on the other half of the documents." if folds.held_out else ""),
        units={
            f"value[{_DECISIONS}]": "share of decisions",
            f"value[{_WEIGHT}]": "share of routing weight",
            f"value[{_TOKENS}]": "share of tokens",
            f"value[experts for {target:.0%}]": "experts",
            "kept": "experts",
            "n": "tokens",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples, the order of use held fixed",
        null="experts used alike: m/E of decisions and weight, C(m, k)/C(E, k) of tokens",
        computation="decisions counted by document and expert, in order of use",
        notes=(*trace.notes, *notes),
    )


def _folds(unit: NDArray[np.int64], units: int, held_out: bool, seed: int) -> _Folds:
    if not held_out or units < 2:
        return _Folds(np.zeros(len(unit), np.int64), np.zeros(units, np.int64), False)
    half = np.random.default_rng(seed).permutation(units) % 2
    return _Folds(half[unit], half, True)


def _swept(
    trace: Trace,
    router: Router,
    unit: NDArray[np.int64],
    units: int,
    folds: _Folds,
    resampled: Array | None,
    target: float,
) -> pd.DataFrame:
    """Rows of one layer: each metric at each m, and the smallest m that reaches the target."""
    size, shape = router.n_experts, (units, router.n_experts)
    cell = unit[:, None] * size + router.experts
    count = np.bincount(cell.ravel(), minlength=units * size).reshape(shape).astype(np.float64)
    place = _places(count, folds)
    served = {_DECISIONS: _in_order(count, place, folds)}
    weights = slot_weights(trace, router, "given")
    if weights is not None and not np.isnan(weights).any():
        weight = np.bincount(cell.ravel(), weights.ravel(), minlength=units * size).reshape(shape).astype(np.float64)
        served[_WEIGHT] = _in_order(weight, place, folds)
    last = place[folds.token[:, None], router.experts].max(axis=1)
    served[_TOKENS] = np.bincount(unit * size + last, minlength=units * size).reshape(shape).astype(np.float64)
    frames = []
    for metric, parts in served.items():
        value, low, high, drawn = _curve(parts, resampled)
        null = _whole_tokens(size, router.top_k) if metric == _TOKENS else np.arange(1, size + 1) / size
        frames.append(_frame(router, metric, np.arange(1, size + 1), value, low, high, null))
        if metric == _DECISIONS:
            frames.append(_reaching(router, value, drawn, target))
    return pd.concat(frames, ignore_index=True).assign(n=trace.tokens)


def _places(count: Array, folds: _Folds) -> NDArray[np.int64]:
    """[fold, expert] place in the order of use, 0 the most used; for a fold, by the tokens of the other one."""
    halves = (1, 0) if folds.held_out else (0,)
    order = np.stack([np.argsort(-count[folds.unit == half].sum(0), kind="stable") for half in halves])
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)
    return place


def _in_order(parts: Array, place: NDArray[np.int64], folds: _Folds) -> Array:
    """[unit, place] what each unit gives the expert at each place of its fold's order."""
    ordered = np.empty_like(parts)
    for fold in range(len(place)):
        inside = folds.unit == fold
        ordered[inside] = parts[inside][:, np.argsort(place[fold])]
    return ordered


def _curve(parts: Array, resampled: Array | None) -> tuple[Array, Array, Array, Array | None]:
    """Share served at each m, its bounds and resamples."""
    value = _cumulative(parts.sum(0))
    if resampled is None:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan), None
    drawn = _cumulative(resampled @ parts)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return value, low, high, drawn


def _cumulative(parts: Array) -> Array:
    total = parts.sum(-1, keepdims=True)
    share = np.divide(np.cumsum(parts, axis=-1), total, out=np.full(parts.shape, np.nan), where=total > 0)
    capped: Array = np.minimum(share, 1.0)
    return capped


def _whole_tokens(size: int, top_k: int) -> Array:
    """C(m, k)/C(E, k) for m = 1 to E."""
    kept = np.arange(1, size + 1, dtype=np.float64)
    chance = np.ones(size)
    for slot in range(top_k):
        chance *= np.clip(kept - slot, 0, None) / (size - slot)
    return chance


def _reaching(router: Router, value: Array, drawn: Array | None, target: float) -> pd.DataFrame:
    limit = target - 1e-12
    needed = np.array([1.0 + (value < limit).sum()])
    low = high = np.full(1, np.nan)
    if drawn is not None:
        low, high = np.quantile(1.0 + (drawn < limit).sum(1), [0.025, 0.975])[:, None]
    null = np.array([np.ceil(round(target * router.n_experts, 9))])
    return _frame(router, f"experts for {target:.0%}", None, needed, low, high, null)


def _frame(
    router: Router, metric: str, kept: NDArray[np.int64] | None, value: Array, low: Array, high: Array, null: Array
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": router.layer,
            "block": router.block,
            "metric": metric,
            "kept": pd.array([None] * len(value) if kept is None else kept, dtype="Int64"),
            "experts": router.n_experts,
            "value": value,
            "ci_low": low,
            "ci_high": high,
            "null": null,
        }
    )


def _title(frame: pd.DataFrame, target: float) -> str:
    part = frame[frame["metric"] == f"experts for {target:.0%}"]
    share = part["value"] / part["experts"]
    least, most = part.loc[share.idxmin()], part.loc[share.idxmax()]
    even = (part["null"] / part["experts"]).mean()
    title = f"The most used {share.mean():.0%} of a layer's experts serve {target:.0%} of its decisions (even use: {even:.0%})"
    if len(part) < 2:
        return title
    if share.min() == share.max():
        return f"{title}, the same in every layer"
    return f"{title}; from {_of(least)} to {_of(most)}"


def _of(row: pd.Series) -> str:
    return f"{int(row['value'])} of {int(row['experts'])} in {layer_name(row['layer'], row['block'])}"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    frame = frame[frame["metric"] == _DECISIONS]
    area = frame.groupby(["layer", "block"])["value"].mean()
    marked = {area.idxmax(): (SERIES[0], "most concentrated"), area.idxmin(): (SERIES[1], "most even")}
    figure = go.Figure()
    parts = {(int(layer), str(block)): part for (layer, block), part in frame.groupby(["layer", "block"], sort=True)}
    for number, place in enumerate(sorted(parts, key=lambda p: p in marked)):
        part, (colour, word) = parts[place], marked.get(place, ("#ced4da", ""))
        figure.add_scatter(
            x=part["kept"] / part["experts"],
            y=part["value"],
            mode="lines",
            name=f"{layer_name(*place)}, {word}" if word else "other layers",
            legendgroup=word,
            showlegend=bool(word) or number == 0,
            line={"color": colour, "width": 2.5 if word else 1},
            customdata=np.stack([part["kept"], part["ci_low"], part["ci_high"]], axis=-1),
            hovertemplate=layer_name(*place) + ": %{customdata[0]} experts serve %{y:.1%} "
            "[%{customdata[1]:.1%}, %{customdata[2]:.1%}]<extra></extra>",
        )
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="experts used alike", line={"color": CHANCE, "dash": "dash"}
    )
    figure.update_xaxes(title="share of the layer's experts kept, most used first", tickformat=".0%")
    figure.update_yaxes(title="share of decisions served", tickformat=".0%", rangemode="tozero")
    figure.update_layout(height=420)
    return figure
