"""Window usage: how many different experts a stretch of text needs."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import SERIES, heatmap
from moescope.core.result import Result
from moescope.routing.consistency.control_figures import axis_title, controls, place_name, place_names, points
from moescope.routing.consistency.decisions import (
    Parts,
    chance,
    missing_controls,
    numbers,
    parts_by_label,
    shuffles_for,
    spread,
    whole_run,
)
from moescope.routing.consistency.ratios import Floats, Measured, Sums, tabled
from moescope.routing.consistency.runs_and_gaps import RunsAndGaps, per_part, runs_and_gaps
from moescope.routing.trace import Trace, read_trace
from moescope.store.run import Run

METRICS = ("share of experts used", "distinct experts", "new experts")


@analysis(
    name="window_usage",
    needs=("routing",),
    source="LLM in a flash (arXiv 2312.11514): aggregated usage over a window, here of experts",
    section="consistency",
    order=40,
)
def window_usage(
    run: Run,
    *,
    by: Literal["layer", "label", "model"] = "model",
    windows: str = "1,2,4,8,16,32,64,128,256",
    shuffles: Natural = 5,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """How many different experts do w tokens in a row use, and how many more does the next token need?

    Windows of w tokens slide one token at a time and never cross sequences. Distinct experts: the mean size of the union of
    what their tokens choose; share of experts used: that over E; new experts: how many experts the token after a window
    chooses that the window has not, the increment of the former from w to w + 1 tokens. By chance, w tokens use
    E · (1 − (1 − k/E)^w) experts and the next brings k · (1 − k/E)^w more. Over several layers, means are for one router.

    Args:
        by: each layer, each label, or the whole model.
        windows: window lengths w, in tokens; those that no sequence has are left out.
        shuffles: how often tokens are shuffled for each control; 0 for none.
        draws: bootstrap resamples of documents.
        seed: of shuffles and resamples.

    Example:
        >>> import tempfile, pathlib, pyarrow as pa
        >>> import moescope as ms
        >>> rows = {"sequence_id": [0] * 4, "position": range(4), "layer": [0] * 4}
        >>> ids = pa.table(rows | {"experts": [[0], [0], [1], [2]]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(ids, name="tiny", n_experts=4)
        ...     ms.analyze(run, "window_usage", windows="2").df().query("metric == 'distinct experts'").value.item()
        1.6666666666666667
    """
    trace = read_trace(run)
    wanted = numbers(windows, "windows")
    longest = int(np.diff(trace.starts).max())
    widths = [width for width in wanted if width <= longest]
    if not widths:
        raise InputError(
            f"no sequence is as long as a window: windows = {spread(wanted)} tokens",
            expected=f"at most {longest} tokens, the longest sequence",
        )
    parts = parts_by_label(trace) if by == "label" else whole_run(trace)
    measured, repeats = _measure(trace, parts, widths, shuffles, seed)
    frame = tabled(measured, trace, parts, by=by, draws=draws, seed=seed)
    left = spread(width for width in wanted if width > longest)
    return Result(
        title=_title(frame, by),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=trace.tokens,
        n_unit="tokens",
        definition="Mean over windows of w consecutive tokens of the number of different experts they choose (and of its share of "
        "E), and of how many more the token after the window chooses.",
        units={
            "value": "share of experts used: share of E; distinct and new experts: experts of one router",
            "window": "tokens",
            "n": "windows × routers",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="independent choices of k of E experts, all alike: E · (1 − (1 − k/E)^w), and k · (1 − k/E)^w more"
        + "".join(f"; {s.column}: {s.name}, mean of {shuffles}" for s in shuffles_for(trace, shuffles)),
        computation="gaps between choices of an expert (compiled), ratios of sums over documents",
        notes=(
            *trace.notes,
            *repeats,
            *missing_controls(trace, shuffles),
            "A window length takes the sequences that are that long.",
            *((f"No sequence has {left} tokens: windows that long are left out.",) if left else ()),
        ),
    )


def _measure(trace: Trace, parts: Parts, widths: list[int], times: int, seed: int) -> tuple[Measured, tuple[str, ...]]:
    found, shuffled, repeats = runs_and_gaps(trace, parts, least=[1], widths=widths, times=times, seed=seed)
    tokens, width = np.diff(trace.starts)[:, None], np.array(widths)
    windows, followed = np.maximum(tokens - width + 1, 0), np.maximum(tokens - width, 0)
    n_parts = len(parts.names)
    by_row = [per_part(values, parts.row, len(parts.part)) for values in (windows, followed)]
    in_part = [per_part(values, parts.of_each, n_parts) for values in (windows, followed)]
    size = np.array([float(router.n_experts) for router in trace.routers])[:, None]
    unused = np.array([1 - chance(router) for router in trace.routers])[:, None] ** width
    top_k = np.array([float(router.top_k) for router in trace.routers])[:, None]
    null = _sums(in_part[0][:, None] * size * unused, in_part[1][:, None] * top_k * unused, in_part, size)
    metrics: list[dict[str, Any]] = [{"metric": metric, "window": w} for metric in METRICS for w in widths]
    n = np.concatenate([in_part[0], in_part[0], in_part[1]], -1)[:, None].repeat(len(size), 1)
    return Measured(
        metrics,
        _of(found, by_row, size),
        null,
        {column: _of(counts, in_part, size) for column, counts in shuffled.items()},
        n,
    ), repeats


def _of(counts: RunsAndGaps, windows: list[Floats], size: Floats) -> Sums:
    return _sums(counts.missing, counts.fresh, windows, size)


def _sums(missing: Any, fresh: Any, counts: list[Floats], size: Floats) -> Sums:
    """[..., router, metric] from [..., router, width] counts, and two [row, width] numbers of windows: all, and those followed."""
    windows, followed = (each[:, None] + 0 * size for each in counts)
    pairs = windows * size
    used = pairs - missing
    top = [used, used, np.asarray(fresh, np.float64)]
    bottom = [np.broadcast_to(part, used.shape) for part in (pairs, windows, followed)]
    return Sums(np.concatenate(top, -1), np.concatenate(bottom, -1))


def _title(frame: pd.DataFrame, by: str) -> str:
    width = min(frame["window"].unique(), key=lambda w: abs(int(w) - 16))
    rows = frame[(frame["window"] == width) & (frame["metric"] == METRICS[0])].reset_index(drop=True)
    mean, expected = (np.average(rows[column], weights=rows["n"]) for column in ("value", "null"))
    text = f"{width} tokens in a row use {mean:.0%} of a layer's experts, against {expected:.0%} by chance"
    if by == "model" or len(rows) < 2:
        return text
    best, worst = rows.loc[rows["value"].idxmax()], rows.loc[rows["value"].idxmin()]
    return (
        f"{text}; from {worst['value']:.0%} in {place_name(worst, by)} to {best['value']:.0%} in {place_name(best, by)}"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    rows = frame[frame["metric"] == METRICS[0]].reset_index(drop=True)
    if axis_title(rows):
        return _grid(rows)
    figure, names = go.Figure(), [str(width) for width in rows["window"]]
    points(figure, rows, x=names, name="as recorded", colour=SERIES[0], joined=True)
    controls(figure, rows, x=names, joined=True)
    figure.update_xaxes(title="w (tokens)", type="category")
    figure.update_yaxes(title="share of experts used", rangemode="tozero", tickformat=".0%")
    return figure.update_layout(height=420)


def _grid(rows: pd.DataFrame) -> go.Figure:
    """Place × window: how many fewer or more experts than by chance."""
    names, widths = list(dict.fromkeys(place_names(rows))), sorted(rows["window"].unique())
    values = np.full((len(names), len(widths)), np.nan)
    fields = np.full((len(names), len(widths), 2), np.nan)
    at = [names.index(name) for name in place_names(rows)], [widths.index(width) for width in rows["window"]]
    values[at] = rows["value"] - rows["null"]
    fields[at] = rows[["value", "null"]].to_numpy(float)
    figure = heatmap(
        values,
        x=[str(width) for width in widths],
        y=names,
        diverging=True,
        customdata=fields,
        colorbar="share used − chance",
        hover="%{y}, %{x} tokens<br>%{customdata[0]:.1%} of experts used<br>chance %{customdata[1]:.1%}",
    )
    figure.update_xaxes(title="w (tokens); 0 is chance")
    figure.update_yaxes(title=axis_title(rows))
    return figure
