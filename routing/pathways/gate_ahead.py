"""Gate ahead: can a router's choice be read from the hidden state of an earlier layer?"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.grid import layer_name, series_figure
from moescope.routing.pathways.estimates import estimate
from moescope.routing.pathways.held_out import Halves, halve
from moescope.routing.pathways.pairs import router_chain
from moescope.routing.pathways.predictors import best
from moescope.routing.pathways.router_logits import read_logits
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run
from moescope.store.vectors import vector_shards, vector_sites

Vectors = NDArray[np.float32]


@analysis(
    name="gate_ahead",
    needs=("routing", "router_logits", "activations"),
    source="next-gate prediction: AdapMoE, arXiv 2408.10284; linear pre-gate: arXiv 2308.12066",
    section="pathways",
    order=55,
)
def gate_ahead(
    run: Run,
    *,
    site: Literal["hook_resid_pre", "hook_resid_post"] = "hook_resid_post",
    ahead: Natural = 1,
    size: Count | None = None,
    ridge: float = 1e-3,
    sample: Count = 4000,
    block: str | None = None,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """Can a router's choice be read from the hidden state `ahead` layers earlier?

    A linear map from the residual stream at `site` of layer l, each vector divided by its root mean square, to the router logits
    of layer l + `ahead` is fitted by ridge regression on half of the documents, drawn by `seed`. On the other half it names the
    experts of the largest predicted logits. Recall is the mean share of the token's chosen experts that are named; `r2` is the
    share of the logits' variance that is predicted, on the same tokens.

    AdapMoE applies the later router's own weights to the earlier router's input. A store holds neither, so the map is learned
    here: this is a linear probe, an upper bound on what those weights find in the same vectors where tokens are plenty, and less
    where they are few beside the width of the vectors.

    Args:
        site: where in the earlier layer the vectors were recorded.
        ahead: layers from the vectors to the router; 0 reads the router of the same layer.
        size: experts named; none for as many as are chosen.
        ridge: penalty, in multiples of the mean variance of a component; above 0.
        sample: tokens used, drawn from those with vectors.
        block: only routers of this block; none for all.
        draws: bootstrap resamples of held-out documents.
        seed: of the split, the sample and the resampling.
    """
    if not 0 < ridge < np.inf:
        raise InputError(f"parameter 'ridge' cannot be {ridge}", expected="a number above 0")
    trace = read_trace(run)
    halves = halve(trace, seed)
    kept = set(vector_sites(run))
    targets = [
        (router, f"blocks.{router.layer - ahead}.{site}")
        for router in router_chain(trace, block)
        if f"blocks.{router.layer - ahead}.{site}" in kept
    ]
    if not targets:
        raise InputError(
            f"run {run.name!r} kept no vectors at {site} {ahead} layers before a router",
            expected=f"sites like blocks.0.{site}",
            found=", ".join(sorted(kept)),
            fix=f"record with --probe activations and these sites, or choose another site or distance than {ahead}",
        )
    probe = _Probe(trace, halves, ridge, sample, draws, seed)
    rows = [probe.row(router, name, size) for router, name in targets]
    return Result(
        title=_title(rows, ahead),
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=sum(row["n"] for row in rows),
        n_unit="held-out tokens × routers",
        definition="Share of a token's experts among those of the largest logits that a linear map, fitted on other documents, "
        f"predicts from {site} {ahead} layer{'s' * (ahead != 1)} earlier.",
        units={"value": "recall", "null": "recall", "r2": "share of variance", "size": "experts named"},
        interval=f"95 % percentile bootstrap over held-out documents, {draws} resamples",
        null="the most popular experts of the fitted documents, on the same tokens",
        notes=(*trace.notes, "A learned linear probe, not the later router's own weights, which are not recorded."),
        computation="ridge regression of router logits on vectors",
    )


class _Probe:
    """Fits and judges one map after the other."""

    def __init__(self, trace: Trace, halves: Halves, ridge: float, sample: int, draws: int, seed: int) -> None:
        self.trace, self.halves, self.ridge, self.sample = trace, halves, ridge, sample
        self.draws, self.seed = draws, seed

    def row(self, router: Router, site: str, size: int | None) -> dict[str, Any]:
        """The row of one router."""
        vectors, token = self._vectors(site)
        logits = read_logits(self.trace.run, router, token).astype(np.float64)
        place = np.searchsorted(self.trace.token, token, sorter=self._order)
        row = self._order[place]
        learned = np.isin(row, self.halves.fitted)
        if not learned.any() or learned.all():
            raise InputError(
                f"the vectors at {site} do not belong to documents of both halves",
                expected="vectors of tokens of at least two documents",
                fix="record more documents, or try another seed",
            )
        predicted = _predicted(vectors[learned], logits[learned], vectors[~learned], self.ridge)
        named = min(size or router.top_k, router.n_experts)
        chosen = router.experts[row].astype(np.int64)
        counts = np.bincount(chosen[learned].ravel(), minlength=router.n_experts).astype(np.float32)
        hits = np.take_along_axis(best(predicted.astype(np.float32), named), chosen[~learned], axis=1).sum(1)
        popular = best(counts[None], named)[0][chosen[~learned]].mean()
        document = self.halves.document[np.searchsorted(self.halves.judged, row[~learned])]
        asked = np.bincount(document, minlength=self.halves.documents) * router.top_k
        found = np.bincount(document, weights=hits, minlength=self.halves.documents)
        truth = logits[~learned]
        spread = float(((truth - logits[learned].mean(0)) ** 2).sum())
        return {
            "layer": router.layer,
            "block": router.block,
            "metric": "recall",
            "site": site,
            "size": named,
            **estimate(found, asked, draws=self.draws, seed=self.seed),
            "null": float(popular),
            "r2": 1 - float(((truth - predicted) ** 2).sum()) / spread if spread > 0 else None,
            "fitted_on": int(learned.sum()),
            "n": len(hits),
        }

    @property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(self.trace.token, kind="stable")

    def _vectors(self, site: str) -> tuple[Vectors, NDArray[np.int64]]:
        """[row, component] vectors over their root mean square, and [row] their tokens: at most `sample`, each once."""
        shards = list(vector_shards(self.trace.run, site))
        token = np.concatenate([shard.token for shard in shards])
        once = np.unique(token, return_index=True)[1]
        usable = np.sort(once[np.isin(token[once], self.trace.token)])
        if len(usable) > self.sample:
            usable = np.sort(np.random.default_rng(self.seed).choice(usable, self.sample, replace=False))
        ends = np.cumsum([0, *(len(shard.token) for shard in shards)])
        parts = []
        for shard, start, stop in zip(shards, ends[:-1], ends[1:], strict=True):
            within = usable[(usable >= start) & (usable < stop)] - start
            if len(within):
                parts.append(shard.float32()[within])
        if not parts:
            raise InputError(f"no vector at {site} belongs to a token with a decision", fix="look at run.coverage")
        vectors = np.concatenate(parts)
        size = np.sqrt((vectors**2).mean(1, keepdims=True))
        return (vectors / np.where(size > 0, size, 1.0)).astype(np.float32), token[usable]


def _predicted(known: Vectors, target: NDArray[np.float64], asked: Vectors, ridge: float) -> NDArray[np.float64]:
    """Ridge regression with an intercept, solved in the smaller of its two forms."""
    centre, level = known.mean(0, dtype=np.float64), target.mean(0)
    x, y, new = known - centre, target - level, asked - centre
    penalty = ridge * max(float((x**2).sum()) / x.shape[1], 1e-12)
    if len(x) >= x.shape[1]:
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    else:
        weights = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y)
    predicted: NDArray[np.float64] = new @ weights + level
    return predicted


def _title(rows: list[dict[str, Any]], ahead: int) -> str:
    recall, null = (float(np.mean([row[column] for row in rows])) for column in ("value", "null"))
    where = "of its own layer" if ahead == 0 else f"{ahead} layer{'s' * (ahead > 1)} earlier"
    return (
        f"A linear map of the hidden state {where} names {recall:.1%} of the chosen experts of new documents, popularity "
        f"{null:.1%}"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    figure = series_figure(
        frame,
        x=[layer_name(r.layer, r.block) for r in frame.itertuples()],
        title_x="layer of the router",
        title_y="recall on held-out documents",
        null=list(frame["null"].astype(float)),
        null_name="most popular experts",
    )
    figure.update_yaxes(rangemode="tozero")
    return figure
