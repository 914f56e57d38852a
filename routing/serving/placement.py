"""Placement: which device should hold which expert, fitted on half of the documents and judged on the other half."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.pathways.estimates import estimate, mean_by_document
from moescope.routing.pathways.held_out import halve
from moescope.routing.pathways.pairs import router_chain
from moescope.routing.serving.placement_study import FittedHalf, JudgedHalf, Plan
from moescope.routing.trace import Router, read_trace
from moescope.store.run import Run

_CROSSINGS, _MEAN, _TAIL = "crossings a token", "busiest ÷ mean device", "busiest ÷ mean device, 99th percentile"


@analysis(
    name="placement",
    needs=("routing",),
    source="affinity: ExFlow, arXiv 2401.08383; load and anti-correlation: arXiv 2303.06182; MoETuner, arXiv 2502.06643",
    section="serving",
    order=30,
)
def placement(
    run: Run,
    *,
    devices: Count = 4,
    sweep: str | None = None,
    batch: Count = 512,
    pairs: Literal["first", "all"] = "first",
    solver: Literal["local", "milp"] = "local",
    seconds: float = 2.0,
    randoms: Count = 20,
    block: str | None = None,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """Which device should hold which expert, and how much does that save on new documents?

    Every layer's experts are spread over `devices`, equally many on each, in four ways: contiguous, in order of their ids; by
    load; by anti-correlation, experts loaded in the same batches apart; and by affinity, ExFlow's objective: experts that
    follow each other from layer to layer on one device. Half of the documents, drawn by `seed`, is what the solvers see. On the
    other half: crossings a token, how often it changes device between consecutive routers, by its first choices (`pairs="all"`:
    the mean over all pairs of chosen experts); and the slowness of batches, Σ over layers of the busiest device's load over Σ of
    the mean load. The null is placement at random. The placements themselves are rows of the metric "device".

    The integer program (`solver="milp"`) is exact where it ends in time, which is for small runs; the default solves each layer
    exactly with its neighbours fixed, and repeats.

    Args:
        devices: how many; at most as many as the smallest layer has experts.
        sweep: several numbers of devices in one answer, such as 2,4,8; none for `devices` alone.
        batch: tokens served together, in the order of the run.
        pairs: which experts of consecutive routers make a crossing.
        solver: for the affinity.
        seconds: time limit of a solver.
        randoms: placements at random behind the null.
        block: only routers of this block; none for all, in order of layer and block.
        draws: bootstrap resamples of held-out documents.
        seed: of the split, the placements at random and the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world.", "Hello moon."], store, name="first", progress=False)
        ...     frame = ms.analyze(run, "placement", devices=1).df()
        >>> float(frame[frame.metric == "crossings a token"].value.max())
        0.0
    """
    if not 0 < seconds < np.inf:
        raise InputError(f"parameter 'seconds' cannot be {seconds}", expected="a number above 0")
    trace = read_trace(run)
    routers = router_chain(trace, block)
    halves = halve(trace, seed)
    most = min(router.n_experts - router.n_null for router in routers)
    numbers = _numbers(sweep) if sweep else [devices]
    tried = sorted({min(number, most) for number in numbers})
    used = tried[-1]
    fitted = FittedHalf(trace, routers, halves, devices=used, batch=batch, pairs=pairs)
    judged = JudgedHalf(trace, routers, halves, devices=used, batch=batch, pairs=pairs)
    judged.batches.require_loads(judged.loads)
    rows: list[dict[str, Any]] = []
    solvers: dict[str, list[int]] = {}
    for number in tried:
        fitted.devices = judged.devices = number
        plans = {"contiguous": fitted.contiguous(), "load": fitted.by_load(), "anti-correlation": fitted.apart(seconds)}
        if len(routers) > 1:
            plans["affinity"] = fitted.aligned(seconds, seed, solver)
        generator = np.random.default_rng(seed)
        chance = [fitted.at_random(generator) for _ in range(randoms)]
        found = _measured(judged, plans, chance, draws, seed) + _placed(routers, plans)
        rows += [{"devices": number} | row for row in found] if sweep else found
        for name, plan in plans.items():
            solvers.setdefault(f"{name}: {plan.solver}", []).append(number)
    fewer = (f"The smallest layer has {used} experts, so {used} devices are used.",) if used < max(numbers) else ()
    on = f"{used}" if len(tried) == 1 else f"{tried[0]} to {used}"
    return Result(
        title=_title(rows, devices if devices in tried else used),
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=len(halves.judged),
        n_unit=f"held-out tokens of {halves.documents:,} documents",
        definition=f"Experts of every layer on {on} devices, equally many on each. Crossings a token: changes of device between "
        f"consecutive routers, by {'first choices' if pairs == 'first' else 'all pairs of chosen experts'}; busiest ÷ mean "
        f"device: Σ over layers of the busiest device's load over Σ of the mean load, in batches of "
        f"{int(judged.batches.sizes.max()):,} tokens.",
        units={
            f"value[{_CROSSINGS}]": "crossings a token",
            f"value[{_MEAN}]": "ratio",
            f"value[{_TAIL}]": "ratio",
            "value[device]": "number of the device",
        },
        interval=f"95 % percentile bootstrap over held-out documents, {draws} resamples",
        null=f"mean of {randoms} placements at random; null_low and null_high are their least and largest",
        notes=(
            *trace.notes,
            *fewer,
            *_told(solvers, tried),
            f"Fitted on {len(halves.fitted):,} tokens of other documents.",
        ),
        computation="loads and joint counts of half of the documents, solvers, the same counts of the other half",
    )


def _numbers(sweep: str) -> list[int]:
    """Numbers of devices from text."""
    try:
        numbers = sorted({int(part) for part in sweep.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise InputError(f"parameter 'sweep' cannot be {sweep!r}", expected="whole numbers from 1, such as 2,4,8")
    return numbers


def _told(solvers: dict[str, list[int]], tried: list[int]) -> list[str]:
    """How each placement was found, with the numbers of devices where that differs."""
    return [
        f"{text}." if on == tried else f"{text} (on {', '.join(map(str, on))} devices)." for text, on in solvers.items()
    ]


def _measured(
    judged: JudgedHalf, plans: dict[str, Plan], chance: list[Plan], draws: int, seed: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    document, batches, tokens = judged.batches.document, judged.batches.count, judged.tokens
    slow = np.stack([judged.slowness(plan) for plan in chance])
    crossings = judged.crossings([*plans.values(), *chance]) if judged.joints else None
    for number, (name, plan) in enumerate(plans.items()):
        if crossings is not None:
            found = estimate(crossings[number], tokens, draws=draws, seed=seed)
            random = crossings[len(plans) :].sum(1) / tokens.sum()
            rows.append(_row(name, _CROSSINGS, found, random, int(tokens.sum())))
        own = judged.slowness(plan)
        if not np.isnan(own).all():
            mean = mean_by_document(own, document, draws=draws, seed=seed)
            rows.append(_row(name, _MEAN, mean, np.nanmean(slow, axis=1), batches))
            tail = {"value": float(np.nanquantile(own, 0.99)), "ci_low": None, "ci_high": None}
            rows.append(_row(name, _TAIL, tail, np.nanquantile(slow, 0.99, axis=1), batches))
    return rows


def _row(name: str, metric: str, found: dict[str, float | None], random: NDArray[np.float64], n: int) -> dict[str, Any]:
    return {
        "layer": None,
        "block": None,
        "expert": None,
        "metric": metric,
        "placement": name,
        **found,
        "null": float(random.mean()),
        "null_low": float(random.min()),
        "null_high": float(random.max()),
        "n": n,
    }


def _placed(routers: tuple[Router, ...], plans: dict[str, Plan]) -> list[dict[str, Any]]:
    return [
        {
            "layer": router.layer,
            "block": router.block,
            "expert": expert,
            "metric": "device",
            "placement": name,
            "value": float(device),
        }
        for name, plan in plans.items()
        for router, devices in zip(routers, plan.devices, strict=True)
        for expert, device in enumerate(devices.tolist())
    ]


def _title(rows: list[dict[str, Any]], devices: int) -> str:
    def of(name: str, metric: str) -> dict[str, Any] | None:
        at = (row for row in rows if row.get("devices", devices) == devices)
        return next((row for row in at if row["placement"] == name and row["metric"] == metric), None)

    parts = []
    if (best := of("affinity", _CROSSINGS)) is not None and (usual := of("contiguous", _CROSSINGS)) is not None:
        parts.append(
            f"placing by affinity leaves {best['value']:.2f} crossings a token (contiguous {usual['value']:.2f}, at random "
            f"{best['null']:.2f})"
        )
    if (even := of("anti-correlation", _MEAN)) is not None and (usual := of("contiguous", _MEAN)) is not None:
        parts.append(
            f"placing apart what is loaded together brings the busiest device to {even['value']:.2f}× the mean (contiguous "
            f"{usual['value']:.2f}×, at random {even['null']:.2f}×)"
        )
    return f"On {devices} device{'s' * (devices > 1)}, " + "; ".join(parts)


def _draw(result: Result) -> go.Figure:
    from plotly.subplots import make_subplots

    from moescope.core.figures import CHANCE, SERIES

    frame = result.df()
    if "devices" in frame:
        from moescope.routing.serving.placement_curve import draw_curve

        return draw_curve(frame)
    metrics = [metric for metric in (_CROSSINGS, _MEAN, _TAIL) if (frame["metric"] == metric).any()]
    figure = make_subplots(rows=1, cols=max(len(metrics), 1), horizontal_spacing=0.09)
    for column, metric in enumerate(metrics, start=1):
        part = frame[frame["metric"] == metric]
        names = part["placement"].str.replace("-", "-<br>")
        value, low, high = (part[c].astype(float) for c in ("value", "ci_low", "ci_high"))
        figure.add_scatter(
            x=names, y=value, mode="markers", name="held-out documents", legendgroup="value",
            showlegend=column == 1, marker={"color": SERIES[0], "size": 11}, row=1, col=column,
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1.5},
            hovertemplate="%{x}: %{y:.3f}<extra></extra>",
        )  # fmt: skip
        null, least, most = (part[c].astype(float) for c in ("null", "null_low", "null_high"))
        figure.add_scatter(
            x=names, y=null, mode="lines", name="at random, with least and largest", legendgroup="null",
            showlegend=column == 1, line={"color": CHANCE, "dash": "dash"}, row=1, col=column,
            error_y={"type": "data", "symmetric": False, "array": most - null, "arrayminus": null - least, "thickness": 1},
            hovertemplate="at random: %{y:.3f}<extra></extra>",
        )  # fmt: skip
        figure.update_yaxes(title=metric.replace(", 99th percentile", ", p99"), row=1, col=column)
        figure.update_xaxes(type="category", tickangle=0, row=1, col=column)
    figure.update_layout(height=420)
    return figure
