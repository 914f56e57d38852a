"""Flips against margin: whether the tokens whose experts change between two runs are those that were nearly undecided."""

from __future__ import annotations

from collections.abc import Callable
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
from moescope.routing.comparison.aligned import Align, Aligned, align
from moescope.routing.comparison.set_overlap import Array, overlap
from moescope.routing.grid import layer_name
from moescope.routing.importance.expert_sums import resampling_units
from moescope.routing.trace import Router
from moescope.store.run import Run

_MARGINS = """
    SELECT token, margin
    FROM routing
    WHERE run_id = $run AND layer = $layer AND block = $block
    ORDER BY token
"""
# Margins are sorted into at most this many classes of equally many tokens for the area under the curve.
_CLASSES = 512


@dataclass(frozen=True)
class _Layer:
    """Tokens and flips of one router by class of margin."""

    router: Router
    edges: Array
    tokens: Array
    flips: Array


@analysis(
    name="routing_flips",
    runs=2,
    needs=("routing",),
    source="margin z(k) − z(k+1): how near the k-th expert was to being replaced",
    section="comparison",
    order=30,
)
def routing_flips(
    run: Run, other: Run, *, bins: Count = 10, align_by: Align = "auto", draws: Count = 500, seed: Natural = 0
) -> Result:
    """Do the tokens whose experts change between two runs have small margins?

    A token flips at a router where an expert of one run's choice is missing from the other's (of the smaller choice,
    where they choose different numbers). Flip rate by class of the first run's margin (classes of about equally many
    tokens of the layer), and the area under the curve: the chance that a token that flips has a smaller margin than one
    that does not, ties counted half. Margins lie in the space where the router takes its top-k.

    Args:
        bins: classes of margin, of about equally many tokens.
        align_by: as in `compare_routing`.
        draws: bootstrap resamples of documents.
        seed: of the resampling.
    """
    aligned = align(run, other, align_by)
    unit, units, notes = resampling_units(aligned.first, seed=seed)
    unit = unit[aligned.left]
    resampled = document_weights(units, draws=draws, seed=seed).astype(np.float64) if units > 1 else None
    frames, without = [], []
    for pair in aligned.routers:
        margin = _margin(aligned, pair[0])
        known = np.isfinite(margin)
        if not known.any():
            without.append(pair[0].name)
            continue
        flipped = _flipped(aligned, pair)[known]
        frames.append(_by_margin(pair[0], margin[known], flipped, unit[known], units, bins, resampled))
    if not frames:
        raise InputError(
            f"run {run.name!r} has no margins",
            expected="decisions of a router whose rule was verified",
            fix="record from a live model; imported traces have none",
        )
    if without:
        notes = (*notes, f"No margins are recorded in {', '.join(without)}.")
    frame = pd.concat(frames, ignore_index=True)
    return Result(
        title=_title(frame, aligned),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=aligned.tokens,
        n_unit="tokens in both runs",
        definition="Flip: an expert of one run's choice is missing from the other's. Flip rate by class of the first run's "
        "margin (k-th minus (k+1)-th score); area under the curve: chance that a token that flips has a smaller margin than "
        "one that does not, ties counted half.",
        units={
            "value[flip rate]": "share of tokens",
            "value[area under the curve]": "probability",
            "margin_low": "score",
            "margin_high": "score",
            "n": "tokens",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="the layer's flip rate, and ½ for the area: margins that say nothing of flips",
        computation="decisions of tokens of equal sequence, position and id, by margin",
        notes=(*aligned.notes, *notes),
    )


def _margin(aligned: Aligned, router: Router) -> Array:
    found = aligned.first.run.sql(_MARGINS, {"layer": router.layer, "block": router.block}).fetchnumpy()
    margin = np.ma.filled(found["margin"].astype(np.float64), np.nan)
    result: Array = margin[np.searchsorted(found["token"], aligned.first.token)][aligned.left]
    return result


def _flipped(aligned: Aligned, pair: tuple[Router, Router]) -> NDArray[np.bool_]:
    own, theirs = aligned.decisions(pair)
    flipped: NDArray[np.bool_] = overlap(own, theirs) < min(own.shape[1], theirs.shape[1])
    return flipped


def _by_margin(
    router: Router,
    margin: Array,
    flipped: NDArray[np.bool_],
    unit: NDArray[np.int64],
    units: int,
    bins: int,
    resampled: Array | None,
) -> pd.DataFrame:
    coarse = _classed(router, margin, flipped, unit, units, bins)
    fine = _classed(router, margin, flipped, unit, units, _CLASSES)
    overall = float(flipped.mean())
    low, high = _bounds(coarse.flips, coarse.tokens, resampled, _rate)
    classes = pd.DataFrame(
        {
            "metric": "flip rate",
            "bin": pd.array(np.arange(coarse.tokens.shape[1]), dtype="Int64"),
            "margin_low": coarse.edges[:-1],
            "margin_high": coarse.edges[1:],
            "value": _rate(coarse.flips.sum(0), coarse.tokens.sum(0)),
            "ci_low": low,
            "ci_high": high,
            "null": overall,
            "n": coarse.tokens.sum(0).astype(np.int64),
        }
    )
    area_low, area_high = _bounds(fine.flips, fine.tokens, resampled, _area)
    area = pd.DataFrame(
        {
            "metric": "area under the curve",
            "bin": pd.array([None], dtype="Int64"),
            "margin_low": np.nan,
            "margin_high": np.nan,
            "value": _area(fine.flips.sum(0), fine.tokens.sum(0)),
            "ci_low": area_low,
            "ci_high": area_high,
            "null": 0.5,
            "n": len(margin),
        }
    )
    frame = pd.concat([classes, area], ignore_index=True)
    frame.insert(0, "layer", router.layer)
    frame.insert(1, "block", router.block)
    return frame


def _classed(
    router: Router, margin: Array, flipped: NDArray[np.bool_], unit: NDArray[np.int64], units: int, bins: int
) -> _Layer:
    """Tokens and flips [unit, class]; classes of equally many tokens, equal margins in one class."""
    values = np.unique(margin)
    cuts = values if len(values) <= bins else np.unique(np.sort(margin)[np.arange(bins) * len(margin) // bins])
    place = np.searchsorted(cuts, margin, side="right") - 1
    size = units * len(cuts)
    cell = unit * len(cuts) + place
    tokens = np.bincount(cell, minlength=size).reshape(units, -1).astype(np.float64)
    flips = np.bincount(cell[flipped], minlength=size).reshape(units, -1).astype(np.float64)
    return _Layer(router, np.append(cuts, values[-1]), tokens, flips)


def _rate(flips: Array, tokens: Array) -> Array:
    rate: Array = np.divide(flips, tokens, out=np.full(flips.shape, np.nan), where=tokens > 0)
    return rate


def _area(flips: Array, tokens: Array) -> Array:
    """[..., 1] chance that a flipped token lies in a lower class than one kept, ties counted half; NaN without either."""
    kept = tokens - flips
    above = kept.sum(-1, keepdims=True) - np.cumsum(kept, axis=-1)
    pairs = flips.sum(-1) * kept.sum(-1)
    wins = (flips * (above + kept / 2)).sum(-1)
    area: Array = np.divide(wins, pairs, out=np.full(np.shape(pairs), np.nan), where=pairs > 0)[..., None]
    return area


def _bounds(
    flips: Array, tokens: Array, resampled: Array | None, measure: Callable[[Array, Array], Array]
) -> tuple[Array, Array]:
    """Percentile bounds of a measure of flips and tokens by class; NaN where a resample leaves it undefined."""
    if resampled is None:
        none = np.full_like(measure(flips.sum(0), tokens.sum(0)), np.nan)
        return none, none
    low, high = np.quantile(measure(resampled @ flips, resampled @ tokens), [0.025, 0.975], axis=0)
    return low, high


def _title(frame: pd.DataFrame, aligned: Aligned) -> str:
    names = f"{aligned.first.run.name} → {aligned.second.run.name}"
    rates = frame[frame["metric"] == "flip rate"]
    overall = np.average(rates["value"], weights=rates["n"])
    areas = frame[(frame["metric"] == "area under the curve") & frame["value"].notna()]
    if areas.empty:
        return f"{names}: {overall:.1%} of decisions flip, so margins have nothing to tell apart"
    lowest, rest = rates[rates["bin"] == 0], rates[rates["bin"] > 0]
    most = f"{np.average(lowest['value'], weights=lowest['n']):.1%} at the smallest margins"
    if len(rest):
        last = rates.loc[rates.groupby(["layer", "block"])["bin"].idxmax()]
        most += f", {np.average(last['value'], weights=last['n']):.1%} at the largest"
    mean = areas["value"].mean()
    return f"{names}: {overall:.1%} of decisions flip, {most}; margin tells flips apart with {mean:.2f} (chance 0.50)"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    areas = frame[frame["metric"] == "area under the curve"].set_index(["layer", "block"])["value"]
    rates = frame[frame["metric"] == "flip rate"]
    marked = {}
    if areas.notna().any():
        marked = {areas.idxmin(): (SERIES[1], "margins say least"), areas.idxmax(): (SERIES[0], "margins say most")}
    parts = {(int(layer), str(block)): part for (layer, block), part in rates.groupby(["layer", "block"], sort=True)}
    figure = go.Figure()
    for number, place in enumerate(sorted(parts, key=lambda p: p in marked)):
        part, (colour, word) = parts[place], marked.get(place, ("#ced4da", ""))
        area = f", {word} ({areas[place]:.2f})" if word else ""
        figure.add_scatter(
            x=(part["bin"].astype(float) + 0.5) / (part["bin"].max() + 1),
            y=part["value"],
            mode="lines+markers",
            name=f"{layer_name(*place)}{area}" if word else "other layers",
            legendgroup=word,
            showlegend=bool(word) or number == 0,
            line={"color": colour, "width": 2.5 if word else 1},
            customdata=np.stack([part[c] for c in ("margin_low", "margin_high", "ci_low", "ci_high", "n")], axis=-1),
            hovertemplate=layer_name(*place) + ", margin %{customdata[0]:.3g} to %{customdata[1]:.3g}: %{y:.1%} flip "
            "[%{customdata[2]:.1%}, %{customdata[3]:.1%}], %{customdata[4]:,} tokens<extra></extra>",
        )
    overall = float(np.average(rates["value"], weights=rates["n"]))
    figure.add_scatter(
        x=[0, 1],
        y=[overall, overall],
        mode="lines",
        name="if margins said nothing",
        line={"color": CHANCE, "dash": "dash"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title="first run's margin, quantile within the layer", tickformat=".0%")
    figure.update_yaxes(title="share of tokens that flip", tickformat=".0%", rangemode="tozero")
    figure.update_layout(height=420)
    return figure
