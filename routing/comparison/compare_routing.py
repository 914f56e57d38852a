"""Comparison of the routing of two runs: how far they choose the same experts for the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import CHANCE, SERIES, heatmap, plain
from moescope.core.result import Result
from moescope.core.statistics import document_weights, quotient
from moescope.routing.comparison.aligned import Align, Aligned, align
from moescope.routing.comparison.set_overlap import Array, overlap, random_floor, weighted_overlap
from moescope.routing.grid import layer_name
from moescope.routing.importance.expert_sums import resampling_units
from moescope.routing.trace import Router
from moescope.store.run import Run


@dataclass(frozen=True)
class _Groups:
    """[token] group of every aligned token (−1 for none), their names, and the column that names them."""

    of: NDArray[np.int64]
    names: tuple[str | int | None, ...]
    column: str | None


@analysis(
    name="compare_routing",
    runs=2,
    needs=("routing",),
    source="router saturation: arXiv 2409.02060 §4; selection shift: arXiv 2411.18797; weighted overlap: 1 − L1 distance ÷ 2",
    section="comparison",
    order=20,
)
def compare_routing(
    run: Run,
    other: Run,
    *,
    by: Literal["layer", "label", "position"] = "layer",
    align_by: Align = "auto",
    shuffles: Count = 2,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """How far do two runs choose the same experts for the same tokens?

    With A and B a token's experts in the first and the second run: agreement, share of tokens with A = B; top-1
    agreement, of tokens whose heaviest expert is the same; saturation |A ∩ B| ÷ k, k of the second run (router
    saturation, where the second run is the final checkpoint); Jaccard |A ∩ B| ÷ |A ∪ B|; selection shift, 1 − Jaccard;
    weighted overlap, Σ over experts of the smaller of their two weights, each token's weights summing to 1.

    Args:
        by: pool all tokens of a layer, or tell labels or positions (1, 2, 4, … tokens wide) apart.
        align_by: pair sequences of equal token ids, of equal number (for prompts that differ), or ids with numbers where a
            run has no ids stored.
        shuffles: permutations of the second run's tokens, for the null.
        draws: bootstrap resamples of documents.
        seed: of both.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     runs = [ms.record(ms.load("demo"), ["Hello."], store, name=n, progress=False) for n in ("a", "b")]
        ...     set(ms.analyze(runs, "compare_routing").df().query("metric == 'agreement'")["value"])
        {1.0}
    """
    aligned = align(run, other, align_by)
    groups = _groups(aligned, by)
    unit, units, notes = resampling_units(aligned.first, seed=seed)
    unit = unit[aligned.left]
    resampled = document_weights(units, draws=draws, seed=seed).astype(np.float64) if units > 1 else None
    generator = np.random.default_rng(seed)
    shuffled = [generator.permutation(aligned.right) for _ in range(shuffles)]
    cell = unit * len(groups.names) + groups.of
    frames = [_compared(aligned, pair, groups, cell, units, resampled, shuffled) for pair in aligned.routers]
    frame = pd.concat(frames, ignore_index=True)
    if not (frame["metric"] == "weighted overlap").any():
        notes = (*notes, "Weighted overlap is left out: a run has no routing weights.")
    return Result(
        title=_title(frame, aligned, groups),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=aligned.tokens,
        n_unit="tokens in both runs",
        definition="A, B: a token's experts in the first and the second run. agreement: A = B; top-1 agreement: the same "
        "heaviest expert; saturation: |A ∩ B|/k, k of the second run; Jaccard: |A ∩ B|/|A ∪ B|; selection shift: "
        "1 − Jaccard; weighted overlap: Σ min of the two weights, each token's weights summing to 1.",
        units={"value": "share, 0 to 1", "null": "share", "floor": "share", "n": "tokens"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null=f"the second run's tokens shuffled, mean of {shuffles}: what the loads of the two alone give; floor: two routers "
        "that choose at random (saturation k/E)",
        computation="decisions of tokens of equal sequence, position and id, compared slot by slot",
        notes=(*aligned.notes, *notes),
    )


def _groups(aligned: Aligned, by: str) -> _Groups:
    if by == "label":
        aligned.first.require_labels()
        return _Groups(aligned.first.label[aligned.left].astype(np.int64), aligned.first.label_names, "label")
    if by == "position":
        position = aligned.first.position[aligned.left]
        octave = np.floor(np.log2(position + 1)).astype(np.int64)
        present, of = np.unique(octave, return_inverse=True)
        return _Groups(of.astype(np.int64), tuple(int(2**o - 1) for o in present), "position")
    return _Groups(np.zeros(aligned.tokens, np.int64), (None,), None)


def _compared(
    aligned: Aligned,
    pair: tuple[Router, Router],
    groups: _Groups,
    cell: NDArray[np.int64],
    units: int,
    resampled: Array | None,
    shuffled: list[NDArray[np.int64]],
) -> pd.DataFrame:
    """Rows of one layer."""
    weights = _weights(aligned, pair)
    observed = _measures(aligned, pair, weights, aligned.right)
    chance = [_measures(aligned, pair, weights, right) for right in shuffled]
    inside = groups.of >= 0
    shape = (units, len(groups.names))
    tokens = _summed(None, cell, inside, shape)
    floor = random_floor(pair[0].n_experts, pair[0].top_k, pair[1].top_k)
    frames = []
    for metric, values in observed.items():
        sums = _summed(values, cell, inside, shape)
        low, high = _bounds(sums, tokens, resampled)
        null = np.mean(
            [quotient(_summed(c[metric], cell, inside, shape).sum(0), tokens.sum(0)) for c in chance], axis=0
        )
        part = pd.DataFrame(
            {
                "layer": pair[0].layer,
                "block": pair[0].block,
                "metric": metric,
                "value": quotient(sums.sum(0), tokens.sum(0)),
                "ci_low": low,
                "ci_high": high,
                "null": null,
                "floor": floor.get(metric, np.nan),
                "n": tokens.sum(0).astype(np.int64),
            }
        )
        if groups.column:
            part.insert(2, groups.column, list(groups.names))
        frames.append(part[part["n"] > 0])
    return pd.concat(frames, ignore_index=True)


def _weights(aligned: Aligned, pair: tuple[Router, Router]) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """[row of the trace, k] weights of both; None where a token of either has none."""
    own, theirs = aligned.first.weights(pair[0]), aligned.second.weights(pair[1])
    return None if np.isnan(own).any() or np.isnan(theirs).any() else (own, theirs)


def _measures(
    aligned: Aligned,
    pair: tuple[Router, Router],
    weights: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    right: NDArray[np.int64],
) -> dict[str, Array]:
    """Each metric token by token."""
    own, theirs = aligned.decisions(pair, right)
    shared = overlap(own, theirs)
    union = own.shape[1] + theirs.shape[1] - shared
    jaccard = shared / union
    found = {
        "agreement": (shared == union).astype(np.float64),
        "top-1 agreement": (own[:, 0] == theirs[:, 0]).astype(np.float64),
        "saturation": shared / theirs.shape[1],
        "Jaccard": jaccard,
        "selection shift": 1 - jaccard,
    }
    if weights is not None:
        found["weighted overlap"] = weighted_overlap(own, weights[0][aligned.left], theirs, weights[1][right])
    return found


def _summed(values: Array | None, cell: NDArray[np.int64], inside: NDArray[np.bool_], shape: tuple[int, int]) -> Array:
    if not inside.all():
        cell, values = cell[inside], None if values is None else values[inside]
    return np.bincount(cell, values, minlength=shape[0] * shape[1]).astype(np.float64).reshape(shape)


def _bounds(sums: Array, tokens: Array, resampled: Array | None) -> tuple[Array, Array]:
    """Percentile bounds by group, over the resamples that have a document of it; NaN for a group of one document."""
    low, high = np.full(sums.shape[1], np.nan), np.full(sums.shape[1], np.nan)
    several = (tokens > 0).sum(0) > 1
    if resampled is not None and several.any():
        drawn = quotient(resampled @ sums[:, several], resampled @ tokens[:, several])
        quantile = np.nanquantile if np.isnan(drawn).any() else np.quantile
        low[several], high[several] = quantile(drawn, [0.025, 0.975], axis=0)
    return low, high


def _title(frame: pd.DataFrame, aligned: Aligned, groups: _Groups) -> str:
    names = f"{aligned.first.run.name} → {aligned.second.run.name}"
    part = frame[frame["metric"] == "saturation"]
    layers = part.groupby(["layer", "block"]).apply(_pooled, include_groups=False)
    value, null = np.average(part["value"], weights=part["n"]), np.average(part["null"], weights=part["n"])
    title = f"{names}: {value:.1%} of expert choices stay the same (shuffled tokens: {null:.1%})"
    if groups.column and len(groups.names) > 1:
        means = part.groupby(groups.column).apply(_pooled, include_groups=False)
        word = "at " if groups.column == "position" else ""
        low, high = means.idxmin(), means.idxmax()
        if means[low] == means[high]:
            return title
        return f"{title}, from {means[low]:.1%} {word}{_group(low)} to {means[high]:.1%} {word}{_group(high)}"
    low, high = layers.idxmin(), layers.idxmax()
    if layers[low] == layers[high]:
        return title
    return f"{title}, from {layers[low]:.1%} in {layer_name(*low)} to {layers[high]:.1%} in {layer_name(*high)}"


def _pooled(part: pd.DataFrame) -> float:
    return float(np.average(part["value"], weights=part["n"]))


def _group(name: object) -> str:
    return f"positions {_span(int(name))}" if isinstance(name, int | np.integer) else f"in {str(name)!r}"


def _span(first: int) -> str:
    """The positions of a class that begins at `first`."""
    return f"{first}–{2 * first}" if first else "0"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    for column in ("label", "position"):
        if column in frame:
            return _grid(frame, column)
    figure = go.Figure()
    shown = ("saturation", "agreement", "top-1 agreement", "weighted overlap")
    for number, metric in enumerate(m for m in shown if (frame["metric"] == m).any()):
        part = frame[frame["metric"] == metric]
        names = [layer_name(r.layer, r.block) for r in part.itertuples()]
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
            customdata=np.stack([part["ci_low"], part["ci_high"], part["null"], part["floor"]], axis=-1),
            hovertemplate="%{x}: %{y:.2%} [%{customdata[0]:.2%}, %{customdata[1]:.2%}]<br>shuffled tokens "
            "%{customdata[2]:.2%}, random routers %{customdata[3]:.2%}<extra></extra>",
        )  # fmt: skip
        if metric == "saturation":
            chance = {"mode": "lines", "hoverinfo": "skip"}
            figure.add_scatter(
                x=names,
                y=part["null"],
                name="saturation, shuffled tokens",
                line={"color": CHANCE, "dash": "dash"},
                **chance,
            )
            figure.add_scatter(
                x=names, y=part["floor"], name="random routers, k/E", line={"color": CHANCE, "dash": "dot"}, **chance
            )
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(title="share of tokens or of choices", tickformat=".0%", rangemode="tozero")
    figure.update_layout(height=420)
    return figure


def _grid(frame: pd.DataFrame, column: str) -> go.Figure:
    """Saturation by layer and group."""
    part = frame[frame["metric"] == "saturation"]
    wide = part.pivot_table(index=["layer", "block"], columns=column, values=["value", "null", "n"], dropna=False)
    names = [plain(str(name)) if column == "label" else _span(int(name)) for name in wide["value"].columns]
    figure = heatmap(
        wide["value"].to_numpy(dtype=np.float64),
        x=names,
        y=[layer_name(*place) for place in wide.index],
        customdata=np.stack([wide[name].to_numpy(dtype=np.float64) for name in ("null", "n")], axis=-1),
        colorbar="share of choices that stay the same",
        hover="%{y}, %{x}: %{z:.2%}<br>shuffled tokens %{customdata[0]:.2%}, %{customdata[1]:,.0f} tokens",
    )
    chance = np.average(part["null"], weights=part["n"])
    figure.update_xaxes(title=f"{column} (chance level, tokens shuffled: {chance:.1%})")
    figure.update_yaxes(title="layer")
    return figure
