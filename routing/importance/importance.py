"""Importance of every expert, by every measure that needs no weights of the model."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import heatmap
from moescope.core.result import Result
from moescope.routing.grid import expert_grid, layer_name
from moescope.routing.importance.expert_sums import Array, Gate
from moescope.routing.importance.measures import UNITS, Measured, measure, require
from moescope.routing.trace import read_trace
from moescope.store.run import Run

Shown = Literal[
    "frequency",
    "hotness",
    "ESFT token score",
    "weighted frequency",
    "ESFT gate score",
    "mean output norm",
    "EAN sum",
    "weighted EAN sum",
    "REAP",
    "max activation",
]
_BEST = ("REAP", "weighted frequency", "frequency")


@analysis(
    name="importance",
    needs=("routing",),
    source="REAP: CerebrasResearch/reap pruning_metrics.py; ESFT: arXiv 2407.01906; MAN: arXiv 2606.15716",
    section="importance",
    order=10,
)
def importance(
    run: Run, *, gate: Gate = "given", shown: Shown | None = None, draws: Count = 300, seed: Natural = 0
) -> Result:
    """Which experts matter most, by each published score that records alone can give?

    With c the tokens routed to an expert, g its weight and f its output before the weight: frequency c; hotness, c over
    the fair share; weighted frequency Σg; mean output norm Σ‖f‖ ÷ c (MAN, also called EAN mean); EAN sum Σ‖f‖; weighted
    EAN sum Σ g‖f‖; REAP Σ g‖f‖ ÷ c; ESFT token score c ÷ (tokens × k); ESFT gate score Σg ÷ tokens; max activation, the
    largest |output|. Means of an expert that was never chosen are left empty. The released REAP code takes g from a
    softmax over all experts, divided by the sum over the chosen ones since March 2026: `gate` offers both.

    Args:
        gate: weights as the experts were given them, those divided by their sum over the token's slots, or the softmax
            of all recorded router logits.
        shown: the measure that the figure draws; the most telling one that is there by default.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     "REAP" in set(ms.analyze(run, "importance").df()["metric"])
        True
    """
    trace = read_trace(run)
    found, notes = measure(trace, gate=gate, draws=draws, seed=seed)
    drawn: str = shown or next(name for name in _BEST if any(name in part.values for part in found))
    require(found, drawn, run)
    frame = pd.concat([_rows(part) for part in found], ignore_index=True)
    frame["shown"] = frame["metric"] == drawn
    return Result(
        title=_title(frame, drawn),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=trace.decisions,
        n_unit="decisions",
        definition="c tokens routed to the expert, g its weight, f its output before the weight. frequency c; hotness c "
        "over the fair share; weighted frequency Σg; mean output norm (MAN, EAN mean) Σ‖f‖/c; EAN sum Σ‖f‖; weighted EAN "
        "sum Σg‖f‖; REAP Σg‖f‖/c; ESFT token score c/(tokens·k); ESFT gate score Σg/tokens; max activation: largest "
        f"|output|. Rank 1 is the largest of a layer. Weights: {gate}.",
        units={f"value[{name}]": unit for name, unit in UNITS.items() if (frame["metric"] == name).any()}
        | {"rank": "place in the layer", "n": "tokens routed to the expert"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="the layer's sums dealt out evenly: what every expert would have if decisions fell at random",
        computation="sums of decisions by document and expert",
        notes=notes,
    )


def _rows(part: Measured) -> pd.DataFrame:
    """Measures of one router, a row an expert and measure."""
    size = part.router.n_experts
    frames = []
    for name, values in part.values.items():
        low, high = _bounds(part.draws.get(name), size)
        frames.append(
            pd.DataFrame(
                {
                    "layer": part.router.layer,
                    "block": part.router.block,
                    "expert": np.arange(size),
                    "metric": name,
                    "value": values,
                    "ci_low": low,
                    "ci_high": high,
                    "null": part.even.get(name, np.nan),
                    "rank": pd.Series(values).rank(ascending=False, method="min").astype("Int64"),
                    "n": part.count.astype(np.int64),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _bounds(draws: Array | None, size: int) -> tuple[Array, Array]:
    """Percentile bounds; NaN where there are no resamples, or where the expert is absent from some of them."""
    if draws is None:
        return np.full(size, np.nan), np.full(size, np.nan)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return low, high


def _title(frame: pd.DataFrame, shown: str) -> str:
    part = frame[frame["shown"]]
    part = part.assign(ratio=part["value"] / part["null"].where(part["null"] > 0))
    if part["ratio"].isna().all():
        top = part.loc[part["value"].idxmax()]
        return f"By {shown}, {_named(top)} stands first, with {top['value']:.3g}"
    top = part.loc[part["ratio"].idxmax()]
    small = int((part["ratio"] < 0.5).sum())
    return (
        f"By {shown}, {_named(top)} stands out most, at {top['ratio']:.2f}× the even share of its layer; "
        f"{small:,} of {len(part):,} experts have less than half"
    )


def _named(row: Any) -> str:
    return f"{layer_name(row['layer'], row['block'])}·E{row['expert']}"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    frame = frame[frame["shown"]].copy()
    name = str(frame["metric"].iloc[0])
    even = frame["null"].where(frame["null"].notna(), 1.0)
    frame["log"] = np.log2((frame["value"] / even).where(frame["value"] > 0))
    values, rows, columns, fields = expert_grid(frame, "log", extra=("value", "null", "rank"))
    scale = "log2 value" if frame["null"].isna().all() else "log2 (value ÷ even share)"
    figure = heatmap(
        values,
        x=columns,
        y=rows,
        customdata=fields,
        colorbar=f"{name}: {scale}",
        hover="%{y}·%{x}<br>%{customdata[0]:.4g}, even share %{customdata[1]:.4g}<br>rank %{customdata[2]:.0f}",
        diverging=not frame["null"].isna().all(),
    )
    figure.update_xaxes(title="expert (blank: never chosen)")
    figure.update_yaxes(title="layer")
    return figure
