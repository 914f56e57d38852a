"""Which cheap scores of importance rank experts as taking them out does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.effects.sweep_records import EFFECTS_SQL, Array, SweepRecords, read_sweep
from moescope.routing.importance.expert_sums import Gate
from moescope.routing.importance.measures import UNITS, Measured, measure
from moescope.routing.importance.rank_correlation import pooled_spearman_null, spearman, spearman_null
from moescope.routing.trace import read_trace
from moescope.store.run import Run

_ALL, _LAYERS = "all experts", "mean over layers"
_WIDTH = 1.959964


@analysis(
    name="score_agreement",
    needs=("routing", "effects"),
    source="expert pruning policies held against leave-one-out ΔNLL: arXiv 2409.06211 (STUN); Spearman 1904",
    section="effects",
    order=25,
)
def score_agreement(
    run: Run, *, sweep: str | None = None, gate: Gate = "given", draws: Count = 300, seed: Natural = 0
) -> Result:
    """Which scores of importance rank experts as taking each out alone does?

    Spearman's ρ between each measure of `importance` and ΔNLL of the newest sweep of experts: within layers, their mean, and
    over all experts. The null permutes one of the two rankings within every layer, so that layers may differ in scale.
    Experts for which a measure is undefined (never chosen), or that a screened sweep did not run, are left out.

    Args:
        sweep: id of the sweep, or how it begins; the newest sweep of experts by default.
        gate: weights as the experts were given them, those divided by their sum over the token's slots, or the softmax of
            all recorded router logits.
        draws: bootstrap resamples of documents, of measures and effects at once.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sweep_api import sweep
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     _ = sweep(ms.load("demo"), ["Hello world.", "It rains."], store, layers=[5], progress=False)
        ...     ms.analyze(store.run("base"), "score_agreement").n
        16
    """
    records = read_sweep(run, "experts", sweep)
    found, notes = measure(read_trace(run), gate=gate, draws=draws, seed=seed)
    effects = _effects(records, draws, seed)
    names = [name for name in UNITS if all(name in part.values for part in found)]
    rows = [row for name in names for row in _rows(name, [_joined(part, name, effects) for part in found])]
    frame = pd.DataFrame(rows)
    if not len(frame):
        raise InputError(
            "too few experts were taken out to be ranked",
            expected="at least 3 of some layer",
            fix="sweep whole layers: ms.sweep(model, corpus, store)",
        )
    frame["layer"] = frame["layer"].astype("Int64")
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(frame.loc[frame["scope"] == _ALL, "n"].max()),
        n_unit="experts",
        definition="Spearman's ρ between a measure of importance and ΔNLL of taking the expert out alone, over the experts of a "
        "layer, its mean over layers, and over all experts. p: two-sided, from the normal distribution with the null's mean and "
        "variance.",
        units={"value": "Spearman's ρ", "null": "Spearman's ρ", "null_low": "Spearman's ρ", "null_high": "Spearman's ρ",
               "p": "probability"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples; none for measures without sums by document",
        null="one ranking permuted within its layer: the mean over all permutations, null_low to null_high 95 % of them by the normal "
        "distribution",
        sql=EFFECTS_SQL,
        sql_parameters={"run": run.run_id, "sweep": records.sweep_id},
        computation="measures of importance and effects, ranked",
        notes=(f"Sweep {records.sweep_id}.", *notes),
    )  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """A measure and the effects of the experts of one router that have both: [expert], and [draw, expert] resampled."""

    layer: int
    block: str
    values: Array
    effects: Array
    drawn: tuple[Array, Array] | None


def _effects(records: SweepRecords, draws: int, seed: int) -> dict[tuple[int, str, int], tuple[float, Array | None]]:
    """Expert → ΔNLL, and in resamples of documents."""
    totals, n = records.sums("delta_nll")
    weights = document_weights(len(totals), draws=draws, seed=seed).astype(np.float64) if len(totals) > 1 else None
    found = {}
    for number, row in records.frame.iterrows():
        if row["kind"] != "target" or not n[:, number].sum():
            continue
        edit: Any = row["edits"][0]
        drawn = None if weights is None else (weights @ totals[:, number]) / np.maximum(weights @ n[:, number], 1)
        found[edit.layer, edit.block, edit.ids[0]] = (float(totals[:, number].sum() / n[:, number].sum()), drawn)
    return found


def _joined(part: Measured, name: str, effects: dict[tuple[int, str, int], tuple[float, Array | None]]) -> _Pair:
    place = part.router.layer, part.router.block
    values = part.values[name]
    experts = [e for e in range(part.router.n_experts) if (*place, e) in effects and np.isfinite(values[e])]
    known = [effects[*place, e] for e in experts]
    drawn = None
    measured = part.draws.get(name)
    if measured is not None and known and all(d is not None and len(d) == len(measured) for _, d in known):
        again = np.nan_to_num(measured[:, experts])  # a mean over no token, in a resample without the expert
        drawn = again, np.stack([d for _, d in known if d is not None], -1)
    return _Pair(*place, values[experts], np.array([value for value, _ in known]), drawn)


def _rows(name: str, pairs: Sequence[_Pair]) -> list[dict[str, Any]]:
    """Rows of one measure: each layer, their mean, all experts."""
    usable = [pair for pair in pairs if len(pair.values) >= 3]
    rows, layers = [], []
    for pair in usable:
        stacked = np.stack([pair.values, pair.effects])
        variance = float(spearman_null(stacked)[1][0, 1])
        drawn = None if pair.drawn is None else spearman(np.stack(pair.drawn, 1))[:, 0, 1]
        value = float(spearman(stacked)[0, 1])
        if not np.isfinite(value):
            continue  # nothing but ties: there is no order to agree in
        layers.append((value, variance, drawn))
        rows.append(_row(name, "layer", *layers[-1], len(pair.values), layer=pair.layer, block=pair.block))
    if len(layers) > 1:
        resampled = [d for *_, d in layers if d is not None]
        drawn = np.mean(np.nan_to_num(resampled), axis=0) if len(resampled) == len(layers) else None
        value = float(np.mean([v for v, *_ in layers]))
        variance = float(np.sum([v for _, v, _ in layers]) / len(layers) ** 2)
        rows.append(_row(name, _LAYERS, value, variance, drawn, sum(len(p.values) for p in usable)))
    if usable:
        stacked = np.stack([np.concatenate([getattr(p, side) for p in usable]) for side in ("values", "effects")])
        group = np.repeat(np.arange(len(usable)), [len(p.values) for p in usable])
        mean, spread = pooled_spearman_null(stacked, group)
        whole = [p.drawn for p in usable]
        drawn = None
        if all(d is not None for d in whole):
            sides = [np.concatenate([d[i] for d in whole if d is not None], -1) for i in range(2)]
            drawn = spearman(np.stack(sides, 1))[:, 0, 1]
        row = _row(name, _ALL, float(spearman(stacked)[0, 1]), float(spread[0, 1]), drawn, len(group))
        rows.append(_against(row, float(mean[0, 1]), float(spread[0, 1])))
    return [row for row in rows if np.isfinite(row["value"])]


def _row(
    name: str, scope: str, value: float, variance: float, drawn: Array | None, n: int, **place: Any
) -> dict[str, Any]:
    low, high = (np.nan, np.nan)
    if drawn is not None and np.isfinite(drawn).any():
        low, high = np.nanquantile(drawn, [0.025, 0.975])
    row = {
        "metric": name,
        "scope": scope,
        "layer": None,
        "block": None,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "n": n,
    }
    return _against(row | place, 0.0, variance)


def _against(row: dict[str, Any], mean: float, variance: float) -> dict[str, Any]:
    """The row with its null: mean, 95 % and p."""
    from scipy.stats import norm

    spread = float(np.sqrt(variance))
    p = 2 * norm.sf(abs(row["value"] - mean) / spread) if spread > 0 else np.nan
    return row | {"null": mean, "null_low": mean - _WIDTH * spread, "null_high": mean + _WIDTH * spread, "p": float(p)}


def _title(frame: pd.DataFrame) -> str:
    part = frame[frame["scope"] == (_LAYERS if (frame["scope"] == _LAYERS).any() else _ALL)]
    best, worst = part.loc[part["value"].idxmax()], part.loc[part["value"].idxmin()]
    within = "within layers" if best["scope"] == _LAYERS else "over all experts"
    bounds = "" if np.isnan(best["ci_low"]) else f" ({best['ci_low']:.2f} to {best['ci_high']:.2f})"
    name = f"{best['metric'][0].upper()}{best['metric'][1:]}"
    text = f"{name} ranks experts most like taking them out: ρ = {best['value']:.2f}{bounds} {within}"
    beyond = "" if best["p"] < 0.05 else ", no more than chance gives"
    return text + beyond + (f"; {worst['metric']} least, with {worst['value']:.2f}" if len(part) > 1 else "")


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    scope = _LAYERS if (frame["scope"] == _LAYERS).any() else _ALL
    part = frame[frame["scope"] == scope].iloc[::-1]
    figure = go.Figure(
        go.Scatter(
            x=part["value"], y=part["metric"], mode="markers", marker={"color": SERIES[0], "size": 10}, showlegend=False,
            error_x={
                "type": "data", "symmetric": False, "array": part["ci_high"] - part["value"],
                "arrayminus": part["value"] - part["ci_low"], "thickness": 1,
            },
            customdata=part["p"],
            hovertemplate="%{y}: ρ = %{x:.3f}<br>p = %{customdata:.2g}<extra></extra>",
        )
    )  # fmt: skip
    names = list(part["metric"])
    for column, fill in (("null_low", None), ("null_high", "tonextx")):
        figure.add_scatter(
            x=part[column], y=names, mode="lines", line={"width": 0}, fill=fill, fillcolor="rgba(134,142,150,0.22)",
            name="95 % of permuted rankings", showlegend=fill is not None, hoverinfo="skip",
        )  # fmt: skip
    figure.add_scatter(
        x=part["null"],
        y=names,
        mode="lines",
        name="permuted, mean",
        line={"color": CHANCE, "dash": "dash"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title=f"Spearman's ρ with ΔNLL, {scope}", range=[-1, 1])
    figure.update_yaxes(title="", type="category", automargin=True)
    figure.update_layout(height=max(280, 120 + 34 * len(names)))
    return figure
