"""Whether the measures of importance rank experts alike: rank correlations between all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import heatmap
from moescope.core.result import Result
from moescope.routing.importance.expert_sums import Array, Gate
from moescope.routing.importance.measures import UNITS, Measured, measure
from moescope.routing.importance.rank_correlation import (
    kendall,
    kendall_null,
    pooled_spearman_null,
    spearman,
    spearman_null,
)
from moescope.routing.trace import read_trace
from moescope.store.run import Run

# Correlation, and its mean and variance when one of two rankings is permuted.
_KINDS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], tuple[Array, Array]]]] = {
    "Spearman": (spearman, spearman_null),
    "Kendall": (kendall, kendall_null),
}
# Half the width of 95 % of a normal distribution, in standard deviations.
_WIDTH = 1.959964
_LAYERS, _POOLED = "mean over layers", "all experts"


@dataclass(frozen=True)
class _Compared:
    """Correlations [measure, measure], their resamples (None where there are none), and what permuted ranks give.

    `null` and `variance` are the mean and the variance of a correlation one of whose rankings is permuted, NaN where unknown.
    """

    observed: Array
    drawn: Array | None
    null: Array
    variance: Array
    n: int


@analysis(
    name="importance_agreement",
    needs=("routing",),
    source="Spearman 1904, Kendall 1945 (τ-b), between the measures of `importance`",
    section="importance",
    order=20,
)
def importance_agreement(run: Run, *, gate: Gate = "given", draws: Count = 200, seed: Natural = 0) -> Result:
    """Do the measures of importance rank experts alike?

    Spearman's ρ and Kendall's τ-b between every two measures of `importance`, for each layer over its experts, as the mean
    over layers, and over all experts of the model pooled. Experts for which a measure is undefined (never chosen) are
    left out of their layer. Frequency, hotness and ESFT token score rank alike within a layer by definition, as do
    weighted frequency and ESFT gate score. Pooled correlations also see how layers differ in scale, which the null keeps:
    it permutes one of the two rankings within every layer.

    Args:
        gate: weights as the experts were given them, those divided by their sum over the token's slots, or the softmax
            of all recorded router logits.
        draws: bootstrap resamples of documents.
        seed: of the resampling.
    """
    trace = read_trace(run)
    found, notes = measure(trace, gate=gate, draws=draws, seed=seed)
    names = [name for name in UNITS if all(name in part.values for part in found)]
    rows = []
    for kind in _KINDS:
        compared = [_compare(part, names, kind) for part in found]
        for part, result in zip(found, compared, strict=True):
            rows += _rows(result, names, kind, scope="layer", layer=part.router.layer, block=part.router.block)
        rows += _rows(_mean(compared), names, kind, scope=_LAYERS)
        rows += _rows(_pooled(found, names, kind), names, kind, scope=_POOLED)
    table = pa.Table.from_pandas(pd.DataFrame(rows).astype({"layer": "Int64"}), preserve_index=False)
    experts = sum(part.router.n_experts for part in found)
    return Result(
        title=_title(table.to_pandas()),
        table=table,
        draw=_draw,
        n=experts,
        n_unit="experts",
        definition="Spearman's ρ and Kendall's τ-b between two measures over the experts of a layer; their mean over layers; "
        "and over all experts pooled. p: two-sided, from the normal distribution with the null's mean and variance.",
        units={
            "value": "correlation, −1 to 1",
            "null": "correlation",
            "null_low": "correlation",
            "null_high": "correlation",
            "p": "probability",
            "n": "experts",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples; none for measures without sums by document, "
        "and none for Kendall's τ over all experts pooled",
        null="one of the two rankings permuted within its layer: the exact mean over all permutations, and null_low to "
        "null_high 95 % of the normal distribution with their exact variance; none for Kendall's τ over all experts pooled",
        computation="measures of importance, ranked",
        notes=(*notes, *_undefined(table.to_pandas())),
    )


def _compare(part: Measured, names: list[str], kind: str) -> _Compared:
    correlate, chance = _KINDS[kind]
    values, drawn = _defined(part, names)
    again = None if drawn is None else _without_sums(correlate(drawn), part, names)
    return _Compared(correlate(values), again, *chance(values), values.shape[1])


def _defined(part: Measured, names: list[str]) -> tuple[Array, Array | None]:
    """Values [measure, expert] of experts for which all are defined, and resamples [draw, measure, expert] of them."""
    values = np.stack([part.values[name] for name in names])
    whole = np.isfinite(values).all(0)
    values = values[:, whole]
    if not part.draws:
        return values, None
    count = len(next(iter(part.draws.values())))
    drawn = np.repeat(values[None], count, axis=0)
    for place, name in enumerate(names):
        if name in part.draws:
            again = part.draws[name][:, whole]
            drawn[:, place] = np.where(np.isfinite(again), again, values[place])  # absent from a resample: as it was
    return values, drawn


def _without_sums(drawn: Array, part: Measured, names: list[str]) -> Array:
    fixed = [place for place, name in enumerate(names) if name not in part.draws]
    drawn[:, fixed, :] = np.nan
    drawn[:, :, fixed] = np.nan
    return drawn


def _mean(parts: list[_Compared]) -> _Compared:
    """The mean over the layers in which each correlation is defined; layers are permuted independently."""
    draws = [part.drawn for part in parts if part.drawn is not None]
    drawn = _over_layers(draws) if len(draws) == len(parts) else None
    defined = np.isfinite(np.stack([part.observed for part in parts]))
    count = np.maximum(defined.sum(0), 1)
    variance = np.where(defined, np.stack([part.variance for part in parts]), 0.0).sum(0) / count**2
    observed = _over_layers([part.observed for part in parts])
    return _Compared(observed, drawn, np.zeros_like(observed), variance, sum(part.n for part in parts))


def _over_layers(parts: list[Array]) -> Array:
    stacked = np.stack(parts)
    there = np.isfinite(stacked)
    total = np.where(there, stacked, 0.0).sum(0)
    count = there.sum(0)
    mean: Array = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def _pooled(found: list[Measured], names: list[str], kind: str) -> _Compared:
    defined = [_defined(part, names) for part in found]
    values = np.concatenate([value for value, _ in defined], axis=1)
    if kind == "Kendall":
        unknown = np.full((len(names), len(names)), np.nan)
        return _Compared(_kendall_of_many(values), None, unknown, unknown, values.shape[1])
    again = [drawn for _, drawn in defined if drawn is not None]
    drawn = None
    if len(again) == len(defined):
        drawn = _without_sums(spearman(np.concatenate(again, axis=2)), found[0], names)
    layer = np.repeat(np.arange(len(found)), [value.shape[1] for value, _ in defined])
    return _Compared(spearman(values), drawn, *pooled_spearman_null(values, layer), values.shape[1])


def _kendall_of_many(values: Array) -> Array:
    """τ-b without a matrix of pairs, which all experts of a model would make too large."""
    from scipy.stats import kendalltau

    result = np.eye(len(values))
    constant = np.ptp(values, axis=1) == 0 if values.shape[1] else np.ones(len(values), bool)
    for i in range(len(values)):
        for j in range(i):
            undefined = constant[i] or constant[j]
            result[i, j] = result[j, i] = np.nan if undefined else kendalltau(values[i], values[j]).statistic
    return result


def _rows(part: _Compared, names: list[str], kind: str, **where: object) -> list[dict[str, object]]:
    from scipy.special import erfc

    low, high = _quantiles(part.drawn, part.observed)
    known = np.isfinite(part.observed) & np.isfinite(part.variance) & (part.variance > 0)
    null, spread = np.where(known, part.null, np.nan), np.sqrt(np.where(known, part.variance, np.nan))
    columns = {
        "value": part.observed, "ci_low": low, "ci_high": high, "null": null, "null_low": null - _WIDTH * spread,
        "null_high": null + _WIDTH * spread, "p": erfc(np.abs(part.observed - null) / spread / np.sqrt(2)),
    }  # fmt: skip
    return [
        {"layer": None, "block": None, **where, "metric": kind, "measure": first, "other": names[j]}
        | {name: float(column[i, j]) for name, column in columns.items()}
        | {"n": part.n}
        for i, first in enumerate(names)
        for j in range(i + 1, len(names))
    ]


def _quantiles(draws: Array | None, like: Array) -> tuple[Array, Array]:
    """2.5 % and 97.5 % over draws; NaN where there are none, or where a correlation is undefined in some."""
    if draws is None or not len(draws):
        return np.full_like(like, np.nan), np.full_like(like, np.nan)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return low, high


def _undefined(frame: pd.DataFrame) -> tuple[str, ...]:
    missing = int(frame["value"].isna().sum())
    return (
        (f"{missing:,} correlations are undefined: a ranking there has nothing but ties, or fewer than two experts.",)
        if missing
        else ()
    )


def _title(frame: pd.DataFrame) -> str:
    part = frame[(frame["scope"] == _LAYERS) & (frame["metric"] == "Spearman")].dropna(subset=["value"])
    if part.empty:
        return "No layer has experts whose importance can be ranked"
    pick = part[(part["measure"] == "frequency") & (part["other"] == "REAP")]
    least = part.loc[part["value"].idxmin()]
    if pick.empty:
        pick = part.loc[[part["value"].idxmin()]]
    row = pick.iloc[0]
    agreed = f"{row['measure']} and {row['other']} rank a layer's experts with ρ = {_signed(row['value'])} (chance 0)"
    if least.name == row.name:
        return f"{agreed[0].upper()}{agreed[1:]}, the least of all pairs"
    return (
        f"{agreed[0].upper()}{agreed[1:]}; least alike are {least['measure']} and {least['other']}, "
        f"ρ = {_signed(least['value'])}"
    )


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    frame = frame[frame["scope"] == _LAYERS]
    names = list(dict.fromkeys([*frame["measure"], *frame["other"]]))
    place = {name: number for number, name in enumerate(names)}
    grid = np.full((len(names), len(names)), np.nan)
    for row in frame.itertuples():
        i, j = sorted((place[row.measure], place[row.other]))
        grid[(j, i) if row.metric == "Spearman" else (i, j)] = row.value
    figure = heatmap(grid, x=names, y=names, colorbar="correlation", hover="%{y} and %{x}<br>%{z:.3f}", diverging=True)
    figure.data[0].update(zmin=-1, zmax=1, texttemplate="%{z:.2f}")
    band = frame[frame["metric"] == "Spearman"]["null_high"].dropna()
    chance = f"; chance 0 ± {band.mean():.2f}" if len(band) else ""
    figure.update_xaxes(title=f"Spearman's ρ below, Kendall's τ above the diagonal, mean over layers{chance}")
    figure.update_layout(height=max(320, 170 + 34 * len(names)))
    return figure
