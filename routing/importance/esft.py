"""ESFT: the experts that matter for each label, and how many a layer needs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.grid import layer_name
from moescope.routing.importance.expert_sums import Array, resampling_units, slot_weights
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

P = {"token": 0.2, "gate": 0.1}
# Lines that a figure tells apart by colour.
_LINES = 7


@dataclass(frozen=True)
class _Scores:
    """Scores of one router: [group, expert], their resamples [draw, group, expert], and tokens of each group."""

    router: Router
    value: Array
    drawn: Array | None
    tokens: NDArray[np.int64]


@analysis(
    name="esft",
    needs=("routing",),
    source="arXiv 2407.01906; deepseek-ai/ESFT scripts/expert",
    section="importance",
    order=30,
)
def esft(
    run: Run,
    *,
    score: Literal["token", "gate"] = "token",
    p: float | None = None,
    average: Literal["token", "sequence"] = "token",
    divide: Literal["layer", "released"] = "layer",
    draws: Count = 200,
    seed: Natural = 0,
) -> Result:
    """Which experts are relevant to each label, and how few of them a layer needs?

    Expert-specialised fine-tuning scores expert e of a layer by the share of decisions that name it (token score:
    1/N Σ 1[e chosen] ÷ k), or by its mean weight over all tokens, 0 where it was not chosen (gate score). The relevant set
    is the shortest run of experts, best first (ties by lower id), whose scores sum to at least p of the layer's sum.
    The released configurations come from scores averaged over tokens. The released aggregation script, however, divides
    every score by the sum of that expert id over layers, not by its layer's sum; `divide="released"` does the same.

    Args:
        score: which score decides.
        p: share of the layer's sum to reach; 0.2 for the token score, 0.1 for the gate score.
        average: over tokens, or over sequences of which each first takes its own mean.
        divide: each score by its layer's sum, or, as the released script, by the sum over layers.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     sorted(set(ms.analyze(run, "esft").df()["metric"]))
        ['relevant experts', 'token score']
    """
    p = P[score] if p is None else p
    if not 0 < p <= 1:
        raise InputError(f"parameter 'p' cannot be {p!r}", expected="a share of the layer's sum, over 0 and at most 1")
    trace = read_trace(run)
    if score == "gate":
        trace.require_weights()
    groups = ("all", *trace.label_names)
    unit, units, notes = resampling_units(trace, seed=seed)
    resampled = document_weights(units, draws=draws, seed=seed).astype(np.float64) if units > 1 else None
    scores = [_scores(trace, router, score, average, unit, units, resampled) for router in trace.routers]
    values = [part.value for part in scores]
    drawn = [part.drawn for part in scores if part.drawn is not None]
    shares = _shares(values, divide)
    shares_drawn = _shares(drawn, divide) if drawn else []
    frames = []
    for place, part in enumerate(scores):
        again = shares_drawn[place] if shares_drawn else None
        for group, label in enumerate(groups):
            frames.append(_rows(part, shares[place][group], again, group, label, score, p))
    frame = pd.concat(frames, ignore_index=True)
    return Result(
        title=_title(frame, p, score),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=trace.tokens,
        n_unit="tokens",
        definition=f"{score.capitalize()} score of an expert: "
        + ("share of decisions that name it" if score == "token" else "mean weight over tokens, 0 where not chosen")
        + f", averaged over {average}s. relevant: in the shortest best-first set whose scores reach {p:g} of the "
        + ("layer's sum." if divide == "layer" else "sum, each score divided by the sum over layers (as released)."),
        units={
            f"value[{score} score]": "share of decisions" if score == "token" else "mean weight",
            "value[relevant experts]": "experts",
            "n": "tokens",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="scores alike for all experts: 1/E of the layer's sum each, and p of the experts relevant",
        computation="sums of decisions by document, sorted by layer",
        notes=(*trace.notes, *notes, *_group_notes(trace)),
    )


def _scores(
    trace: Trace,
    router: Router,
    score: str,
    average: str,
    unit: NDArray[np.int64],
    units: int,
    resampled: Array | None,
) -> _Scores:
    """Score by group: all tokens, then every label."""
    amount = np.full(router.experts.shape, 1.0 / router.top_k)
    if score == "gate":
        weights = slot_weights(trace, router, "given")
        if weights is None or np.isnan(weights).any():
            raise InputError(
                f"run {trace.run.name!r} lacks weights of {router.name}, so there is no gate score",
                fix='take score="token", or record from a live model',
            )
        amount = weights
    mass = np.ones(trace.tokens)
    if average == "sequence":
        mass = 1.0 / np.diff(trace.starts)[trace.sequence]
        amount = amount * mass[:, None]
    cell = unit[:, None] * router.n_experts + router.experts
    group_cells, totals, counts = [], [], []
    for group in range(-1, len(trace.label_names)):
        inside = np.ones(trace.tokens, np.bool_) if group < 0 else trace.label == group
        sums = np.bincount(cell[inside].ravel(), amount[inside].ravel(), minlength=units * router.n_experts)
        group_cells.append(sums.reshape(units, router.n_experts))
        totals.append(np.bincount(unit[inside], mass[inside], minlength=units))
        counts.append(np.count_nonzero(inside))
    tokens = np.array(counts)
    value = np.stack([_mean(s.sum(0), t.sum(0)) for s, t in zip(group_cells, totals, strict=True)])
    drawn = None
    if resampled is not None:
        drawn = np.stack(
            [_mean(resampled @ s, (resampled @ t)[:, None]) for s, t in zip(group_cells, totals, strict=True)], axis=1
        )
    return _Scores(router, value, drawn, tokens)


def _mean(total: Array, mass: Array) -> Array:
    mass = np.broadcast_to(mass, total.shape)
    mean: Array = np.divide(total, mass, out=np.full(total.shape, np.nan), where=mass > 0)
    return mean


def _shares(scores: list[Array], divide: str) -> list[Array]:
    """Each score over the sum it is divided by: of its layer, or (released) of its expert id over layers."""
    if divide == "layer":
        return [_mean(values, values.sum(-1, keepdims=True)) for values in scores]
    widest = max(values.shape[-1] for values in scores)
    total = np.zeros((*scores[0].shape[:-1], widest))
    for values in scores:
        total[..., : values.shape[-1]] += values
    return [_mean(values, total[..., : values.shape[-1]]) for values in scores]


def relevant_experts(shares: Array, p: float) -> NDArray[np.bool_]:
    """Which experts are in the shortest best-first set whose shares sum to at least p; along the last axis.

    Where all together stay below p, every expert is in.

    Example:
        >>> relevant_experts(np.array([0.1, 0.6, 0.3]), 0.7).tolist()
        [False, True, True]
    """
    order = np.argsort(-shares, axis=-1, kind="stable")
    ordered = np.take_along_axis(shares, order, axis=-1)
    before = np.cumsum(ordered, axis=-1) - ordered
    taken = before < p - 1e-12
    member = np.zeros(shares.shape, np.bool_)
    np.put_along_axis(member, order, taken, axis=-1)
    return member


def _rows(
    part: _Scores, shares: Array, drawn: Array | None, group: int, label: str, score: str, p: float
) -> pd.DataFrame:
    """A row for every expert, and one for how many are relevant."""
    size = part.router.n_experts
    chosen = relevant_experts(shares, p)
    where = {"layer": part.router.layer, "block": part.router.block, "label": label, "n": int(part.tokens[group])}
    low = high = np.full(size, np.nan)
    bounds = [np.nan, np.nan]
    if drawn is not None and part.drawn is not None:
        whole = np.isfinite(part.drawn[:, group]).all(axis=1)
        if whole.any():
            low, high = np.quantile(part.drawn[whole, group], [0.025, 0.975], axis=0)
            bounds = np.quantile(relevant_experts(drawn[whole, group], p).sum(1), [0.025, 0.975]).tolist()
    experts = pd.DataFrame(
        {
            **where,
            "metric": f"{score} score",
            "expert": pd.array(np.arange(size), dtype="Int64"),
            "value": part.value[group],
            "ci_low": low,
            "ci_high": high,
            "null": part.value[group].sum() / size,
            "relevant": pd.array(chosen, dtype="boolean"),
        }
    )
    count = pd.DataFrame(
        [
            {
                **where, "metric": "relevant experts", "value": float(chosen.sum()), "ci_low": bounds[0],
                "ci_high": bounds[1], "null": float(np.ceil(round(p * size, 9))),
            }
        ]
    ).assign(expert=pd.array([None], dtype="Int64"), relevant=pd.array([None], dtype="boolean"))  # fmt: skip
    return pd.concat([experts, count], ignore_index=True)


def _group_notes(trace: Trace) -> tuple[str, ...]:
    if not trace.label_names:
        return ('No document has a label, so all tokens are one task; "label" (--label-field) tells tasks apart.',)
    unlabelled = int((trace.label < 0).sum())
    return (f"{unlabelled:,} tokens have no label and count under all alone.",) if unlabelled else ()


def _title(frame: pd.DataFrame, p: float, score: str) -> str:
    counts = frame[frame["metric"] == "relevant experts"]
    means = counts.groupby("label")["value"].mean()
    even = counts["null"].mean()
    overall = (
        f"{means['all']:.2f} experts a layer hold {p:.0%} of the {score} score, against {even:.1f} if all were alike"
    )
    labels = means.drop("all")
    if len(labels) < 2:
        return overall
    low, high = labels.idxmin(), labels.idxmax()
    if labels[low] == labels[high]:
        return overall
    return f"{overall}; {low!r} needs the fewest, {labels[low]:.2f}, {high!r} the most, {labels[high]:.2f}"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    frame = frame[frame["metric"] == "relevant experts"]
    means = frame[frame["label"] != "all"].groupby("label")["value"].mean().sort_values()
    spread = np.unique(np.linspace(0, len(means) - 1, min(_LINES - 1, len(means))).round().astype(int))
    figure = go.Figure()
    for number, label in enumerate(["all", *means.index[spread]]):
        part = frame[frame["label"] == label]
        names = [layer_name(r.layer, r.block) for r in part.itertuples()]
        bars = {
            "type": "data", "symmetric": False, "array": part["ci_high"] - part["value"],
            "arrayminus": part["value"] - part["ci_low"], "thickness": 1,
        }  # fmt: skip
        figure.add_scatter(
            x=names,
            y=part["value"],
            mode="lines+markers",
            name=plain(str(label)),
            line={"color": SERIES[number], "width": 3 if number == 0 else 1.5},
            error_y=bars if number == 0 else None,
            customdata=np.stack([part["ci_low"], part["ci_high"], part["n"]], axis=-1),
            hovertemplate="%{x}: %{y} experts [%{customdata[0]:.1f}, %{customdata[1]:.1f}], "
            "%{customdata[2]:,} tokens<extra></extra>",
        )
    part = frame[frame["label"] == "all"]
    figure.add_scatter(
        x=[layer_name(r.layer, r.block) for r in part.itertuples()],
        y=part["null"],
        mode="lines",
        name="all experts alike",
        line={"color": CHANCE, "dash": "dash"},
        hovertemplate="%{x}: %{y} experts if all were alike<extra></extra>",
    )
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(title="relevant experts", rangemode="tozero")
    figure.update_layout(height=400)
    return figure
