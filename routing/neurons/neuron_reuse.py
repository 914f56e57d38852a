"""Aggregated use of neurons over a window of tokens, and how many one token shares with the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import SERIES
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.neurons.neuron_activity import NEURONS
from moescope.routing.neurons.recorded_vectors import Vectors, read_vectors, reading_notes, sites_of
from moescope.routing.neurons.tail_error import cut_at
from moescope.store.run import Run

Bits = NDArray[np.uint8]
_USE, _ADDED, _REUSE = "aggregated use", "added by the last token", "reuse"


@dataclass(frozen=True)
class _Active:
    """Active neurons of every token as bits, and how often each neuron is active.

    Attributes:
        bits: [token, byte]; for experts those of all experts seen, one after another.
        size: neurons that a layer has in all.
        rate: [neuron] share of tokens at which it is active, of neurons active at all.
        threshold: |a| from which on a neuron is active.
    """

    bits: Bits
    size: int
    rate: NDArray[np.float64]
    threshold: float


@analysis(
    name="neuron_reuse",
    needs=("activations",),
    source="arXiv 2312.11514: aggregated neuron use, sliding window",
    section="neurons",
    order=30,
)
def neuron_reuse(
    run: Run,
    *,
    threshold: float | None = None,
    cett: float = 0.2,
    longest: Count = 32,
    tokens: Count = 1024,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """How many neurons does a window of consecutive tokens use together, and how many does a token share with the last?

    Aggregated use of w tokens: the neurons active at one of them at least, over all neurons of the layer (for experts, of
    all its experts; those of experts not chosen are inactive); mean over windows of stride 1 inside sequences, all of
    whose tokens are recorded. Added by the last token: aggregated use of w tokens less that of w − 1. Reuse: active
    neurons that a token shares with the one before, over those active at either (Jaccard).

    Args:
        threshold: |a| from which on a neuron is active (0 is never); where not given, the layer's threshold at `cett`.
        cett: CETT under unit columns that sets the threshold (see `neuron_cett`); 0 counts every neuron that is not 0.
        longest: longest window, in tokens; windows are 1, 2, 4, … up to it.
        tokens: recorded tokens to look at, in whole sequences.
        draws: bootstrap resamples of documents.
        seed: of drawing sequences and of resampling.
    """
    if not 0 <= cett <= 1:
        raise InputError(f"parameter 'cett' cannot be {cett!r}", expected="a CETT from 0 to 1")
    read, rows = [], []
    for vectors in read_vectors(run, sites_of(run, NEURONS), limit=tokens, seed=seed):
        read.append(vectors.emptied())
        rows += _rows(vectors, threshold, cett, longest, draws, seed)
    frame = pd.DataFrame(rows)
    if frame.empty or not (frame["window"] > 1).any():
        raise InputError(
            f"run {run.name!r} kept no vectors of two consecutive tokens",
            fix="record the neurons of every token: --probe activations --site blocks.L.mlp.hook_post --sample 1",
        )
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=max(len(v.token) for v in read),
        n_unit="tokens",
        definition="aggregated use: neurons active at one of w consecutive tokens at least, over the layer's neurons (of all "
        "its experts); added by the last token: its growth from w − 1 to w; reuse: |both| / |either| of two consecutive "
        "tokens. Active: |a| ≥ the column threshold, and a ≠ 0.",
        units={
            f"value[{_USE}]": "share of neurons",
            f"value[{_ADDED}]": "share of neurons",
            f"value[{_REUSE}]": "Jaccard index",
            "window": "tokens",
            "threshold": "activation",
            "n": "windows",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="tokens independent of each other, every neuron active at its own rate",
        computation="unions of active neurons, as bits, over windows",
        notes=reading_notes(read),
    )


def _rows(
    vectors: Vectors, threshold: float | None, cett: float, longest: int, draws: int, seed: int
) -> list[dict[str, object]]:
    active = _active(vectors, threshold, cett)
    where = {
        "layer": vectors.site.layer,
        "block": vectors.site.block,
        "inside": vectors.inside,
        "threshold": active.threshold,
    }
    rows: list[dict[str, object]] = []

    def add(metric: str, window: int, first: NDArray[np.int64], values: NDArray[np.float64], null: float) -> None:
        document = vectors.document[first]
        total = np.bincount(document, values, minlength=vectors.documents).astype(np.float64)
        count = np.bincount(document, minlength=vectors.documents).astype(np.float64)
        value, low, high = bootstrap_ratio(total, count, draws=draws, seed=seed)
        rows.append(
            {
                **where, "metric": metric, "window": window, "value": float(value), "ci_low": float(low),
                "ci_high": float(high), "null": null, "n": len(first),
            }
        )  # fmt: skip

    window = 1
    while window <= longest:
        first = _starts(vectors, window)
        if not len(first):
            break
        union = _union(active.bits, first, window)
        add(_USE, window, first, _ones(union) / active.size, _expected(active, window))
        if window > 1:
            before = _union(active.bits, first, window - 1)
            added = (_ones(union) - _ones(before)) / active.size
            add(_ADDED, window, first, added, _expected(active, window) - _expected(active, window - 1))
        if window == 2:
            both = _ones(active.bits[first] & active.bits[first + 1])
            either = _ones(union)
            some = either > 0
            if some.any():
                add(_REUSE, 2, first[some], both[some] / either[some], _expected_reuse(active))
        window *= 2
    return rows


def _active(vectors: Vectors, threshold: float | None, cett: float) -> _Active:
    if threshold is None:
        threshold = cut_at(vectors.values, cett).threshold if (vectors.values != 0).any() else 0.0
    size = np.abs(vectors.values)
    on = (size >= threshold) & (size > 0)
    packed = np.packbits(on, axis=1)
    count, width = len(vectors.token), vectors.values.shape[1]
    if vectors.expert is None:
        rate = on.sum(axis=0) / max(count, 1)
        return _Active(packed[np.argsort(vectors.at, kind="stable")], width, rate[rate > 0], threshold)
    seen, place = np.unique(vectors.expert, return_inverse=True)
    bits = np.zeros((count, len(seen), packed.shape[1]), np.uint8)
    np.bitwise_or.at(bits, (vectors.at, place), packed)
    rate = np.stack([on[place == number].sum(axis=0) for number in range(len(seen))]).ravel() / max(count, 1)
    return _Active(bits.reshape(count, -1), width * int(vectors.experts or len(seen)), rate[rate > 0], threshold)


def _starts(vectors: Vectors, window: int) -> NDArray[np.int64]:
    """First tokens of windows inside a sequence, all of whose tokens are recorded."""
    first = np.arange(len(vectors.token) - window + 1)
    if not len(first):
        return first
    last = first + window - 1
    whole = (vectors.sequence[first] == vectors.sequence[last]) & (
        vectors.position[last] - vectors.position[first] == window - 1
    )
    starts: NDArray[np.int64] = first[whole]
    return starts


def _union(bits: Bits, first: NDArray[np.int64], window: int) -> Bits:
    union = bits[first].copy()
    for step in range(1, window):
        union |= bits[first + step]
    return union


def _ones(bits: Bits) -> NDArray[np.float64]:
    ones: NDArray[np.float64] = np.bitwise_count(bits).sum(axis=1, dtype=np.int64).astype(np.float64)
    return ones


def _expected(active: _Active, window: int) -> float:
    return float((1 - (1 - active.rate) ** window).sum() / active.size)


def _expected_reuse(active: _Active) -> float:
    both = (active.rate**2).sum()
    either = (2 * active.rate - active.rate**2).sum()
    return float(both / either) if either else 0.0


def _title(frame: pd.DataFrame) -> str:
    use = frame[frame["metric"] == _USE]
    longest = use["window"].max()
    one, many = use[use["window"] == 1], use[use["window"] == longest]
    title = (
        f"A token uses {one['value'].mean():.1%} of a layer's neurons, {longest} consecutive tokens {many['value'].mean():.1%} "
        f"(independent tokens: {many['null'].mean():.1%})"
    )
    reuse = frame[frame["metric"] == _REUSE]
    if reuse.empty:
        return title
    return f"{title}; neighbours share {reuse['value'].mean():.1%} of theirs (chance {reuse['null'].mean():.1%})"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    frame = frame[frame["metric"] == _USE]
    places = list(dict.fromkeys(zip(frame["layer"], frame["block"], frame["inside"], strict=True)))
    spread = np.unique(np.linspace(0, len(places) - 1, min(len(SERIES) - 1, len(places))).round().astype(int))
    figure = go.Figure()
    for number, place in enumerate(places[index] for index in spread):
        layer, block, inside = place
        part = frame[(frame["layer"] == layer) & (frame["block"] == block) & (frame["inside"] == inside)]
        name = f"L{layer}" + (" (experts)" if inside == "experts" else "")
        figure.add_scatter(
            x=part["window"],
            y=part["value"],
            mode="lines+markers",
            name=name,
            legendgroup=name,
            line={"color": SERIES[number]},
            customdata=np.stack([part["ci_low"], part["ci_high"], part["null"], part["n"]], axis=-1),
            hovertemplate=name
            + ", %{x} tokens: %{y:.2%} [%{customdata[0]:.2%}, %{customdata[1]:.2%}], independent tokens "
            "%{customdata[2]:.2%}, %{customdata[3]:,} windows<extra></extra>",
        )
        figure.add_scatter(
            x=part["window"],
            y=part["null"],
            mode="lines",
            name="independent tokens (dashed)" if number == 0 else name,
            showlegend=number == 0,
            line={"color": SERIES[number], "dash": "dash", "width": 1.5},
            hoverinfo="skip",
        )
    figure.update_xaxes(title="window (tokens)", type="log", tickvals=sorted(frame["window"].unique()))
    figure.update_yaxes(title="share of the layer's neurons used", tickformat=".0%", rangemode="tozero")
    figure.update_layout(height=420)
    return figure
