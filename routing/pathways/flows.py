"""Flows: which experts hand their tokens to which, layer by layer, as a Sankey diagram."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.grid import layer_name
from moescope.routing.pathways.pairs import document_groups, interval_words, joint_counts, router_chain
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

_SHOWN_LAYERS = 6
_SHOWN_FLOWS = 24


@analysis(
    name="flows",
    needs=("routing",),
    source="arXiv 2409.02060 (flows between layers over 1.5 × uniform); token pathways, arXiv 2401.15947",
    section="pathways",
    order=30,
)
def flows(
    run: Run,
    *,
    threshold: float = 1.5,
    shown: Count = _SHOWN_FLOWS,
    first_layer: Natural = 0,
    layers: Count = _SHOWN_LAYERS,
    label: str | None = None,
    block: str | None = None,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """Which experts hand their tokens to which, from layer to layer?

    A flow is the share of tokens whose first choice is expert i at one router and expert j at the next. Shown are flows above
    `threshold` times the uniform share 1 / (E · E′), for each step the `shown` largest. The null is the share that independent
    layers of the same loads would give, p(i) p(j).

    Args:
        threshold: smallest flow, in multiples of the uniform share.
        shown: flows of each step.
        first_layer: routers of earlier layers are left out.
        layers: routers followed, from the first on.
        label: only tokens of documents with this label; none for all.
        block: only routers of this block; none for all, in order of layer and block.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     bool((ms.analyze(run, "flows", threshold=2).df().times_uniform > 2).all())
        True
    """
    if not threshold >= 0:
        raise InputError(f"parameter 'threshold' cannot be {threshold}", expected="a number, at least 0")
    trace = read_trace(run)
    kept = _labelled(trace, label)
    chain = [router for router in router_chain(trace, block, least=2) if router.layer >= first_layer][:layers]
    if len(chain) < 2:
        raise InputError(
            "flows need two routers", expected="a smaller first_layer, or layers of 2 and more", found=f"{len(chain)}"
        )
    group, groups = document_groups(trace)
    frames = [
        _step(first, second, kept, group, groups, threshold, shown, draws, seed)
        for first, second in itertools.pairwise(chain)
    ]
    table = pd.concat([frame for frame, _ in frames], ignore_index=True)
    over, covered = sum(count for _, (count, _) in frames), np.mean([share for _, (_, share) in frames])
    return Result(
        title=_title(table, over, float(covered), threshold, label),
        table=pa.Table.from_pandas(table, preserve_index=False),
        draw=_draw,
        n=int(kept.sum()) * len(frames),
        n_unit="tokens × steps between routers",
        definition="Share of tokens whose first choice is expert i at one router and j at the next; only flows above "
        f"{threshold:g}× the uniform share 1 / (E · E′), the {shown} largest of each step"
        + ("." if label is None else ", of tokens of one label."),
        units={"value": "share of tokens", "null": "share of tokens", "times_uniform": "ratio", "lift": "ratio"},
        interval=interval_words(trace, draws),
        null="p(i) p(j): independent layers with the same loads",
        notes=(*trace.notes, f"Flows over the threshold: {over:,}; listed: {len(table):,}."),
        computation="joint counts of first choices by document",
    )


def _labelled(trace: Trace, label: str | None) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    if label is None:
        return np.ones(trace.tokens, np.bool_)
    trace.require_labels()
    if label not in trace.label_names:
        raise InputError(f"no document has the label {label!r}", expected=f"one of {', '.join(trace.label_names)}")
    chosen: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = trace.label == trace.label_names.index(label)
    return chosen


def _step(
    first: Router,
    second: Router,
    kept: Any,
    group: Any,
    groups: int,
    threshold: float,
    shown: int,
    draws: int,
    seed: int,
) -> tuple[pd.DataFrame, tuple[int, float]]:
    """The largest flows of one step; beside them how many are over the threshold, and the share of tokens they carry."""
    if not kept.all():
        first, second = (Router(r.layer, r.block, r.n_experts, r.n_null, r.experts[kept]) for r in (first, second))
        group = group[kept]
    counts = joint_counts(first, second, group, groups, "first")
    joint = counts.sum(0) / len(group)
    uniform = 1.0 / joint.size
    flat = joint.ravel()
    over = flat > threshold * uniform * (1 + 1e-12)
    order = np.argsort(-flat, kind="stable")[: min(shown, int(over.sum()))]
    i, j = np.unravel_index(order, joint.shape)
    size = np.bincount(group, minlength=groups).astype(np.float64)
    present = size > 0
    by_document = counts[:, i, j].astype(np.float64)[present]
    low = high = np.full(len(order), np.nan)
    if len(order):
        _, low, high = bootstrap_ratio(by_document, size[present, None], draws=draws, seed=seed)
    null = joint.sum(1)[i] * joint.sum(0)[j]
    frame = pd.DataFrame(
        {
            "layer": first.layer,
            "block": first.block,
            "expert": i,
            "to_layer": second.layer,
            "to_block": second.block,
            "to_expert": j,
            "metric": "flow",
            "value": flat[order],
            "ci_low": low,
            "ci_high": high,
            "null": null,
            "times_uniform": flat[order] / uniform,
            "lift": flat[order] / np.where(null > 0, null, 1.0),
            "n": len(group),
        }
    )
    return frame, (int(over.sum()), float(flat[over].sum()))


def _title(table: pd.DataFrame, over: int, covered: float, threshold: float, label: str | None) -> str:
    whose = "tokens" if label is None else f"{label} tokens"
    if table.empty:
        return f"No flow of {whose} from expert to expert is over {threshold:g}× the uniform share"
    most = table.loc[table["value"].idxmax()]
    return (
        f"{over:,} flows over {threshold:g}× the uniform share carry {covered:.0%} of {whose} at a step; the largest, "
        f"{layer_name(most['layer'], most['block'])}·E{most['expert']} → "
        f"{layer_name(most['to_layer'], most['to_block'])}·E{most['to_expert']}, carries {most['value']:.1%} "
        f"(independent layers: {most['null']:.1%})"
    )


def _draw(result: Result) -> go.Figure:
    from moescope.core.figures import CHANCE, SERIES

    frame = result.df()
    steps = list(dict.fromkeys(zip(frame["layer"], frame["block"], strict=True)))
    ends = [(r.to_layer, r.to_block) for r in frame.itertuples()]
    places = list(dict.fromkeys([*steps, *ends]))
    places.sort()
    column = {place: number for number, place in enumerate(places)}
    starts = [(column[r.layer, r.block], r.expert) for r in frame.itertuples()]
    stops = [(column[end], r.to_expert) for end, r in zip(ends, frame.itertuples(), strict=True)]
    nodes = sorted({*starts, *stops})
    number = {node: position for position, node in enumerate(nodes)}
    width = max(len(places) - 1, 1)
    strong = frame["lift"] > 2
    figure = go.Figure(
        go.Sankey(
            arrangement="snap",
            domain={"y": [0.08, 1.0]},
            node={
                "label": [f"E{expert}" for _, expert in nodes],
                "x": [0.001 + 0.998 * place / width for place, _ in nodes],
                "y": [_height(node, nodes) for node in nodes],
                "color": SERIES[0],
                "pad": 6,
                "thickness": 10,
                "customdata": [layer_name(*places[place]) for place, _ in nodes],
                "hovertemplate": "%{customdata}·%{label}: %{value:.2%} of tokens in shown flows<extra></extra>",
            },
            link={
                "source": [number[node] for node in starts],
                "target": [number[node] for node in stops],
                "value": frame["value"],
                "color": [_faded(SERIES[1]) if high else _faded(CHANCE) for high in strong],
                "customdata": np.stack([frame["null"], frame["lift"], frame["times_uniform"]], axis=-1),
                "hovertemplate": "%{source.customdata}·%{source.label} → %{target.customdata}·%{target.label}: %{value:.2%}; "
                "independent layers %{customdata[0]:.2%} (lift %{customdata[1]:.1f})<extra></extra>",
            },
        )
    )
    for place, at in column.items():
        figure.add_annotation(x=at / width, y=0.0, text=layer_name(*place), showarrow=False, xref="paper", yref="paper")
    figure.add_annotation(
        x=0, y=-0.08, xref="paper", yref="paper", showarrow=False, xanchor="left",
        text="width: share of tokens; orange: more than twice what independent layers of the same loads give",
    )  # fmt: skip
    figure.update_layout(height=620)
    return figure


def _height(node: tuple[int, int], nodes: list[tuple[int, int]]) -> float:
    column = [other for other in nodes if other[0] == node[0]]
    return 0.02 + 0.96 * (column.index(node) + 0.5) / len(column)


def _faded(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.45)"
