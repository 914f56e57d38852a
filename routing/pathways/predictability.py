"""Predictability: how many of a router's experts simple tables name, on documents they were not learned from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.routing.pathways.estimates import estimate
from moescope.routing.pathways.held_out import Halves, halve
from moescope.routing.pathways.neighbours import path_neighbours, sequence_neighbours
from moescope.routing.pathways.pairs import router_chain
from moescope.routing.pathways.predictors import Predictor
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

_ALL = slice(None)
_WORDS = {
    "popularity": "the most frequent experts",
    "token id": "the experts most frequent for the token's id",
    "previous token": "Σ P(j | i) over the experts i of the token before at the same router",
    "previous layer": "Σ P(j | i) over the experts i of the router before",
    "two layers": "the experts most frequent after the first choices of the two routers before",
    "similar paths": "the experts of the tokens whose path so far shares most experts",
    "similar sequences": "the experts of the sequence whose counts are most like those of the tokens so far",
}


@analysis(
    name="predictability",
    needs=("routing",),
    source="recall@k: arXiv 2410.17954; tables: arXiv 2308.14352, arXiv 2106.04426; similar sequences: arXiv 2401.14361",
    section="pathways",
    order=50,
)
def predictability(
    run: Run,
    *,
    size: Count | None = None,
    choice: Literal["set", "first"] = "set",
    neighbours: Count = 16,
    sample: Count = 600,
    block: str | None = None,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """How much of the next decision can be told in advance, from the token, the layers before or the token before?

    Half of the documents, drawn by `seed`, fill tables; on the other half each table names `size` experts for every token and
    router. Recall is the mean share of the token's experts that are named. Tables: how often experts follow the token id; the
    sum of P(j | i) over the experts i of the router before, or of the token before at the same router; the first choices of the
    two routers before; and, on a sample of tokens, the votes of the tokens with the most similar path so far, and the counts of
    the sequence most like the one read so far. Where a table has never seen its key it names the most popular experts.

    Recall on the documents that filled the tables would be too high. The null of each table is popularity on the same tokens,
    that of popularity `size` experts at random. MoE-Infinity's released search for similar sequences looks at later layers
    only, which are still empty; here the whole count so far is compared.

    Args:
        size: experts named at each router; none for as many as are chosen.
        choice: predict the whole set, or only the first choice, from first choices.
        neighbours: tokens with similar paths that vote.
        sample: tokens for which similar paths and sequences are looked up.
        block: only routers of this block; none for all, in order of layer and block.
        draws: bootstrap resamples of documents.
        seed: of the split, the sample and the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world.", "Hello moon."], store, name="first", progress=False)
        ...     frame = ms.analyze(run, "predictability").df()
        >>> bool(frame.value.between(0, 1).all())
        True
    """
    trace = read_trace(run)
    routers = router_chain(trace, block)
    halves = halve(trace, seed)
    choices = 1 if choice == "first" else None
    study = _Study(trace, routers, halves, choices, size, draws, seed)
    rows = study.tables() + study.neighbours(neighbours, sample)
    named = {row["predictor"] for row in rows}
    has_ids = "token id" in named
    return Result(
        title=_title(rows, choice),
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=len(halves.judged) * len(routers),
        n_unit="held-out tokens × routers",
        definition=f"Share of a token's {'experts' if choices is None else 'first choices'} among the "
        f"{'k' if size is None else size} experts that a predictor names, on documents it was not fitted on. Predictors: "
        + "; ".join(f"{name}: {words}" for name, words in _WORDS.items() if name in named)
        + ".",
        units={"value": "recall", "null": "recall", "size": "experts named"},
        interval=f"95 % percentile bootstrap over held-out documents, {draws} resamples",
        null="the most popular experts on the same tokens; for popularity itself, experts named at random",
        notes=(
            *trace.notes,
            f"Fitted on {len(halves.fitted):,} tokens, judged on {len(halves.judged):,} of {halves.documents:,} other documents.",
            *(() if has_ids else ("The run has no token ids, so the table of token ids is left out.",)),
        ),
        computation="tables of counts, their most frequent experts, hits by document",
    )


class _Study:
    """The rows of the result."""

    def __init__(
        self, trace: Trace, routers: tuple[Router, ...], halves: Halves, choices: int | None, size: int | None, draws: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.trace, self.routers, self.halves, self.choices = trace, routers, halves, choices
        self.draws, self.seed = draws, seed
        self.asked = [router.top_k if choices is None else 1 for router in routers]
        self.sizes = [min(size or asked, router.n_experts) for asked, router in zip(self.asked, routers, strict=True)]
        self.popular: list[NDArray[np.int64]] = []

    def tables(self) -> list[dict[str, Any]]:
        """Recall of every table at every router."""
        tables = Predictor(self.trace, self.halves, self.choices)
        ids = bool((self.trace.token_id >= 0).any())
        rows = []
        for number, (router, size) in enumerate(zip(self.routers, self.sizes, strict=True)):
            self.popular.append(tables.by_popularity(router, size))
            found = {"popularity": self.popular[-1]}
            if ids:
                found["token id"] = tables.by_token(router, size)
            found["previous token"] = tables.by_previous_token(router, size)
            if number >= 1:
                found["previous layer"] = tables.by_layer(router, self.routers[number - 1], size)
            if number >= 2:
                before, last = self.routers[number - 2 : number]
                found["two layers"] = tables.by_two_layers(router, before, last, size)
            rows += [self._row(number, name, hits, _ALL) for name, hits in found.items()]
        return rows

    def neighbours(self, neighbours: int, sample: int) -> list[dict[str, Any]]:
        """Recall of similar paths and similar sequences, on a sample."""
        generator = np.random.default_rng(self.seed)
        judged = len(self.halves.judged)
        picked = np.sort(generator.choice(judged, min(sample, judged), replace=False))
        by_path = path_neighbours(
            self.routers, self.halves, sample=picked, neighbours=neighbours, sizes=self.sizes, generator=generator,
            choices=self.choices,
        )  # fmt: skip
        by_sequence = sequence_neighbours(
            self.trace, self.routers, self.halves, sample=picked, sizes=self.sizes, choices=self.choices
        )
        return [
            self._row(number, name, hits, picked)
            for name, found in (("similar paths", by_path), ("similar sequences", by_sequence))
            for number, hits in enumerate(found)
            if hits is not None
        ]

    def _row(self, number: int, name: str, hits: NDArray[np.int64], rows: Any) -> dict[str, Any]:
        document, router, asked = self.halves.document[rows], self.routers[number], self.asked[number]
        total = np.bincount(document, minlength=self.halves.documents).astype(np.float64) * asked
        found = np.bincount(document, weights=hits, minlength=self.halves.documents)
        null = self.sizes[number] / router.n_experts
        if name != "popularity":
            null = float(self.popular[number][rows].mean()) / asked
        return {
            "layer": router.layer,
            "block": router.block,
            "metric": "recall",
            "predictor": name,
            "size": self.sizes[number],
            **estimate(found, total, draws=self.draws, seed=self.seed),
            "null": null,
            "n": len(hits),
        }


def _means(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean recall of each predictor over the routers it serves, and that of its null."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        found.setdefault(row["predictor"], []).append((row["value"], row["null"]))
    return {name: (float(np.mean(pairs, axis=0)[0]), float(np.mean(pairs, axis=0)[1])) for name, pairs in found.items()}


def _title(rows: list[dict[str, Any]], choice: str) -> str:
    means = _means(rows)
    popular = means.pop("popularity")
    name, (recall, null) = max(means.items(), key=lambda item: item[1][0] - item[1][1])
    what = "chosen experts" if choice == "set" else "first choices"
    if recall <= null:
        return f"Nothing predicts the {what} of new documents better than popularity does ({popular[0]:.1%} of them)"
    by = {"token id": "The token id", "similar paths": "Similar paths", "similar sequences": "Similar sequences"}
    who = by.get(name, f"The {name}" if name != "two layers" else "The two layers before")
    verb = "name" if who.endswith("s") or name == "two layers" else "names"
    return f"{who} {verb} {recall:.1%} of the {what} of new documents, popularity {null:.1%}"


def _draw(result: Result) -> go.Figure:
    from moescope.core.figures import CHANCE, SERIES

    frame = result.df()
    order = list(dict.fromkeys(zip(frame["layer"], frame["block"], strict=True)))
    order.sort()
    names = {place: layer_name(*place) for place in order}
    figure = go.Figure()
    predictors = [name for name in _WORDS if name in set(frame["predictor"])]
    colours = dict(zip([name for name in predictors if name != "popularity"], SERIES, strict=False))
    for name in predictors:
        part = frame[frame["predictor"] == name].sort_values(["layer", "block"])
        value, low, high = (part[column].astype(float) for column in ("value", "ci_low", "ci_high"))
        chance = name == "popularity"
        figure.add_scatter(
            x=[names[place] for place in zip(part["layer"], part["block"], strict=True)], y=value, name=name,
            mode="lines" if chance else "lines+markers",
            line={"color": CHANCE, "dash": "dash"} if chance else {"color": colours[name], "width": 1.5},
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
            hovertemplate=f"%{{x}}, {name}: %{{y:.1%}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(
        title="layer",
        type="category",
        categoryorder="array",
        categoryarray=[names[place] for place in order],
        nticks=32,
    )
    figure.update_yaxes(title="recall on held-out documents", rangemode="tozero", tickformat=".0%")
    figure.update_layout(height=460)
    return figure
