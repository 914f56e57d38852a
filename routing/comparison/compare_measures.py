"""Every measure that two runs share: both values, and the difference with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, heatmap, plain
from moescope.core.result import Result
from moescope.core.statistics import document_weights, quotient
from moescope.routing.comparison.paired_sequences import GENERATED_LEFT_OUT, generated, paired_sequences
from moescope.routing.comparison.sequence_sums import UNITS, load_variation, sequence_sums
from moescope.routing.grid import layer_name
from moescope.store.run import Run

Array = NDArray[np.float64]
_BUNDLES = 2000
_KEY = ["metric", "layer", "block"]
ROUNDING = 1e-6
"""Relative differences below it come from the order in which float32 numbers were added."""


def moved(value: Any, relative: Any) -> Any:
    """Whether a difference is more than rounding; one without a relative difference (from a value of 0) is, unless it is 0."""
    return np.logical_and(np.not_equal(value, 0), np.logical_not(np.abs(relative) <= ROUNDING))


@dataclass(frozen=True)
class _Side:
    """One run: [unit, cell] sums and counts, cells in the order of `cells`."""

    total: Array
    n: Array


@analysis(
    name="compare_measures",
    runs=2,
    needs=("sequences",),
    source="paired bootstrap over documents (Efron & Tibshirani 1993)",
    section="comparison",
    order=10,
)
def compare_measures(
    run: Run, other: Run, *, by: Literal["model", "layer"] = "model", draws: Count = 500, seed: Natural = 0
) -> Result:
    """By how much do two runs differ in every measure that both have?

    Each measure is a mean over tokens: NLL, the share of tokens that were the most likely next one, router entropy, router
    margin, weight of the first choice, norm of expert outputs, norm of the residual stream, attention to the first token. The
    difference is the other run's mean less the first run's. Where the runs share sequences (equal token ids), both means are
    taken over these alone and the difference is paired: a resample draws the same documents for both. Where they share none,
    each run's documents are drawn by themselves, and the interval says less. The coefficient of variation of expert loads is
    told over all texts of each run, without an interval. Generated tokens are left out: runs share what was given to them.

    Args:
        by: one number for the model, layers pooled, or one a layer.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     runs = [ms.record(ms.load("demo"), ["Hello."], store, name=n, progress=False) for n in ("a", "b")]
        ...     set(ms.analyze(runs, "compare_measures").df()["value"])
        {0.0}
    """
    pairs = paired_sequences(run, other)
    read = [sequence_sums(one) for one in (run, other)]
    found = " in the first, ".join(_listed(one) for one in read) + " in the second"
    sums, left_out = _in_both(read), 0
    if len(pairs):
        sums, left_out = _paired(sums, pairs)
        units = [dict(zip(pairs[column], pairs["document_id"], strict=True)) for column in ("sequence_id", "other_id")]
    else:
        units = [_documents(one) for one in (run, other)]
    sums = [_prepared(one, by) for one in sums]
    cells = _common(sums)
    loads = _loads(run, other, by)
    if cells.empty and loads.empty:
        raise InputError(
            f"runs {run.name!r} and {other.name!r} share no measure",
            found=found,
            fix="record both with the same probes",
        )
    sides, documents = _sides(sums, cells, units, paired=bool(len(pairs)), seed=seed)
    frame = _differences(cells, sides, documents, draws=draws, seed=seed, paired=bool(len(pairs)))
    frame = _ordered(pd.concat([frame, loads], ignore_index=True) if len(loads) else frame, by)
    return Result(
        title=_title(frame, run, other, by),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw_layers if by == "layer" else _draw_model,
        n=int(frame["n"].max()),
        n_unit="tokens or decisions in each run",
        definition=f"value: mean in {other.name} less mean in {run.name}; relative: the difference over |{run.name}|. "
        + ("Both over the sequences that the runs share" if len(pairs) else "Each over its own texts")
        + "; CV of expert load: over all texts of each run, without an interval.",
        units={f"value[{metric}]": UNITS[metric] for metric in frame["metric"].unique()}
        | {"relative": "share of first"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples, "
        + ("the same documents drawn for both" if len(pairs) else "each run's own drawn by themselves: unpaired"),
        null="no difference: 0",
        computation="ratios of sums by sequence, sequences paired by their token ids",
        notes=(*_notes(run, other, pairs, left_out), *_without_percent(frame, run, by)),
    )


def _in_both(sums: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """The rows of measures, layers and blocks that both runs have, so that layers pooled are the same layers."""
    cells = _common(sums)
    return [frame.merge(cells, on=_KEY) for frame in sums]


def _paired(sums: list[pd.DataFrame], pairs: pd.DataFrame) -> tuple[list[pd.DataFrame], int]:
    """The sums that both runs have of a shared sequence, and how many cells of sequence × measure only one has as a number."""
    partner = dict(zip(pairs["other_id"], pairs["sequence_id"], strict=True))
    keyed = [
        sums[0][sums[0]["sequence_id"].isin(pairs["sequence_id"])].assign(pair=lambda f: f["sequence_id"]),
        sums[1][sums[1]["sequence_id"].isin(pairs["other_id"])].assign(pair=lambda f: f["sequence_id"].map(partner)),
    ]
    key = [*_KEY, "pair"]
    both = keyed[0][key].merge(keyed[1][key], on=key)
    left_out = sum(len(frame) for frame in keyed) - 2 * len(both)
    return [frame.merge(both, on=key).drop(columns="pair") for frame in keyed], left_out


def _prepared(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    if by == "layer":
        return frame[frame["layer"] >= 0]
    return frame.assign(layer=-1, block="").groupby([*_KEY, "sequence_id"], as_index=False)[["total", "n"]].sum()


def _documents(run: Run) -> dict[int, int]:
    return dict(run.store.fetch("SELECT sequence_id, document_id FROM sequences WHERE run_id = ?", [run.run_id]))


def _common(sums: list[pd.DataFrame]) -> pd.DataFrame:
    first, second = (frame[_KEY].drop_duplicates() for frame in sums)
    return first.merge(second, on=_KEY).reset_index(drop=True)


def _listed(frame: pd.DataFrame) -> str:
    return ", ".join(sorted(frame["metric"].unique())) or "nothing"


def _sides(
    sums: list[pd.DataFrame], cells: pd.DataFrame, units: list[dict[int, int]], *, paired: bool, seed: int
) -> tuple[list[_Side], list[int]]:
    """[unit, cell] sums of both runs and the number of units of each; paired runs share their units."""
    number = cells.reset_index().rename(columns={"index": "cell"})
    of = [_bundled(sorted(set(own.values())), seed) for own in units]
    counts = [max(own.values(), default=-1) + 1 for own in of]
    sides = []
    for frame, own, bundle, count in zip(sums, units, of, counts, strict=True):
        rows = frame.merge(number, on=_KEY)
        unit = rows["sequence_id"].map(own).map(bundle).to_numpy(np.int64)
        total, n = np.zeros((count, len(cells))), np.zeros((count, len(cells)))
        np.add.at(total, (unit, rows["cell"].to_numpy()), rows["total"].to_numpy())
        np.add.at(n, (unit, rows["cell"].to_numpy()), rows["n"].to_numpy())
        sides.append(_Side(total, n))
    assert not paired or counts[0] == counts[1]
    return sides, counts


def _bundled(documents: list[int], seed: int) -> dict[int, int]:
    """Document → unit of resampling; many documents are bundled at random."""
    if len(documents) <= _BUNDLES:
        return {document: number for number, document in enumerate(documents)}
    order = np.random.default_rng(seed).permutation(len(documents)) % _BUNDLES
    return dict(zip(documents, map(int, order), strict=True))


def _differences(
    cells: pd.DataFrame, sides: list[_Side], documents: list[int], *, draws: int, seed: int, paired: bool
) -> pd.DataFrame:
    first, second = (quotient(side.total.sum(0), side.n.sum(0)) for side in sides)
    low = high = np.full(len(cells), np.nan)
    if len(cells) and min(documents) > 1:
        weights = [document_weights(documents[0], draws=draws, seed=seed).astype(float)]
        weights.append(
            weights[0] if paired else document_weights(documents[1], draws=draws, seed=seed + 1).astype(float)
        )
        drawn = [quotient(w @ side.total, w @ side.n) for w, side in zip(weights, sides, strict=True)]
        low, high = np.nanquantile(drawn[1] - drawn[0], [0.025, 0.975], axis=0)
    return cells.assign(
        value_a=first,
        value_b=second,
        value=second - first,
        ci_low=low,
        ci_high=high,
        null=0.0,
        relative=quotient(second - first, np.abs(first)),
        n=np.minimum(sides[0].n.sum(0), sides[1].n.sum(0)).astype(np.int64),
    )


def _loads(run: Run, other: Run, by: str) -> pd.DataFrame:
    """The coefficient of variation of loads, of the routers that both runs have; their mean over layers for the model."""
    first, second = load_variation(run), load_variation(other)
    both = first.merge(second, on=["layer", "block"], suffixes=("_a", "_b"))
    if both.empty:
        return pd.DataFrame()
    if by == "model":
        both = both[["value_a", "value_b", "n_a", "n_b"]].agg(
            {"value_a": "mean", "value_b": "mean", "n_a": "sum", "n_b": "sum"}
        )
        both = both.to_frame().T.assign(layer=-1, block="")
    value = both["value_b"] - both["value_a"]
    return pd.DataFrame(
        {
            "metric": "CV of expert load",
            "layer": both["layer"].astype(int),
            "block": both["block"],
            "value_a": both["value_a"],
            "value_b": both["value_b"],
            "value": value,
            "ci_low": np.nan,
            "ci_high": np.nan,
            "null": 0.0,
            "relative": quotient(value.to_numpy(float), both["value_a"].abs().to_numpy(float)),
            "n": both[["n_a", "n_b"]].min(axis=1).astype(np.int64),
        }
    )


def _ordered(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    order = list(UNITS)
    frame = frame.sort_values(
        ["metric", "layer", "block"], key=lambda c: c.map(order.index) if c.name == "metric" else c, kind="stable"
    )
    return (frame if by == "layer" else frame.drop(columns=["layer", "block"])).reset_index(drop=True)


def _notes(run: Run, other: Run, pairs: pd.DataFrame, left_out: int) -> tuple[str, ...]:
    notes = []
    totals = [r.store.fetch("SELECT count(*) FROM sequences WHERE run_id = ?", [r.run_id])[0][0] for r in (run, other)]
    if not len(pairs):
        notes.append("The runs share no sequence: differences are of different texts too, and intervals are unpaired.")
    elif len(pairs) < max(totals):
        notes.append(
            f"{len(pairs):,} sequences are in both runs, of {totals[0]:,} in the first and {totals[1]:,} in the second."
        )
    if left_out:
        cells = "1 cell" if left_out == 1 else f"{left_out:,} cells"
        notes.append(f"Left out: {cells} of sequence × measure where only one of the runs has a number.")
    if generated(run, other):
        notes.append(GENERATED_LEFT_OUT)
    return tuple(notes)


def _without_percent(frame: pd.DataFrame, run: Run, by: str) -> tuple[str, ...]:
    """What the figure of the model cannot show in percent."""
    nothing = list(frame.loc[frame["value_a"] == 0, "metric"]) if by == "model" else []
    if not nothing:
        return ()
    return (f"0 in {run.name}, so without a percent of it and not in the figure: {', '.join(nothing)}.",)


def _title(frame: pd.DataFrame, run: Run, other: Run, by: str) -> str:
    names = f"{run.name} → {other.name}"
    judged = frame[frame["ci_low"].notna()]
    apart = ((judged["ci_low"] > 0) | (judged["ci_high"] < 0)) & moved(judged["value"], judged["relative"])
    outside = judged[apart]
    what = "measures" if by == "model" else "numbers by layer"
    many = f"{len(outside)} of {len(judged)} {what} differ beyond their interval"
    if judged.empty:
        return f"{names}: {len(frame)} {what}, none with an interval"
    if by == "layer":
        if outside["relative"].isna().all():
            return f"{names}: {many}"
        most = outside.loc[outside["relative"].abs().idxmax()]
        where = layer_name(int(most["layer"]), "mlp" if most["block"] in ("mlp", "residual") else str(most["block"]))
        return f"{names}: {many}; most, {most['metric']} in {where} by {_signed(most['relative'], '.1%')}"
    nll = frame[frame["metric"] == "mean NLL"]
    if nll.empty:
        return f"{names}: {many}"
    row = nll.iloc[0]
    low, high = (_signed(row[bound], ".4f") for bound in ("ci_low", "ci_high"))
    interval = "" if np.isnan(row["ci_low"]) else f" ({low} to {high})"
    told = f"mean NLL {row['value_a']:.3f} → {row['value_b']:.3f}, {_signed(row['value'], '.4f')} nats{interval}"
    return f"{names}: {told}; {many}"


def _signed(number: float, form: str) -> str:
    return f"{number + 0.0:+{form}}".replace("-", "−")


def _draw_model(result: Result) -> go.Figure:
    """Relative differences with their intervals, the measures below one another; those without one only where none has one.

    A measure that is 0 in the first run has no percent; a note says so.
    """
    frame = result.df()
    if frame["ci_low"].notna().any():
        frame = frame[frame["ci_low"].notna()]
    frame = frame[frame["value_a"] != 0]
    scale = 100 / frame["value_a"].abs().to_numpy()
    value = frame["value"].to_numpy() * scale
    low, high = frame["ci_low"].to_numpy() * scale, frame["ci_high"].to_numpy() * scale
    bars = {"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1}
    figure = go.Figure(
        go.Scatter(
            x=value,
            y=frame["metric"],
            mode="markers",
            marker={"color": SERIES[0], "size": 9},
            error_x=bars,
            customdata=frame[_HOVER].to_numpy(),
            hovertemplate=f"%{{y}}: {_HOVERED}, %{{x:+.3g}} %<extra></extra>",
            showlegend=False,
        )
    )
    figure.add_vline(x=0, line_dash="dash", line_color=CHANCE)
    figure.update_xaxes(title="difference, % of the first run's value")
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    figure.update_layout(height=max(240, 130 + 30 * len(frame)))
    return figure


_HOVER = ["value_a", "value_b", "value", "ci_low", "ci_high"]
_HOVERED = (
    "%{customdata[0]:,.4g} → %{customdata[1]:,.4g}<br>difference %{customdata[2]:+,.4g} "
    "[%{customdata[3]:+,.4g}, %{customdata[4]:+,.4g}]"
)


def _draw_layers(result: Result) -> go.Figure:
    """Measures by layers: how sure each difference is, in half-widths of its interval, so that measures can share a scale."""
    frame = result.df()
    if frame["ci_low"].notna().any():
        frame = frame[frame["ci_low"].notna()].copy()
    frame["row"] = [
        f"{metric}{'' if block in ('mlp', 'attn', 'residual') else ' ' + plain(str(block))}"
        for metric, block in zip(frame["metric"], frame["block"], strict=True)
    ]
    half = ((frame["ci_high"] - frame["ci_low"]) / 2).to_numpy()
    value = frame["value"].where(moved(frame["value"], frame["relative"]), 0.0).to_numpy()
    frame["apart"] = np.divide(value, half, out=np.where(value == 0, 0.0, np.nan), where=half > 0)
    rows, layers = list(dict.fromkeys(frame["row"])), sorted(frame["layer"].unique())
    at = frame["row"].map(rows.index).to_numpy(), frame["layer"].map(layers.index).to_numpy()
    values = np.full((len(rows), len(layers)), np.nan)
    values[at] = frame["apart"]
    fields: NDArray[Any] = np.full((*values.shape, 6), np.nan)
    fields[at] = frame[[*_HOVER, "relative"]].to_numpy(float)
    return heatmap(
        values,
        x=[f"L{layer}" for layer in layers],
        y=rows,
        hover=f"%{{x}}, %{{y}}: {_HOVERED}, %{{customdata[5]:+.2%}}",
        colorbar="difference, half-widths",
        diverging=True,
        customdata=fields,
    )
