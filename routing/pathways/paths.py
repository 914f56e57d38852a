"""Paths: the experts a token meets one after another, by rank and frequency, against independent layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.grid import layer_name
from moescope.routing.pathways.pairs import document_groups, interval_words, router_chain
from moescope.routing.pathways.path_codes import path_codes
from moescope.routing.pathways.power_law import fit_power_law
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

_CURVE = 120
_FIT = ("power-law exponent", "distance from power law", "smallest count fitted")


@analysis(
    name="paths",
    needs=("routing",),
    source="arXiv 2506.22389 (paths of tokens follow a power law); fit: arXiv 0706.1062",
    section="pathways",
    order=40,
)
def paths(
    run: Run,
    *,
    length: Count | None = 3,
    x_min: Count | None = None,
    top: Count = 20,
    block: str | None = None,
    samples: Count = 3,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """Do tokens share few paths through the experts, and do the paths' frequencies follow a power law?

    A token's path is its first-choice expert at every router, or at every window of `length` consecutive routers (paths that
    begin at different layers are different). Paths are ranked by how many tokens take them. The exponent of P(count = x) ∝
    x^−α is α = 1 + n / Σ ln(x_i / (x_min − ½)) over the n paths with x_i ≥ x_min tokens, and the Kolmogorov–Smirnov distance
    says how far the counts are from the fitted law. The null draws each router's expert from the router's own loads,
    independently of all others, by shuffling its decisions over tokens.

    Args:
        length: routers in a path, at most all of them; none for all. Whole paths of a deep model hardly ever repeat.
        x_min: smallest count that is fitted; none for the one of least distance. Below about 6 the estimate is biased.
        top: commonest paths that are listed by name.
        block: only routers of this block; none for all, in order of layer and block.
        samples: shuffles behind the null.
        draws: bootstrap resamples of documents.
        seed: of shuffling and resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     frame = ms.analyze(run, "paths", length=1).df()
        >>> float(frame[frame.metric == "share of paths taken"].value.sum().round(9)) <= 1
        True
    """
    trace = read_trace(run)
    chain = router_chain(trace, block)
    width = min(length or len(chain), len(chain))
    windows = [chain[start : start + width] for start in range(len(chain) - width + 1)]
    found = _Paths(trace, windows)
    generator = np.random.default_rng(seed)
    nulls = [_shuffled_counts(windows, trace.tokens, generator) for _ in range(samples)]
    rows = _scalars(found.counts, nulls, x_min) + _ranked(found, nulls, top, draws, seed)
    return Result(
        title=_title(rows, width, len(windows)),
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=trace.tokens * len(windows),
        n_unit="tokens" if len(windows) == 1 else "tokens × windows of layers",
        definition=f"A path is the first-choice expert at each of {width} consecutive routers; paths are ranked by the tokens "
        "that take them. Exponent: α = 1 + n / Σ ln(x / (x_min − ½)) over the n paths of at least x_min tokens.",
        units={
            "value[distinct paths]": "paths",
            "value[paths taken once]": "share of distinct paths",
            "value[path entropy]": "bits",
            "value[power-law exponent]": "exponent",
            "value[distance from power law]": "Kolmogorov–Smirnov distance",
            "value[smallest count fitted]": "tokens",
            "value[share of paths taken]": "share of tokens" if len(windows) == 1 else "share of tokens × windows",
        },
        interval=interval_words(trace, draws) + ", of the shares of single paths",
        null=f"each router's decisions shuffled over tokens, independently of the others, mean of {samples}",
        notes=trace.notes,
        computation="paths as whole numbers, counts, maximum-likelihood fit",
    )


class _Paths:
    """Every token's path in every window: counts, and the windows, tokens and documents behind them."""

    def __init__(self, trace: Trace, windows: list[tuple[Router, ...]]) -> None:
        self.trace, self.windows = trace, windows
        parts = [np.unique(_codes(window), return_inverse=True, return_counts=True) for window in windows]
        self.inverse = [part[1].astype(np.int64) for part in parts]
        self.offset = np.cumsum([0, *(len(part[0]) for part in parts)])
        self.counts: NDArray[np.int64] = np.concatenate([part[2] for part in parts]).astype(np.int64)

    def name(self, number: int) -> tuple[str, Router]:
        """`E3 → E17 → …`, and the router at which the path begins."""
        window = int(np.searchsorted(self.offset, number, side="right")) - 1
        token = int(np.argmax(self.inverse[window] == number - self.offset[window]))
        routers = self.windows[window]
        return " → ".join(f"E{router.experts[token, 0]}" for router in routers), routers[0]

    def by_document(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[document, path] tokens on each of the paths, and [document] tokens × windows."""
        group, groups = document_groups(self.trace)
        column = np.full(len(self.counts), -1)
        column[numbers] = np.arange(len(numbers))
        total = np.zeros((groups, len(numbers)))
        for inverse, start in zip(self.inverse, self.offset[:-1], strict=True):
            at = column[inverse + start]
            hit = at >= 0
            cells = group[hit].astype(np.int64) * len(numbers) + at[hit]
            total += np.bincount(cells, minlength=total.size).reshape(total.shape)
        return total, np.bincount(group, minlength=groups).astype(np.float64) * len(self.windows)


def _codes(window: tuple[Router, ...], orders: list[NDArray[np.int64]] | None = None) -> NDArray[np.int64]:
    columns = [router.experts[:, 0] for router in window]
    if orders is not None:
        columns = [column[order] for column, order in zip(columns, orders, strict=True)]
    return path_codes(columns, [router.n_experts for router in window])


def _shuffled_counts(
    windows: list[tuple[Router, ...]], tokens: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    chain = {(router.layer, router.block): generator.permutation(tokens) for window in windows for router in window}
    parts = []
    for window in windows:
        orders = [chain[router.layer, router.block] for router in window]
        parts.append(np.unique(_codes(window, orders), return_counts=True)[1])
    return np.concatenate(parts).astype(np.int64)


def _scalars(counts: NDArray[np.int64], nulls: list[NDArray[np.int64]], x_min: int | None) -> list[dict[str, Any]]:
    measured, chance = _measures(counts, x_min), [_measures(null, x_min) for null in nulls]
    fitted = int((counts >= (measured["smallest count fitted"] or 0)).sum())
    rows = []
    for metric, value in measured.items():
        known = [found[metric] for found in chance if found[metric] is not None]
        null = float(np.mean(known)) if known else None  # type: ignore[arg-type]  # the missing ones are out of it
        rows.append(_row(metric, value, null, fitted if metric in _FIT and fitted else int(counts.sum())))
    return rows


def _measures(counts: NDArray[np.int64], x_min: int | None) -> dict[str, float | None]:
    share = counts / counts.sum()
    fit = fit_power_law(counts, x_min)
    return {
        "distinct paths": float(len(counts)),
        "paths taken once": float(np.mean(counts == 1)),
        "path entropy": abs(float(-(share * np.log2(share)).sum())),
        "power-law exponent": fit.exponent if fit else None,
        "distance from power law": fit.distance if fit else None,
        "smallest count fitted": float(fit.x_min) if fit else None,
    }


def _ranked(found: _Paths, nulls: list[NDArray[np.int64]], top: int, draws: int, seed: int) -> list[dict[str, Any]]:
    """The commonest paths by name, and log-spaced ranks beyond them."""
    order = np.argsort(-found.counts, kind="stable")
    chance = [np.sort(null)[::-1] for null in nulls]
    spaced = np.unique(np.geomspace(1, len(order), _CURVE).astype(np.int64))
    ranks = np.union1d(np.arange(1, min(top, len(order)) + 1), spaced)
    numbers = order[ranks - 1]
    tokens, size = found.by_document(numbers)
    value, low, high = bootstrap_ratio(tokens, size[:, None], draws=draws, seed=seed)
    rows = []
    for place, (rank, number) in enumerate(zip(ranks.tolist(), numbers.tolist(), strict=True)):
        name, first = found.name(number) if rank <= top else (None, found.windows[0][0])
        null = np.mean([counts[rank - 1] / counts.sum() if rank <= len(counts) else 0.0 for counts in chance])
        row = _row("share of paths taken", float(value[place]), float(null), int(found.counts[number]))
        if not np.isnan(low[place]):
            row |= {"ci_low": float(low[place]), "ci_high": float(high[place])}
        if name is not None:
            row |= {"path": name, "layer": first.layer, "block": first.block}
        rows.append(row | {"rank": rank})
    return rows


def _row(metric: str, value: float | None, null: float | None, n: int) -> dict[str, Any]:
    return {
        "layer": None,
        "block": None,
        "metric": metric,
        "rank": None,
        "path": None,
        "value": value,
        "ci_low": None,
        "ci_high": None,
        "null": null,
        "n": n,
    }


def _title(rows: list[dict[str, Any]], width: int, windows: int) -> str:
    by_metric = {row["metric"]: row for row in reversed(rows)}
    distinct, first = by_metric["distinct paths"], by_metric["share of paths taken"]
    exponent, distance = by_metric["power-law exponent"], by_metric["distance from power law"]
    where = "" if windows == 1 else f", begun at any of {windows} layers"
    title = (
        f"Tokens take {int(distinct['value']):,} distinct paths of {width} router{'s' * (width > 1)}{where} "
        f"({distinct['null']:,.0f} if layers were independent); the commonest carries {first['value']:.2g} "
        f"of them ({first['null']:.2g})"
    )
    if exponent["value"] is None:
        return title + "; too few frequencies to fit a power law"
    return title + f"; power-law exponent {exponent['value']:.2f}, distance {distance['value']:.3f}"


def _draw(result: Result) -> go.Figure:
    from moescope.core.figures import CHANCE, SERIES

    frame = result.df()
    curve = frame[frame["metric"] == "share of paths taken"].sort_values("rank")
    starts = [
        "" if not isinstance(path, str) else f"<br>from {layer_name(int(layer), block)}: {path[:120]}"
        for path, layer, block in zip(curve["path"], curve["layer"].fillna(0), curve["block"], strict=True)
    ]
    figure = go.Figure(
        go.Scatter(
            x=curve["rank"], y=curve["value"], mode="lines+markers", name="paths of tokens", line={"color": SERIES[0]},
            marker={"size": 5}, customdata=np.stack([curve["n"].to_numpy().astype(object), starts], axis=-1),
            hovertemplate="rank %{x}: %{customdata[0]} tokens, %{y:.3%}%{customdata[1]}<extra></extra>",
        )
    )  # fmt: skip
    chance = curve[curve["null"] > 0]
    figure.add_scatter(
        x=chance["rank"], y=chance["null"], mode="lines", name="independent layers with the same loads",
        line={"color": CHANCE, "dash": "dash"}, hovertemplate="rank %{x}, independent layers: %{y:.3%}<extra></extra>",
    )  # fmt: skip
    fit = frame[frame["metric"].isin(_FIT)].set_index("metric")
    exponent, least = fit.loc[_FIT[0], "value"], fit.loc[_FIT[2], "value"]
    if pd.notna(exponent):
        fitted, unit = fit.loc[_FIT[0], "n"], curve["value"].iloc[0] / curve["n"].iloc[0]
        ends = np.array([1.0, fitted])
        figure.add_scatter(
            x=ends, y=least * unit * (ends / fitted) ** (-1 / (exponent - 1)), mode="lines",
            name=f"power law of exponent {exponent:.2f}", line={"color": SERIES[1], "dash": "dot"}, hoverinfo="skip",
        )  # fmt: skip
    figure.update_xaxes(title="rank of the path", type="log", dtick=1, exponentformat="none")
    figure.update_yaxes(title=result.units["value[share of paths taken]"], type="log", dtick=1, exponentformat="e")
    figure.update_layout(height=440)
    return figure
