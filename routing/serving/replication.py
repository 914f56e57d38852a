"""Replication: what copies of the hottest experts do to the busiest device."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.routing.pathways.estimates import mean_by_document, quotient
from moescope.routing.pathways.held_out import halve
from moescope.routing.pathways.pairs import router_chain
from moescope.routing.serving.batches import cut
from moescope.routing.serving.replicas import copies_of_hottest, copies_of_random, spread
from moescope.routing.trace import read_trace
from moescope.store.run import Run

Floats = NDArray[np.float64]


@analysis(
    name="replication",
    needs=("routing",),
    source="redundant experts as in arXiv 2412.19437 §3.4; hottest first, copies to the least loaded device",
    section="serving",
    order=40,
)
def replication(
    run: Run,
    *,
    devices: Count = 8,
    batch: Count = 512,
    most: Natural | None = None,
    randoms: Count = 20,
    block: str | None = None,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """How many copies of hot experts does it take to keep devices evenly busy?

    In every layer r extra copies are given, one after another, to the expert with the most load per copy; a copy takes an equal
    share of its expert's tokens. The E + r copies are placed on the devices, equally many on each, the largest first to the
    least loaded device. Copies and places come from half of the documents, drawn by `seed`; on the other half the slowness of a
    batch is Σ over layers of the busiest device's load over Σ of the mean load: 1 is an even spread. The null gives the r copies
    to experts drawn at random.

    Args:
        devices: how many; at most as many as the smallest layer has experts.
        batch: tokens served together, in the order of the run.
        most: largest number of copies a layer; none for half of the smallest layer's experts.
        randoms: draws behind the null.
        block: only routers of this block; none for all.
        draws: bootstrap resamples of held-out documents.
        seed: of the split, the null and the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world.", "Hello moon."], store, name="first", progress=False)
        ...     ms.analyze(run, "replication", devices=1, most=2).df().value.tolist()[:2]
        [1.0, 1.0]
    """
    trace = read_trace(run)
    routers = router_chain(trace, block)
    halves = halve(trace, seed)
    fitted, judged = cut(trace, batch, halves.fitted), cut(trace, batch, halves.judged)
    before = [fitted.loads(router).sum(0) for router in routers]
    after = [judged.loads(router) for router in routers]
    judged.require_loads(after)
    smallest = min(loads.shape[1] for loads in after)
    used = min(devices, smallest)
    steps = _steps(smallest // 2 if most is None else most)
    rows: list[dict[str, Any]] = []
    for extra in steps:
        slow = _slowness(before, after, [copies_of_hottest(loads, extra) for loads in before], used)
        generator = np.random.default_rng([seed, extra])
        chance = [
            _slowness(before, after, [copies_of_random(len(loads), extra, generator) for loads in before], used)
            for _ in range(randoms if extra else 1)
        ]
        rows += _rows(extra, slow, chance, judged.document, draws, seed)
    fewer = (f"The smallest layer has {used} experts, so {used} devices are used.",) if used < devices else ()
    return Result(
        title=_title(rows, used),
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=judged.count,
        n_unit=f"held-out batches of {int(judged.sizes.max()):,} tokens",
        definition="Σ over layers of the busiest device's load over Σ of the mean load, with `copies` extra copies of hot experts "
        f"in every layer, on {used} devices; copies and places fitted on other documents.",
        units={"value": "busiest ÷ mean", "null": "busiest ÷ mean", "copies": "extra copies a layer"},
        interval=f"95 % percentile bootstrap of the mean over the documents in which batches begin, {draws} resamples",
        null=f"copies of experts drawn at random, mean of {randoms}",
        notes=(
            *trace.notes,
            *judged.notes,
            *fewer,
            "A copy takes an equal share of its expert's tokens in every batch.",
        ),
        computation="loads of every batch, copies and places from half of the documents",
    )


def _steps(most: int) -> list[int]:
    """0, 1, 2, 4, … up to `most`, which is the last."""
    doubled = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return sorted({0, *doubled, most})


def _slowness(before: list[Floats], after: list[Floats], copies: list[NDArray[np.int64]], devices: int) -> Floats:
    """[batch] busiest over mean."""
    busiest, mean = np.zeros(len(after[0])), np.zeros(len(after[0]))
    for known, loads, number in zip(before, after, copies, strict=True):
        held = loads @ spread(known, number, devices)
        busiest += held.max(1)
        mean += loads.sum(1) / devices
    return quotient(busiest, mean)


def _rows(
    extra: int, slow: Floats, chance: list[Floats], document: NDArray[np.int64], draws: int, seed: int
) -> list[dict[str, Any]]:
    known = ~np.isnan(slow)
    if not known.any():
        return []
    mean = {
        "metric": "busiest ÷ mean device",
        **mean_by_document(slow, document, draws=draws, seed=seed),
        "null": float(np.mean([np.nanmean(found) for found in chance])),
    }
    tail = {
        "metric": "busiest ÷ mean device, 99th percentile",
        "value": float(np.nanquantile(slow, 0.99)),
        "ci_low": None,
        "ci_high": None,
        "null": float(np.mean([np.nanquantile(found, 0.99) for found in chance])),
    }
    return [{"copies": extra} | row | {"n": int(known.sum())} for row in (mean, tail)]


def _title(rows: list[dict[str, Any]], devices: int) -> str:
    means = [row for row in rows if row["metric"] == "busiest ÷ mean device"]
    first, last = means[0], means[-1]
    return (
        f"With {last['copies']} copies of hot experts a layer the busiest of {devices} device{'s' * (devices > 1)} works "
        f"{last['value']:.2f}× the mean; without copies {first['value']:.2f}×, with copies of random experts "
        f"{last['null']:.2f}×"
    )


def _draw(result: Result) -> go.Figure:
    from moescope.core.figures import CHANCE, SERIES

    frame = result.df()
    figure = go.Figure()
    for number, (metric, part) in enumerate(frame.groupby("metric", sort=True)):
        value, low, high = (part[c].astype(float) for c in ("value", "ci_low", "ci_high"))
        names = [str(copies) for copies in part["copies"]]
        figure.add_scatter(
            x=names, y=value, name=metric.replace("busiest ÷ mean device, ", "") if number else "mean over batches",
            mode="lines+markers", line={"color": SERIES[number]},
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
            hovertemplate="%{x} copies: %{y:.3f}× the mean<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=names, y=part["null"], name=f"random experts copied{', 99th percentile' if number else ''}", mode="lines",
            line={"color": CHANCE, "dash": "dot" if number else "dash"},
            hovertemplate="%{x} copies of random experts: %{y:.3f}×<extra></extra>",
        )  # fmt: skip
    figure.add_hline(y=1, line={"color": CHANCE, "width": 1})
    figure.update_xaxes(title="extra copies a layer", type="category")
    figure.update_yaxes(title="busiest ÷ mean device (1: even)")
    figure.update_layout(height=400)
    return figure
