"""Residency: for how many tokens in a row an expert stays chosen."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import SERIES, log_axis
from moescope.core.result import Result
from moescope.routing.consistency.control_figures import CONTROLS, axis_title, controls, place_name, place_names, points
from moescope.routing.consistency.decisions import (
    Longs,
    Parts,
    chance,
    missing_controls,
    numbers,
    parts_by_label,
    shuffles_for,
    whole_run,
)
from moescope.routing.consistency.ratios import Floats, Measured, Sums, tabled
from moescope.routing.consistency.runs_and_gaps import RunsAndGaps, per_part, runs_and_gaps
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

_STAY, _LASTING = "mean stay", "runs of at least"


@analysis(
    name="residency",
    needs=("routing",),
    source="CoSMoEs: run lengths of experts in use, beside the replacement rate (analysis repetition)",
    section="consistency",
    order=30,
)
def residency(
    run: Run,
    *,
    by: Literal["layer", "label", "model"] = "layer",
    lengths: str = "2,4,8,16,32,64",
    shuffles: Natural = 5,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """For how many tokens in a row does an expert stay chosen?

    A run is an expert chosen by consecutive tokens of one sequence, as long as it can be. Reported are the mean length of runs
    (decisions ÷ runs), and the share of runs that last at least ℓ tokens. A run that meets either end of its sequence counts as
    long as it was seen; the chance level counts the same way.

    By chance, an expert is chosen by every token independently with r = k/E: a sequence of n tokens has
    r^ℓ · (1 + (n − ℓ)(1 − r)) runs of at least ℓ ≤ n tokens for every expert.

    Args:
        by: each layer, each label, or the whole model.
        lengths: run lengths ℓ, in tokens.
        shuffles: how often tokens are shuffled for each control; 0 for none.
        draws: bootstrap resamples of documents.
        seed: of shuffles and resamples.

    Example:
        >>> import tempfile, pathlib, pyarrow as pa
        >>> import moescope as ms
        >>> rows = {"sequence_id": [0] * 6, "position": range(6), "layer": [0] * 6}
        >>> ids = pa.table(rows | {"experts": [[0], [0], [1], [1], [1], [2]]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(ids, name="tiny", n_experts=4)
        ...     ms.analyze(run, "residency").df().value[0]
        np.float64(2.0)
    """
    trace = read_trace(run)
    least = [1, *(length for length in numbers(lengths, "lengths") if length > 1)]
    parts = parts_by_label(trace) if by == "label" else whole_run(trace)
    measured, repeats = _measure(trace, parts, least, shuffles, seed)
    frame = tabled(measured, trace, parts, by=by, draws=draws, seed=seed)
    frame["length"] = frame["length"].astype("Int64")
    return Result(
        title=_title(frame, by),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(measured.observed.bottom[..., 0].sum()),
        n_unit="runs of an expert",
        definition="Runs are an expert's consecutive tokens in a sequence. Mean stay = decisions ÷ runs; runs of at least ℓ = "
        "share of runs that last ℓ tokens or more.",
        units={"value": "mean stay: tokens; runs of at least: share of runs", "length": "tokens", "n": "runs"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="independent choices of k of E experts, all alike, in sequences as long as these (closed form)"
        + "".join(f"; {s.column}: {s.name}, mean of {shuffles}" for s in shuffles_for(trace, shuffles)),
        computation="runs of every expert (compiled), ratios of sums over documents",
        notes=(*trace.notes, *repeats, *missing_controls(trace, shuffles)),
    )


def _measure(trace: Trace, parts: Parts, least: list[int], times: int, seed: int) -> tuple[Measured, tuple[str, ...]]:
    found, shuffled, repeats = runs_and_gaps(trace, parts, least=least, widths=[1], times=times, seed=seed)
    n_parts, tokens = len(parts.names), np.diff(trace.starts)
    by_row, in_part = per_part(tokens, parts.row, len(parts.part)), per_part(tokens, parts.of_each, n_parts)
    expected = np.stack([_expected(trace, router, parts, least) for router in trace.routers], 1)
    observed = _sums(found.runs, _decisions(trace, found, by_row))
    metrics: list[dict[str, Any]] = [{"metric": _STAY, "length": None}]
    metrics += [{"metric": _LASTING, "length": length} for length in least[1:]]
    runs = np.stack([found.runs[parts.part == part, :, 0].sum(0) for part in range(n_parts)])
    return Measured(
        metrics,
        observed,
        _sums(expected, in_part[:, None] * np.array([router.top_k for router in trace.routers])),
        {column: _sums(counts.runs, _decisions(trace, counts, in_part)) for column, counts in shuffled.items()},
        np.repeat(runs[..., None], len(metrics), -1),
    ), repeats


def _decisions(trace: Trace, counts: RunsAndGaps, tokens: Floats) -> Floats:
    """[..., router] pairs of a token and an expert that it chooses."""
    pairs: Floats = tokens[:, None] * np.array([router.n_experts for router in trace.routers])
    return pairs - counts.missing[..., 0]


def _sums(runs: Longs | Floats, decisions: Floats) -> Sums:
    """Runs [..., router, length] (the first of at least one token) and decisions [..., router] as ratios."""
    top = np.array(runs, np.float64)
    top[..., 0] = decisions
    return Sums(top, np.repeat(np.asarray(runs[..., :1], np.float64), runs.shape[-1], -1))


def _expected(trace: Trace, router: Router, parts: Parts, least: list[int]) -> Floats:
    """[part, length] runs of at least so many tokens that independent choices give."""
    r, tokens = chance(router), np.diff(trace.starts)[:, None]
    lasting = np.array(least)
    each = router.n_experts * r**lasting * (1 + (tokens - lasting) * (1 - r)) * (tokens >= lasting)
    return per_part(each, parts.of_each, len(parts.names))


def _title(frame: pd.DataFrame, by: str) -> str:
    rows = frame[frame["metric"] == _STAY].reset_index(drop=True)
    mean, expected = (np.average(rows[column], weights=rows["n"]) for column in ("value", "null"))
    text = f"An expert stays chosen for {mean:.2f} tokens on average, against {expected:.2f} by chance"
    if by == "model" or len(rows) < 2:
        return text
    best, worst = rows.loc[rows["value"].idxmax()], rows.loc[rows["value"].idxmin()]
    return (
        f"{text}; from {worst['value']:.2f} in {place_name(worst, by)} to {best['value']:.2f} in {place_name(best, by)}"
    )


def _draw(result: Result) -> go.Figure:
    """Mean stay by place; for the whole model, how many runs last how long."""
    frame, figure = result.df(), go.Figure()
    if axis_title(frame):
        rows = frame[frame["metric"] == _STAY]
        names, joined = place_names(rows), "layer" in rows
        title_x, title_y = axis_title(rows), "mean stay of an expert (tokens)"
        figure.update_yaxes(title=title_y, rangemode="tozero")
    else:
        rows = frame[(frame["metric"] == _LASTING) & (frame["value"] > 0)]
        names, joined = [str(length) for length in rows["length"]], True
        title_x = "ℓ (tokens)"
        floor = float(rows["value"].min()) / 10 if len(rows) else 0.1
        # Chance falls so fast that its level is drawn only where it is near what was seen.
        rows = rows.assign(**{c: rows[c].where(rows[c] > floor / 100) for c in CONTROLS if c in rows})
        log_axis(figure, title="share of runs of at least ℓ tokens", values=[floor, 1.0])
        figure.update_yaxes(range=[np.log10(floor), 0.1], exponentformat="power", dtick=1)
    points(figure, rows, x=names, name="as recorded", colour=SERIES[0], joined=joined)
    controls(figure, rows, x=names, joined=joined)
    figure.update_xaxes(title=title_x, type="category")
    return figure.update_layout(height=420)
