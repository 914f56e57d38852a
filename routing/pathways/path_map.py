"""The ways of all tokens through a few layers, as a Sankey diagram: busiest experts by name, the others as one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.grid import layer_name
from moescope.routing.pathways.pairs import add_pairs, document_groups, interval_words, router_chain
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

MOST_LAYERS = 6
_STRONG = 2.0


@dataclass(frozen=True)
class _Column:
    """One layer of the diagram.

    Attributes:
        router: whose first choices.
        named: experts with a node of their own, busiest first.
        node: [token] index into `named`; len(named) for the others.
        nodes: how many nodes there are.
    """

    router: Router
    named: NDArray[np.int64]
    node: NDArray[np.uint16]
    nodes: int


@analysis(
    name="path_map",
    needs=("routing",),
    source="token pathways, arXiv 2401.15947; flows between layers, arXiv 2409.02060",
    section="pathways",
    order=35,
)
def path_map(
    run: Run,
    *,
    first_layer: Natural = 0,
    layers: Count = 4,
    experts: Count = 6,
    label: str | None = None,
    block: str | None = None,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """Which ways do all tokens take through a few layers?

    In each of `layers` consecutive routers the `experts` that are most often the first choice have a node of their own, all
    others share one. A flow is the share of tokens whose first choice is in one node and, at the next router, in another; the
    flows of a step sum to 1. The null is the share that independent layers of the same loads would give, p(i) p(j); lift is
    the flow over it.

    Args:
        first_layer: routers of earlier layers are left out.
        layers: routers followed, at most 6.
        experts: experts with a node of their own.
        label: only tokens of documents with this label; none for all.
        block: only routers of this block; none for all, in order of layer and block.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     frame = ms.analyze(run, "path_map", layers=2).df()
        >>> float(frame.value.sum().round(6))
        1.0
    """
    if layers > MOST_LAYERS:
        raise InputError(
            f"parameter 'layers' cannot be {layers}", expected=f"at most {MOST_LAYERS} routers side by side"
        )
    trace = read_trace(run)
    chain = [router for router in router_chain(trace, block, least=2) if router.layer >= first_layer][:layers]
    if len(chain) < 2:
        raise InputError(
            "a way needs two routers", expected="a smaller first_layer, or layers of 2 and more", found=f"{len(chain)}"
        )
    kept = _labelled(trace, label)
    group, groups = document_groups(trace)
    group = group[kept]
    columns = [_column(router, kept, experts) for router in chain]
    frames = [_step(here, there, group, groups, draws, seed) for here, there in itertools.pairwise(columns)]
    table = pd.concat(frames, ignore_index=True).astype({"expert": "Int64", "to_expert": "Int64"})
    return Result(
        title=_title(table, columns),
        table=pa.Table.from_pandas(table, preserve_index=False),
        draw=_draw,
        n=len(group) * len(frames),
        n_unit="tokens × steps between routers",
        definition=f"Share of tokens whose first choice is expert i at one router and j at the next; the {experts} busiest "
        "experts of each router by name, the others together (no expert)"
        + ("." if label is None else ", of one label."),
        units={"value": "share of tokens", "null": "share of tokens", "lift": "ratio"},
        interval=interval_words(trace, draws),
        null="p(i) p(j): independent layers with the same loads",
        notes=trace.notes,
        computation="joint counts of first choices by document",
    )


def _labelled(trace: Trace, label: str | None) -> NDArray[np.bool_]:
    if label is None:
        return np.ones(trace.tokens, np.bool_)
    trace.require_labels()
    if label not in trace.label_names:
        raise InputError(f"no document has the label {label!r}", expected=f"one of {', '.join(trace.label_names)}")
    kept: NDArray[np.bool_] = trace.label == trace.label_names.index(label)
    return kept


def _column(router: Router, kept: NDArray[np.bool_], experts: int) -> _Column:
    first = router.experts[kept, 0]
    load = np.bincount(first, minlength=router.n_experts)
    named = np.argsort(-load, kind="stable")[:experts]
    number = np.full(router.n_experts, len(named), np.uint16)
    number[named] = np.arange(len(named))
    return _Column(router, named, number[first], len(named) + (len(named) < router.n_experts))


def _step(here: _Column, there: _Column, group: NDArray[np.int32], groups: int, draws: int, seed: int) -> pd.DataFrame:
    counts = np.zeros((groups, here.nodes, there.nodes), np.int32)
    add_pairs(here.node[:, None], there.node[:, None], group, counts, "first")
    size = np.bincount(group, minlength=groups).astype(np.float64)
    present = size > 0
    value, low, high = bootstrap_ratio(
        counts[present].astype(np.float64), size[present, None, None], draws=draws, seed=seed
    )
    null = value.sum(1)[:, None] * value.sum(0)[None, :]
    i, j = np.nonzero(value)
    rows: dict[str, Any] = {
        "layer": here.router.layer,
        "block": here.router.block,
        "expert": _named(here, i),
        "to_layer": there.router.layer,
        "to_block": there.router.block,
        "to_expert": _named(there, j),
        "metric": "flow",
        "value": value[i, j],
        "ci_low": low[i, j],
        "ci_high": high[i, j],
        "null": null[i, j],
        "lift": value[i, j] / null[i, j],
        "n": counts.sum(0)[i, j],
    }
    return pd.DataFrame(rows)


def _named(column: _Column, node: NDArray[np.int64]) -> list[int | None]:
    return [int(column.named[number]) if number < len(column.named) else None for number in node]


def _title(table: pd.DataFrame, columns: list[_Column]) -> str:
    named = table[table["expert"].notna() & table["to_expert"].notna()]
    ends = f"{columns[0].router.name} to {columns[-1].router.name}"
    if named.empty:
        return f"No token goes from one of the busiest experts to another from {ends}"
    most = named.loc[named["value"].idxmax()]
    return (
        f"From {ends} the broadest way between busy experts is {layer_name(int(most['layer']), most['block'])}·"
        f"E{most['expert']} → {layer_name(int(most['to_layer']), most['to_block'])}·E{most['to_expert']}: {most['value']:.1%} of "
        f"tokens (independent layers: {most['null']:.1%})"
    )


def _draw(result: Result) -> go.Figure:
    from moescope.core.figures import CHANCE, SERIES

    frame = result.df()
    columns = _places(frame)
    order = [(place, expert) for place, experts in columns.items() for expert in experts]
    number = {node: index for index, node in enumerate(order)}
    width = len(columns) - 1
    at = {place: index for index, place in enumerate(columns)}
    share = dict.fromkeys(order, 0.0)
    ends = []
    for row in frame.itertuples():
        here, there = (
            ((row.layer, row.block), _expert(row.expert)),
            ((row.to_layer, row.to_block), _expert(row.to_expert)),
        )
        ends.append((here, there))
        share[here] += row.value
        if at[there[0]] == width:
            share[there] += row.value
    lifts = [float(lift) for lift in frame["lift"]]
    named = [here[1] is not None and there[1] is not None for here, there in ends]
    figure = go.Figure(
        go.Sankey(
            arrangement="snap",
            domain={"y": [0.0, 0.95]},
            textfont={"size": 12},
            node={
                "label": [_name(expert) for _, expert in order],
                "x": [0.001 + 0.998 * at[place] / width for place, _ in order],
                "y": [_middle(node, columns, share) for node in order],
                "color": [CHANCE if expert is None else SERIES[0] for _, expert in order],
                "pad": 10,
                "thickness": 14,
                "customdata": ["" if expert is None else _spelt(place, expert) for place, expert in order],
                "hovertemplate": "%{label}: %{value:.2%} of tokens<extra></extra>",
            },
            link={
                "source": [number[here] for here, _ in ends],
                "target": [number[there] for _, there in ends],
                "value": frame["value"],
                "color": [_colour(lift, both) for lift, both in zip(lifts, named, strict=True)],
                "customdata": [
                    f"{_spelt(*here)}-{_spelt(*there)}" if both else ""
                    for (here, there), both in zip(ends, named, strict=True)
                ],
                "label": [
                    f"{layer_name(*here[0])}·{_name(here[1])} → {layer_name(*there[0])}·{_name(there[1])}: {row.value:.2%} of "
                    f"tokens; independent layers {row.null:.2%} (lift {row.lift:.1f})"
                    for (here, there), row in zip(ends, frame.itertuples(), strict=True)
                ],
                "hovertemplate": "%{label}<extra></extra>",
            },
        )
    )
    for place, column in at.items():
        figure.add_annotation(
            x=column / width, y=0.96, text=layer_name(*place), showarrow=False, xref="paper", yref="paper",
            yanchor="bottom", xanchor="left" if column == 0 else "right" if column == width else "center",
        )  # fmt: skip
    figure.add_annotation(
        x=0, y=0, yshift=-14, yanchor="top", xref="paper", yref="paper", showarrow=False, xanchor="left",
        text=f"width: share of tokens; orange: over {_STRONG:g}× what independent layers give, blue: under half of it",
    )  # fmt: skip
    figure.update_layout(height=560)
    return figure


def _places(frame: pd.DataFrame) -> dict[tuple[int, str], list[int | None]]:
    """Layer → its nodes, the largest first and the others last."""
    held: dict[tuple[int, str], dict[int | None, float]] = {}
    for row in frame.itertuples():
        for place, expert in (((row.layer, row.block), row.expert), ((row.to_layer, row.to_block), row.to_expert)):
            column = held.setdefault(place, {})
            column[_expert(expert)] = column.get(_expert(expert), 0.0) + row.value
    return {
        place: sorted(column, key=lambda expert, c=column: (expert is None, -c[expert], expert))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        for place, column in held.items()
    }


def _expert(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)


def _name(expert: int | None) -> str:
    return "others" if expert is None else f"E{expert}"


def _spelt(place: tuple[int, str], expert: int | None) -> str:
    """A router's expert as the address of a page spells it: `3:7`, or `3.attn:7`."""
    layer, block = place
    return f"{layer}:{expert}" if block == "mlp" else f"{layer}.{block}:{expert}"


def _middle(
    node: tuple[tuple[int, str], int | None],
    columns: dict[tuple[int, str], list[int | None]],
    share: dict[tuple[tuple[int, str], int | None], float],
) -> float:
    """Where a node's middle lies from the top, gaps included."""
    place, expert = node
    column = columns[place]
    gap = 0.02
    above = column[: column.index(expert)]
    total = sum(share[place, other] for other in column) + gap * (len(column) - 1)
    top = sum(share[place, other] + gap for other in above)
    return min(max((top + share[node] / 2) / total, 0.001), 0.999)


def _colour(lift: float, named: bool) -> str:
    if not named:
        return "rgba(134,142,150,0.22)"
    if lift > _STRONG:
        return "rgba(213,94,0,0.55)"
    return "rgba(0,114,178,0.55)" if lift < 1 / _STRONG else "rgba(134,142,150,0.5)"
