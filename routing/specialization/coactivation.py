"""Co-activation: which experts are chosen together, beyond what their loads give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import heatmap
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.routing.specialization.expert_pairs import (
    MOST_UNITS,
    PairCounts,
    Pairs,
    chosen_routers,
    conditional_interval,
    count_router,
    resampling_units,
)
from moescope.routing.trace import Trace, read_trace
from moescope.store.run import Run

# Rows of a table that still opens everywhere; above it only the strongest pairs are kept unless asked otherwise.
_ROWS = 100_000
_SHOWN = 24
# A ratio of a handful of tokens says little: such pairs are not named as the strongest.
_FEWEST = 30


@analysis(
    name="coactivation",
    needs=("routing",),
    source="arXiv 2409.02060 §5; Chen, Dempster & Liu 1994 (chance)",
    section="specialization",
    order=50,
)
def coactivation(
    run: Run,
    *,
    pairs: Pairs = "all",
    layer: Natural | None = None,
    top: Count | None = None,
    draws: Count = 200,
    seed: Natural = 0,
) -> Result:
    """Which experts are chosen together, more often than their loads explain?

    For experts i and j of a router, `value` is N_ij ÷ N_i: of the tokens that choose i, the share that also choose j. All
    pairs are counted, so the values of an expert sum to k − 1. `lift` is N_ij · T ÷ (N_i · N_j), the ratio to two
    independent events; `over_chance` is the ratio to the chance level.

    Traps: the lift of unrelated experts is below 1, because experts of one decision differ (0.57 for 2 of 8): the chance
    level used here draws k different experts by load alone. The released code of the paper counts only neighbouring slots of
    the ranked list (`pairs=adjacent`): its rows sum to 2(k − 1) ÷ k, 1.67 instead of 5 for k = 6, so its numbers are lower
    than the definition's.

    Args:
        pairs: `all`, or `adjacent` for the released code's neighbouring slots.
        layer: only this layer; all by default.
        top: pairs kept for each router, those farthest over chance; by default all, or as many as make a table of 100,000
            rows.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Raises:
        InputError: there is no router in that layer.

    Example:
        >>> import tempfile, pathlib
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> trace = pa.table({"sequence_id": [0] * 3, "position": [0, 1, 2], "layer": [0] * 3,
        ...                   "experts": [[0, 1], [1, 0], [2, 0]]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=3)
        ...     frame = ms.analyze(run, "coactivation").df().set_index(["expert", "other"])
        >>> round(frame["value"][0, 1].item(), 4), frame["value"][1, 0].item()
        (0.6667, 1.0)
    """
    trace = read_trace(run)
    routers = chosen_routers(trace, layer)
    every = sum(_ordered(router.n_experts) for router in routers)
    kept = top or (None if every <= _ROWS else max(_ROWS // len(routers), 1))
    unit, units = resampling_units(trace, seed)
    frames = []
    for router in routers:
        found = count_router(router, pairs)
        first, second = _kept(found, kept)
        low, high = conditional_interval(found, first, second, unit, units, pairs=pairs, draws=draws, seed=seed)
        frames.append(_rows(found, first, second, low, high))
    frame = pd.concat(frames, ignore_index=True)
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=trace.tokens,
        n_unit="tokens",
        definition="N_ij ÷ N_i: of the tokens that choose expert i, the share that also choose expert j"
        + (", in neighbouring slots only (as the released code)." if pairs == "adjacent" else ", all slots together.")
        + " over_chance is that over the chance level; lift is N_ij · T ÷ (N_i · N_j).",
        units={
            "value": "share of the expert's tokens",
            "null": "share of the expert's tokens",
            "lift": "ratio",
            "over_chance": "ratio",
            "together": "tokens",
            "n": "tokens of the expert",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples" + _dealt(trace),
        null="k different experts drawn by load alone (conditional Poisson sampling); (k − 1) ÷ (E − 1) for equal loads",
        computation="pairs counted token by token, loads matched by Newton's method",
        notes=(*trace.notes, *_left_out(len(frame), every)),
    )


def _ordered(n_experts: int) -> int:
    return n_experts * (n_experts - 1)


def _dealt(trace: Trace) -> str:
    return f", dealt into {MOST_UNITS} groups" if trace.n_documents > MOST_UNITS else ""


def _left_out(rows: int, every: int) -> tuple[str, ...]:
    if rows == every:
        return ()
    return (
        f"{rows:,} of {every:,} pairs are kept: for each router those farthest over chance. Sums over an expert's rows "
        "are not k − 1 then; ask for one layer, or for more with top.",
    )


def _kept(found: PairCounts, top: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ordered pairs to report: all, or those farthest over chance, pairs with few tokens last."""
    size = found.router.n_experts
    first, second = (np.asarray(part) for part in np.nonzero(~np.eye(size, dtype=bool)))
    if top is None or top >= len(first):
        return first, second
    strength = _strength(found.together, found.chance)[first, second]
    best = np.sort(np.argsort(-strength, kind="stable")[:top])
    return first[best], second[best]


def _strength(together: NDArray[Any], chance: NDArray[Any]) -> NDArray[np.float64]:
    """Ratio to chance, pairs of a handful of tokens last."""
    ratio = np.divide(together, chance, out=np.zeros(np.shape(chance)), where=chance > 0)
    strength: NDArray[np.float64] = np.where(together >= _FEWEST, ratio, ratio * 1e-6)
    return strength


def _rows(
    found: PairCounts,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> pd.DataFrame:
    """One row an ordered pair; experts that nobody chose have no share."""
    tokens, total = found.tokens, len(found.router.experts)
    together, chance = found.together[first, second], found.chance[first, second]
    n_first, n_second = tokens[first].astype(np.float64), tokens[second].astype(np.float64)
    return pd.DataFrame(
        {
            "layer": found.router.layer,
            "block": found.router.block,
            "expert": first,
            "other": second,
            "metric": "co-activation",
            "value": _over(together, n_first),
            "ci_low": low,
            "ci_high": high,
            "null": _over(chance, n_first),
            "lift": _over(together * float(total), n_first * n_second),
            "over_chance": _over(together, chance),
            "together": together,
            "n": tokens[first],
        }
    )


def _over(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.divide(
        numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0
    )
    return ratio


def _title(frame: pd.DataFrame) -> str:
    if not len(frame) or not frame["together"].any():
        return "No token chooses two experts of a router, so none are chosen together"
    found = frame[frame["together"] > 0]
    best = found.loc[found.index[np.argmax(_strength(found["together"].to_numpy(), _expected(found)))]]
    above = found["value"].to_numpy() - found["null"].to_numpy()
    return (
        f"{layer_name(best['layer'], best['block'])}·E{best['expert']} brings E{best['other']} along in {best['value']:.0%} "
        f"of its tokens, {best['over_chance']:.1f}× what load alone gives: the strongest of {len(frame):,} pairs "
        f"(mean distance from chance {np.nanmean(np.abs(above)):.1%} of tokens)"
    )


def _expected(frame: pd.DataFrame) -> NDArray[np.float64]:
    """[row] tokens expected together."""
    expected: NDArray[np.float64] = (frame["null"] * frame["n"]).to_numpy(dtype=float)
    return expected


def _draw(result: Result) -> go.Figure:
    """The router with the strongest pair: the experts of its strongest pairs, as the ratio to chance."""
    frame = result.df()
    if not len(frame):
        return heatmap(np.full((1, 1), np.nan), x=["E0"], y=["E0"], hover="%{x}", colorbar="log2 (observed ÷ chance)")
    strength = _strength(frame["together"].to_numpy(), _expected(frame))
    best = frame.loc[int(np.argmax(strength))]
    mine = (frame["layer"] == best["layer"]) & (frame["block"] == best["block"])
    part = frame[mine].assign(strength=strength[mine]).sort_values("strength", ascending=False, kind="stable")
    picked = list(dict.fromkeys(part[["expert", "other"]].to_numpy().ravel().tolist()))[:_SHOWN]
    row = {expert: number for number, expert in enumerate(picked)}
    part = part[part["expert"].isin(picked) & part["other"].isin(picked)]
    places = [row[e] for e in part["expert"]], [row[e] for e in part["other"]]
    values = np.full((len(picked), len(picked)), np.nan)
    ratio = part["over_chance"].to_numpy(dtype=float)
    values[places] = np.log2(np.clip(ratio, 1 / 16, 16))
    fields = np.full((*values.shape, 6), np.nan)
    columns = ["value", "null", "over_chance", "ci_low", "ci_high", "together"]
    fields[places] = part[columns].to_numpy(dtype=float)
    names = [f"E{expert}" for expert in picked]
    figure = heatmap(
        values,
        x=names,
        y=names,
        diverging=True,
        customdata=fields,
        colorbar="log2 (observed ÷ chance), cut at ±4",
        hover="of the tokens of %{y}, %{customdata[0]:.1%} [%{customdata[3]:.1%}, %{customdata[4]:.1%}] also choose %{x}"
        "<br>by load alone %{customdata[1]:.1%}: %{customdata[2]:.2f}×, %{customdata[5]:,.0f} tokens",
    )
    name = layer_name(int(best["layer"]), str(best["block"]))
    figure.update_xaxes(title=f"also chosen ({name}, the {len(picked)} experts of its strongest pairs)")
    figure.update_yaxes(title="expert")
    figure.update_layout(height=560)
    return figure
