"""Combinations: how many of the possible sets of k experts each router really uses."""

from __future__ import annotations

from math import comb, expm1, log, log1p
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.routing.pathways.pairs import router_chain
from moescope.routing.pathways.path_codes import path_codes
from moescope.routing.trace import Router, read_trace
from moescope.store.run import Run

_METRICS = ("distinct sets", "share of possible sets, logarithms", "entropy of sets")


@analysis(
    name="combinations",
    needs=("routing",),
    source="arXiv 2505.06839 (expressivity grows with the number of active combinations)",
    section="pathways",
    order=60,
)
def combinations(run: Run, *, block: str | None = None, samples: Count = 1, seed: Natural = 0) -> Result:
    """How many of its possible sets of experts does each router use?

    Of the C(E, k) sets that a router could choose: how many distinct ones it chose (U), ln U ÷ ln C(E, k), and the entropy of
    its sets in bits. The null keeps every expert's load and the number of experts a token, and pairs experts at random: the
    decisions are dealt out again over tokens, repeats within a token swapped away. `uniform` is the count that a router which
    draws every set alike would give on as many tokens, C · (1 − (1 − 1/C)^T).

    Args:
        block: only routers of this block; none for all.
        samples: times the decisions are dealt out again.
        seed: of the dealing.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     frame = ms.analyze(run, "combinations").df()
        >>> int(frame[frame.metric == "distinct sets"].value.max()) <= 7
        True
    """
    trace = read_trace(run)
    rows: list[dict[str, Any]] = []
    for router in router_chain(trace, block):
        generator = np.random.default_rng([seed, router.layer])
        measured = _measures(router.experts, router)
        null = np.mean([_measures(_dealt(router, generator), router) for _ in range(samples)], axis=0)
        possible = comb(router.n_experts, router.top_k)
        uniform = float(-possible * expm1(trace.tokens * log1p(-1 / possible))) if possible > 1 else 1.0
        rows += [
            {
                "layer": router.layer,
                "block": router.block,
                "metric": metric,
                "value": None if np.isnan(value) else float(value),
                "null": None if np.isnan(chance) else float(chance),
                "uniform": uniform if metric == _METRICS[0] else None,
                "n": trace.tokens,
            }
            for metric, value, chance in zip(_METRICS, measured, null, strict=True)
        ]
    return Result(
        title=_title(rows, trace.tokens),
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=trace.tokens * len(rows) // len(_METRICS),
        n_unit="tokens × routers",
        definition="Distinct sets of k experts that a router chose; the logarithm of their number over that of the possible "
        "sets; entropy of the sets.",
        units={
            "value[distinct sets]": "sets",
            "value[share of possible sets, logarithms]": "ln U ÷ ln C(E, k)",
            "value[entropy of sets]": "bits",
            "uniform": "sets",
        },
        null=f"the same loads, experts of a token drawn independently, mean of {samples}",
        notes=(*trace.notes, "Counts of distinct sets grow with the number of tokens: compare runs of equal length."),
        computation="sets as whole numbers, counted; decisions dealt out again",
    )


def _measures(experts: NDArray[Any], router: Router) -> NDArray[np.float64]:
    ordered = np.sort(experts, axis=1)
    codes = path_codes(list(ordered.T), [router.n_experts] * router.top_k)
    counts = np.unique(codes, return_counts=True)[1]
    share = counts / counts.sum()
    possible = comb(router.n_experts, router.top_k)
    used = log(len(counts)) / log(possible) if possible > 1 else np.nan
    return np.array([len(counts), used, abs(-(share * np.log2(share)).sum())])


def _dealt(router: Router, generator: np.random.Generator) -> NDArray[Any]:
    from moescope.routing.pathways.dealing_kernel import part_repeats

    dealt = generator.permutation(router.experts.ravel()).reshape(router.experts.shape)
    part_repeats(dealt, int(generator.integers(2**31)))
    return dealt


def _title(rows: list[dict[str, Any]], tokens: int) -> str:
    distinct = [row for row in rows if row["metric"] == _METRICS[0]]
    least = min(distinct, key=lambda row: row["value"] / row["null"])
    place = layer_name(least["layer"], least["block"])
    return (
        f"Routers use {np.median([row['value'] for row in distinct]):,.0f} distinct sets of experts in {tokens:,} tokens "
        f"(median); furthest below independence is {place}: {least['value']:,.0f}, against {least['null']:,.0f} with experts "
        "of the same loads combined at random"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    part = frame[frame["metric"] == _METRICS[0]]
    names = [layer_name(r.layer, r.block) for r in part.itertuples()]
    figure = go.Figure(
        go.Scatter(x=names, y=part["value"], mode="lines+markers", name="chosen", line={"color": SERIES[0]})
    )
    chance = {"color": CHANCE, "dash": "dash"}
    figure.add_scatter(x=names, y=part["null"], mode="lines", name="same loads, combined at random", line=chance)
    figure.add_scatter(
        x=names, y=part["uniform"], mode="lines", name="every set alike", line={"color": SERIES[4], "dash": "dot"}
    )
    figure.update_xaxes(title="layer", type="category", nticks=32)
    figure.update_yaxes(title="distinct sets of experts", rangemode="tozero")
    figure.update_layout(height=400)
    return figure
