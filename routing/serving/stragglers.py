"""Stragglers: how much longer the busiest expert or device works than the mean one, batch by batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.routing.pathways.estimates import mean_by_document, quotient
from moescope.routing.pathways.pairs import router_chain
from moescope.routing.serving.batches import Batches, balanced_router, cut
from moescope.routing.serving.devices import contiguous, device_loads
from moescope.routing.trace import Router, read_trace
from moescope.store.run import Run

Floats = NDArray[np.float64]


@analysis(
    name="stragglers",
    needs=("routing",),
    source="straggler factor: arXiv 2503.05066",
    section="serving",
    order=20,
)
def stragglers(
    run: Run,
    *,
    batch: Count = 512,
    devices: Count = 8,
    block: str | None = None,
    samples: Count = 3,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """How much longer do the busiest expert and the busiest device work than the mean one?

    For every batch of tokens and every router: the straggler factor, the largest number of decisions an expert gets over the
    mean B · k / E; and the same over devices, each holding E ÷ `devices` experts in order of their ids. A layer is done when its
    busiest expert (device) is, so the factor is the time lost to imbalance: 1 is none. Decisions for null experts cost nothing.
    The null is a balanced router, which draws every set of k experts alike: its batches are uneven by chance alone.

    Args:
        batch: tokens served together, in the order of the run.
        devices: devices over which each layer's experts are spread (at most one an expert).
        block: only routers of this block; none for all.
        samples: draws of the balanced router.
        draws: bootstrap resamples of documents.
        seed: of both.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     frame = ms.analyze(run, "stragglers", devices=1).df()
        >>> frame[frame.scope == "device"].value.tolist() == [1.0] * (frame.scope == "device").sum()
        True
    """
    trace = read_trace(run)
    batches = cut(trace, batch)
    batches.require_loads([batches.loads(router) for router in router_chain(trace, block)])
    rows: list[dict[str, Any]] = []
    chance: dict[tuple[int, int, int], dict[str, Floats]] = {}
    for router in router_chain(trace, block):
        key = (router.n_experts, router.n_null, router.top_k)
        if key not in chance:
            generator = np.random.default_rng([seed, *key])
            drawn = [
                _factors(balanced_router(router, trace.tokens, generator), batches, devices) for _ in range(samples)
            ]
            chance[key] = {scope: np.concatenate([found[scope] for found in drawn]) for scope in drawn[0]}
        for scope, found in _factors(router, batches, devices).items():
            rows += _rows(router, scope, found, chance[key][scope], batches, draws, seed)
    fewest = min(router.n_experts - router.n_null for router in router_chain(trace, block))
    held = (
        (f"Layers of fewer than {devices} experts are spread over one device an expert.",) if devices > fewest else ()
    )
    return Result(
        title=_title(rows, int(batches.sizes.max()), devices),
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=batches.count * len(router_chain(trace, block)),
        n_unit=f"batches of {int(batches.sizes.max()):,} tokens × routers",
        definition="Decisions of the busiest expert (or of the busiest of the devices that hold the experts in order of their "
        "ids) over the mean, in every batch: mean and 99th percentile over batches.",
        units={"value": "busiest ÷ mean", "null": "busiest ÷ mean"},
        interval=f"95 % percentile bootstrap of the mean over the documents in which batches begin, {draws} resamples",
        null=f"a balanced router that draws every set of k experts alike, {samples} times",
        notes=(*trace.notes, *batches.notes, *held),
        computation="loads of every batch",
    )


def _factors(router: Router, batches: Batches, devices: int) -> dict[str, Floats]:
    """Scope → [batch] busiest over mean; NaN where a batch has no decision for a real expert."""
    loads = batches.loads(router)
    return {
        "expert": busiest(loads),
        "device": busiest(device_loads(loads, contiguous(loads.shape[1], min(devices, loads.shape[1])))),
    }


def busiest(loads: Floats) -> Floats:
    """[batch] largest load over the mean load; NaN where there is none.

    Example:
        >>> busiest(np.array([[3.0, 1.0]])).tolist()
        [1.5]
    """
    mean = loads.mean(1)
    return quotient(loads.max(1), mean)


def _rows(
    router: Router, scope: str, found: Floats, chance: Floats, batches: Batches, draws: int, seed: int
) -> list[dict[str, Any]]:
    known = ~np.isnan(found)
    if not known.any():
        return []
    place = {"layer": router.layer, "block": router.block, "scope": scope}
    mean = {
        "metric": "straggler factor",
        **mean_by_document(found, batches.document, draws=draws, seed=seed),
        "null": float(np.nanmean(chance)),
    }
    tail = {
        "metric": "straggler factor, 99th percentile",
        "value": float(np.nanquantile(found, 0.99)),
        "ci_low": None,
        "ci_high": None,
        "null": float(np.nanquantile(chance, 0.99)),
    }
    return [place | row | {"n": int(known.sum())} for row in (mean, tail)]


def _title(rows: list[dict[str, Any]], batch: int, devices: int) -> str:
    def mean(scope: str, column: str) -> float:
        return float(np.mean([r[column] for r in rows if r["scope"] == scope and r["metric"] == "straggler factor"]))

    return (
        f"In batches of {batch:,} tokens the busiest expert of a layer works {mean('expert', 'value'):.2f}× the mean "
        f"({mean('expert', 'null'):.2f}× under a balanced router), the busiest of {devices} devices "
        f"{mean('device', 'value'):.2f}× ({mean('device', 'null'):.2f}×)"
    )


def _draw(result: Result) -> go.Figure:
    from moescope.core.figures import CHANCE, SERIES

    frame = result.df()
    figure = go.Figure()
    for number, scope in enumerate(("expert", "device")):
        part = frame[(frame["scope"] == scope) & (frame["metric"] == "straggler factor")]
        tail = frame[(frame["scope"] == scope) & (frame["metric"] != "straggler factor")]
        names = [layer_name(r.layer, r.block) for r in part.itertuples()]
        value, low, high = (part[c].astype(float) for c in ("value", "ci_low", "ci_high"))
        figure.add_scatter(
            x=names, y=value, name=f"busiest {scope}, mean", mode="lines+markers", line={"color": SERIES[number]},
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
            hovertemplate="%{x}: %{y:.3f}× the mean<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=names, y=tail["value"], name=f"busiest {scope}, 99th percentile", mode="lines",
            line={"color": SERIES[number], "dash": "dot"}, hovertemplate="%{x}: %{y:.3f}× the mean<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=names, y=part["null"], name=f"{scope}, balanced router", mode="lines",
            line={"color": CHANCE, "dash": "dash" if scope == "expert" else "dashdot"},
            hovertemplate="%{x}, balanced router: %{y:.3f}× the mean<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="layer", type="category", nticks=32)
    figure.update_yaxes(title="busiest ÷ mean (1: no imbalance)", rangemode="tozero")
    figure.update_layout(height=440)
    return figure
